"""python -m minigpt_pl.train: train a model into a run folder."""

import sys
from pathlib import Path

from minigpt_pl import command_line, runs
from minigpt_pl.config import TrainConfig
from minigpt_pl.errors import InputError


def main() -> None:
    command_line.run("train", TrainConfig, train)


def train(config: TrainConfig) -> None:
    """Train as the settings say, from the start or (`resume`) from a checkpoint."""
    if command_line.in_sweep() and config.trainer.devices > 1:
        raise InputError(
            f"trainer.devices={config.trainer.devices}: in a sweep (-m) each process would start the whole sweep again;"
            " start the jobs one by one"
        )
    overrides = command_line.overrides_given()
    checkpoint = _checkpoint_to_resume(config)
    if checkpoint is not None:
        before = runs.read_record(checkpoint.parent.parent).get("overrides", [])
        overrides = _merge_overrides(before, overrides)
        config = command_line.to_settings(command_line.compose("train", overrides))

    from minigpt_pl.training.callbacks import (
        Interrupted,
    )  # Lightning: three seconds, once the settings are right
    from minigpt_pl.training.fit import fit, rank_zero_only

    name_prefix = command_line.group_choice("experiment") or command_line.group_choice("data")
    try:
        fit(config, name_prefix, overrides, checkpoint)
    except Interrupted:
        # Only the first process reports it: a launcher would kill the others' siblings for an exit code.
        sys.exit(130 if rank_zero_only.rank == 0 else 0)


def _checkpoint_to_resume(config: TrainConfig) -> Path | None:
    if config.resume is None:
        return None
    if config.resume != "auto":
        checkpoint = runs.find_checkpoint(Path(config.resume), "last.ckpt")
    elif config.run_name is not None:
        checkpoint = Path(config.output_dir) / config.run_name / "checkpoints" / "last.ckpt"
        if not checkpoint.exists():
            return None  # the first start of a job that says resume=auto each time
    else:
        folder = runs.newest_run(Path(config.output_dir), "interrupted", "failed", "running")
        if folder is None:
            raise InputError(
                f"resume=auto: no unfinished run in {config.output_dir}; give run_name=NAME, or resume=PATH"
            )
        checkpoint = runs.find_checkpoint(folder, "last.ckpt")
    if not (checkpoint.parent.parent / runs.RECORD).is_file():
        raise InputError(
            f"resume={config.resume}: {checkpoint} is not in a run folder; give one that lies in its run's"
        )
    return checkpoint


def _merge_overrides(before: list[str], now: list[str]) -> list[str]:
    """The run's own settings, with what this command line says instead. `resume` is not the run's."""

    def name(override: str) -> str:
        return override.split("=")[0].lstrip("+")

    said_now = {name(override) for override in now}
    return [o for o in before if name(o) not in said_now and name(o) != "resume"] + now


if __name__ == "__main__":
    main()
