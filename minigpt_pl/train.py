"""python -m minigpt_pl.train: train a model into a run folder."""

import os
import sys
from pathlib import Path
from typing import Any

from minigpt_pl import runs
from minigpt_pl.cli import app
from minigpt_pl.config import TrainConfig
from minigpt_pl.errors import InputError


def main() -> None:
    app.run("train", train, prepare=_settings_of_the_run)


def train(config: TrainConfig) -> None:
    """Train as the settings say, from the start or (`resume`) from a checkpoint."""
    if app.in_sweep():
        _refuse_in_sweep(config)

    from minigpt_pl.training.callbacks import Interrupted  # Lightning: three seconds, once the settings are right
    from minigpt_pl.training.fit import fit, rank_zero_only

    name_prefix = app.group_choice("experiment") or app.group_choice("data")
    overrides = [override for override in app.overrides_given() if _name(override) != "resume"]
    try:
        fit(config, name_prefix, overrides, _checkpoint_to_resume(config))
    except Interrupted:
        # Only the first process reports it: a launcher would kill the others' siblings for an exit code.
        sys.exit(130 if rank_zero_only.rank == 0 else 0)


def _refuse_in_sweep(config: TrainConfig) -> None:
    refused = {
        f"trainer.devices={config.trainer.devices}: each process would start the whole sweep again": (
            config.trainer.devices > 1
        ),
        f"resume={config.resume}: each job would go on with the same run": config.resume is not None,
        f"run_name={config.run_name}: is the name of one run": (f"run_name={config.run_name}" in sys.argv),
        "find_learning_rate=true: each job would draw the same picture": config.find_learning_rate,
    }
    if problems := [f"{problem}; in a sweep (-m) leave it out" for problem, found in refused.items() if found]:
        raise InputError(*problems)


def _settings_of_the_run(arguments: list[str]) -> list[str]:
    """The command line of a resumed run: the run's own settings, then what this one says instead."""
    place = [argument for argument in arguments if _name(argument) in ("resume", "run_name", "output_dir")]
    if not any(argument.startswith("resume=") for argument in place) or {"-m", "--multirun"} & set(sys.argv):
        return arguments
    config = app.to_settings(app.compose("train", place))
    checkpoint = _checkpoint_to_resume(config)
    if checkpoint is None:
        return arguments
    os.environ[_RESUMED] = str(checkpoint)
    before = runs.read_record(checkpoint.parent.parent).get("overrides", [])
    said_now = {_name(argument) for argument in arguments}
    return [override for override in before if _name(override) not in said_now] + arguments


_RESUMED = "MINIGPT_RESUMED"  # tells the processes that Lightning starts which run the first one chose


def _checkpoint_to_resume(config: Any) -> Path | None:
    if config.resume is None:
        return None
    if config.resume == "auto" and _RESUMED in os.environ:
        return Path(os.environ[_RESUMED])
    output_dir = Path(config.output_dir)
    if config.resume != "auto":
        checkpoint = runs.find_checkpoint(config.resume, output_dir, last=True, setting="resume").resolve()
    elif config.run_name is not None:
        checkpoint = output_dir / config.run_name / runs.LAST
        if not checkpoint.exists():
            return None  # the first start of a job that says resume=auto each time
    else:
        if "TORCHELASTIC_RUN_ID" in os.environ:  # its processes start at once, and could choose different ones
            raise InputError("resume=auto: under torchrun give run_name=NAME with it, or resume=PATH")
        folder = runs.newest_unfinished_run(output_dir)
        if folder is None:
            raise InputError(f"resume=auto: no unfinished run in {output_dir}; give run_name=NAME, or resume=PATH")
        checkpoint = folder / runs.LAST
    folder = checkpoint.parent.parent
    if not (folder / runs.RECORD).is_file():
        raise InputError(
            f"resume={config.resume}: {checkpoint} is not in a run folder; give one that lies in its run's"
        )
    if config.run_name not in (None, folder.name):
        raise InputError(f"run_name={config.run_name}: resume={config.resume} goes on with {folder.name}; leave it out")
    return checkpoint


def _name(override: str) -> str:
    return override.split("=")[0].lstrip("+")


if __name__ == "__main__":
    main()
