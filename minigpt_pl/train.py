"""python -m minigpt_pl.train: train a model and write a run folder."""

import os
import sys
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from minigpt_pl import runs
from minigpt_pl.checkpoints import find_checkpoint
from minigpt_pl.cli import app
from minigpt_pl.config import TrainConfig
from minigpt_pl.errors import InputError

# The first process sets this environment variable. Processes that Lightning starts then resume the same run.
_RESUME_CHECKPOINT = "MINIGPT_RESUME_CHECKPOINT"


def main() -> None:
    app.run("train", train, prepare=_add_settings_of_the_run)


def train(config: TrainConfig) -> None:
    """Train with these settings: from the start, or from a checkpoint if `resume` is set."""
    if app.in_sweep():
        _refuse_in_sweep(config)

    from minigpt_pl.training.callbacks import Interrupted  # Lightning: import it after the checks, it takes 3 s
    from minigpt_pl.training.fit import fit
    from minigpt_pl.training.trainer import is_first_process

    hydra = HydraConfig.get()
    name_prefix = hydra.runtime.choices.get("experiment") or hydra.runtime.choices.get("data") or "run"
    overrides = [override for override in hydra.overrides.task if _name(override) != "resume"]
    try:
        fit(config, name_prefix, overrides, _checkpoint_to_resume(config))
    except Interrupted:
        # In the other processes, a non-zero exit code would make torchrun kill all processes.
        sys.exit(130 if is_first_process() else 0)


def _refuse_in_sweep(config: TrainConfig) -> None:
    problems = []
    if config.trainer.devices > 1:
        problems.append(f"trainer.devices={config.trainer.devices}: each process would start the whole sweep again")
    if config.resume is not None:
        problems.append(f"resume={config.resume}: all jobs would continue the same run")
    if f"run_name={config.run_name}" in sys.argv:
        problems.append(f"run_name={config.run_name}: all jobs would have the same name")
    if config.find_learning_rate:
        problems.append("find_learning_rate=true: all jobs would draw the same figure")
    if problems:
        raise InputError(*(f"{problem}; leave it out of a sweep (-m)" for problem in problems))


def _add_settings_of_the_run(arguments: list[str]) -> list[str]:
    """With `resume`, add the run's own settings, except those given again on the command line."""
    where = [argument for argument in arguments if _name(argument) in ("resume", "run_name", "output_dir")]
    if not any(_name(argument) == "resume" for argument in where) or {"-m", "--multirun"} & {*sys.argv}:
        return arguments
    config = app.to_settings(app.compose("train", where))
    checkpoint = _checkpoint_to_resume(config)
    if checkpoint is None:
        return arguments
    os.environ[_RESUME_CHECKPOINT] = str(checkpoint)
    before = runs.read_record(checkpoint.parent.parent).get("overrides", [])
    before = [override for override in before if _name(override) != "run_name"]  # the folder may have a new name
    given = {_name(argument) for argument in arguments}
    return [override for override in before if _name(override) not in given] + arguments


def _checkpoint_to_resume(config: Any) -> Path | None:
    if config.resume is None:
        return None
    if config.resume == "auto" and _RESUME_CHECKPOINT in os.environ:
        return Path(os.environ[_RESUME_CHECKPOINT])
    output_dir = Path(config.output_dir)
    if config.resume != "auto":
        checkpoint = find_checkpoint(config.resume, output_dir, last=True, setting="resume").resolve()
    elif config.run_name is not None:
        checkpoint = output_dir / config.run_name / runs.LAST
        if not checkpoint.exists():
            return None  # a job that always sets resume=auto starts for the first time
    else:
        if "TORCHELASTIC_RUN_ID" in os.environ:  # its processes could choose different runs
            raise InputError("resume=auto: under torchrun add run_name=NAME, or give resume=PATH")
        unfinished = runs.newest_unfinished_run(output_dir)
        if unfinished is None:
            raise InputError(f"resume=auto: no unfinished run in {output_dir}; give run_name=NAME, or resume=PATH")
        checkpoint = unfinished / runs.LAST
    folder = checkpoint.parent.parent
    if not (folder / runs.RECORD).is_file():
        raise InputError(f"resume={config.resume}: {checkpoint} is not in a run folder; give a checkpoint of a run")
    if config.run_name not in (None, folder.name):
        raise InputError(f"run_name={config.run_name}: resume={config.resume} continues {folder.name}; leave it out")
    return checkpoint


def _name(override: str) -> str:
    return override.split("=")[0].lstrip("+")


if __name__ == "__main__":
    main()
