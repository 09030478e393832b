"""python -m minigpt_pl.train: train a model and write a run folder."""

import os
import sys
from pathlib import Path

from minigpt_pl import runs, signals
from minigpt_pl.config import TrainConfig
from minigpt_pl.errors import InputError


def main() -> None:
    signals.set_handlers(dict.fromkeys(signals.SIGNALS, signals.exit_at_once))
    from minigpt_pl.training import cluster  # after the handlers, because a signal can come while Python imports

    signals.before_exit = cluster.end_at_once
    from minigpt_pl.cli import app, errors

    errors.claims_error = cluster.claims_error
    with cluster.left_together():
        app.run("train", train, prepare=_add_settings_of_the_run)


def train(config: TrainConfig) -> None:
    """Train with these settings: from the start, or from a checkpoint if `resume` is set."""
    from hydra.core.hydra_config import HydraConfig

    from minigpt_pl.cli import app
    from minigpt_pl.training import cluster

    if app.in_sweep():
        _refuse_in_sweep(config)
    cluster.join().check(config.trainer)
    from minigpt_pl.training.fit import fit  # Lightning: import it after the checks, it takes 3 s

    hydra = HydraConfig.get()
    name_prefix = hydra.runtime.choices.get("experiment") or hydra.runtime.choices.get("data") or "run"
    overrides = [override for override in hydra.overrides.task if _name(override) != "resume"]
    try:
        fit(config, name_prefix, overrides, None if config.resume is None else Path(config.resume))
    except signals.Interrupted as interrupted:
        signals.set_handlers(dict.fromkeys(signals.SIGNALS, signals.ignore))  # `scontrol requeue` sends SIGTERM
        sys.exit(cluster.join().requeue(interrupted.number, config.cluster.requeue))


def _refuse_in_sweep(config: TrainConfig) -> None:
    problems = []
    if (config.trainer.devices or 1) > 1:
        problems.append(f"trainer.devices={config.trainer.devices}: each process would start the whole sweep again")
    if f"run_name={config.run_name}" in sys.argv:
        problems.append(f"run_name={config.run_name}: all jobs would have the same name")
    if config.find_learning_rate:
        problems.append("find_learning_rate=true: all jobs would draw the same figure")
    if problems:
        raise InputError(*(f"{problem}; leave it out of a sweep (-m)" for problem in problems))


def _add_settings_of_the_run(arguments: list[str]) -> list[str]:
    """With `resume`, add the run's own settings, except those given again, and the path of the checkpoint.

    In a SLURM job, the run has the name of the job if it has no other name. If SLURM starts the job again, it continues
    the run.
    """
    from minigpt_pl.training import cluster

    group = cluster.join()
    if {"-m", "--multirun"} & {*sys.argv}:
        if group.world_size > 1:
            raise InputError("-m: a sweep needs one process; start one job per combination (docs/cluster.md)")
        if resumed := [argument for argument in arguments if _name(argument) == "resume"]:
            raise InputError(f"{resumed[0]}: continues one run, and -m starts several; give {resumed[0]} alone")
        return arguments
    given = {_name(argument) for argument in arguments}
    job = cluster.slurm_job()
    restarts = {os.environ.get(name, "0") for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")}
    started_again = group.decide("started again", lambda: restarts != {"0"})
    in_job = job is not None and not given & {"resume", "find_learning_rate"}
    has_name_of_job = in_job and "run_name" not in given
    if has_name_of_job:
        arguments = [*arguments, f"run_name=slurm-{job}"]
    goes_on = has_name_of_job or (in_job and started_again)
    if not goes_on and "resume" not in given:
        return arguments
    path, before = group.decide("resume", lambda: _choose(arguments, goes_on))
    task = {override for override in _without_name(arguments) if not override.startswith("hydra.")}
    if path is not None and has_name_of_job and not started_again and task != set(before):
        raise InputError(f"run_name=slurm-{job}: another command of this job has this run; give each one its own name")
    arguments = [argument for argument in arguments if _name(argument) != "resume"]
    if path is None:
        return arguments
    quoted = path.replace("'", r"\'")
    return [override for override in before if _name(override) not in given] + arguments + [f"resume='{quoted}'"]


def _choose(arguments: list[str], goes_on: bool) -> tuple[str | None, list[str]]:
    """What to continue: a checkpoint or a run folder, and the settings of its run. None for a new run."""
    from minigpt_pl.cli import app
    from minigpt_pl.training import resume

    where = [argument for argument in arguments if _name(argument) in ("resume", "run_name", "output_dir")]
    config = app.to_settings(app.compose("train", where))
    wanted = "auto" if goes_on else config.resume
    path = None if wanted is None else resume.choose(Path(config.output_dir), config.run_name, wanted)
    if path is None:
        return None, []
    folder = path if (path / runs.RECORD).is_file() else path.parent.parent  # a sharded checkpoint is a folder too
    return str(path), _without_name(runs.read_record(folder).get("overrides", []))  # it may have a new name


def _without_name(overrides: list[str]) -> list[str]:
    return [override for override in overrides if _name(override) != "run_name"]


def _name(override: str) -> str:
    return override.split("=")[0].lstrip("+")


if __name__ == "__main__":
    main()
