"""python -m minigpt_pl.train: train a model and write a run folder."""

import os
import sys
from pathlib import Path

from minigpt_pl import runs, signals
from minigpt_pl.config import TrainConfig
from minigpt_pl.errors import InputError

# The first process sets this environment variable. Processes that Lightning starts then resume the same run.
_RESUME_FROM = "MINIGPT_RESUME_FROM"


def main() -> None:
    signals.set_handlers(dict.fromkeys(signals.SIGNALS, signals.exit_at_once))
    from minigpt_pl.cli import app  # after the handlers, because a signal can come while Python imports

    app.run("train", train, prepare=_add_settings_of_the_run)


def train(config: TrainConfig) -> None:
    """Train with these settings: from the start, or from a checkpoint if `resume` is set."""
    from hydra.core.hydra_config import HydraConfig

    from minigpt_pl.cli import app

    if app.in_sweep():
        _refuse_in_sweep(config)

    from minigpt_pl.training.fit import fit  # Lightning: import it after the checks, it takes 3 s
    from minigpt_pl.training.trainer import is_first_process

    hydra = HydraConfig.get()
    name_prefix = hydra.runtime.choices.get("experiment") or hydra.runtime.choices.get("data") or "run"
    overrides = [override for override in hydra.overrides.task if _name(override) != "resume"]
    resume_from = os.environ.get(_RESUME_FROM) if config.resume is not None else None
    try:
        fit(config, name_prefix, overrides, Path(resume_from) if resume_from else None)
    except signals.Interrupted as interrupted:
        # In the other processes, a non-zero exit code would make torchrun kill all processes.
        sys.exit(128 + interrupted.number if is_first_process() else 0)


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
    from minigpt_pl.cli import app
    from minigpt_pl.training import resume

    where = [argument for argument in arguments if _name(argument) in ("resume", "run_name", "output_dir")]
    if not any(_name(argument) == "resume" for argument in where) or {"-m", "--multirun"} & {*sys.argv}:
        return arguments
    config = app.to_settings(app.compose("train", where))
    if config.resume is None:
        return arguments
    if _RESUME_FROM not in os.environ:
        os.environ[_RESUME_FROM] = str(resume.choose(Path(config.output_dir), config.run_name, config.resume) or "")
    if not os.environ[_RESUME_FROM]:
        return arguments
    path = Path(os.environ[_RESUME_FROM])
    before = runs.read_record(path if path.is_dir() else path.parent.parent).get("overrides", [])
    before = [override for override in before if _name(override) != "run_name"]  # the folder may have a new name
    given = {_name(argument) for argument in arguments}
    return [override for override in before if _name(override) not in given] + arguments


def _name(override: str) -> str:
    return override.split("=")[0].lstrip("+")


if __name__ == "__main__":
    main()
