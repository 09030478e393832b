"""Chooses the run that `resume` continues, and its checkpoint."""

import logging
import sys
from math import inf
from pathlib import Path
from typing import Any

from minigpt_pl import runs
from minigpt_pl.checkpoints import find_checkpoint, newest_checkpoint, read_checkpoint
from minigpt_pl.errors import InputError
from minigpt_pl.files import remove_temporaries
from minigpt_pl.training.run_record import finish

log = logging.getLogger(__name__)


def choose(output_dir: Path, run_name: str | None, resume: str) -> Path | None:
    """Choose what to continue.

    Args:
        resume: a run folder or its name, the path of a checkpoint, or "auto". "auto" means the run `run_name`, or the
            newest run that is not finished and not in training.

    Returns:
        A checkpoint; or the folder of a run that was killed before its first checkpoint; or None if "auto" finds no run
        to continue, so a new run must start.

    Raises:
        InputError: there is no such run, or all its checkpoints are damaged.
        SystemExit: "auto" finds runs, and all of them are finished or in training.
    """
    found: Path | None
    if resume != "auto":
        found = _named(output_dir, resume)
    elif run_name is not None:
        folder = output_dir / run_name
        found = (newest_checkpoint(folder) or folder) if (folder / runs.RECORD).is_file() else None
    else:
        found = _newest_unfinished(output_dir)
    if found is None:
        return None
    folder = found if (found / runs.RECORD).is_file() else found.parent.parent
    if not (folder / runs.RECORD).is_file():
        raise InputError(f"resume={resume}: {found} is not in a run folder; give a checkpoint of a run")
    if run_name not in (None, folder.name):
        raise InputError(f"run_name={run_name}: resume={resume} continues {folder.name}; leave it out")
    return found


def _named(output_dir: Path, resume: str) -> Path:
    for folder in (output_dir / resume, Path(resume)):
        if (folder / runs.RECORD).is_file():
            return (newest_checkpoint(folder) or folder).resolve()
    return find_checkpoint(resume, output_dir, setting="resume").resolve()


def _newest_unfinished(output_dir: Path) -> Path | None:
    problem: InputError | None = None
    for folder in runs.runs_by_status(output_dir, "interrupted", "failed", "running"):
        try:
            runs.lock(folder).release()
        except InputError:  # in training
            continue
        try:
            checkpoint = newest_checkpoint(folder)
        except InputError as error:  # all its checkpoints are damaged
            log.warning("%s. This run is left out.", error)
            problem = error
            continue
        if checkpoint is None:
            return folder
        contents = read_checkpoint(checkpoint)
        if not is_complete(contents):
            return checkpoint
        remove_temporaries(folder, of_all_machines=True)
        finish(folder, "finished", contents["epoch"] + 1, contents["global_step"])  # it was killed before this entry
    if problem is not None:
        raise problem
    if any(output_dir.glob(f"*/{runs.RECORD}")):
        log.info("resume=auto: nothing is left to do in %s. To train a run longer, give resume=NAME.", output_dir)
        sys.exit()  # with 0: a job script must not try again
    log.info("resume=auto: there is no run in %s yet, so a new run starts.", output_dir)
    return None


def is_interrupted(contents: dict[str, Any]) -> bool:
    """Whether a signal has interrupted a validation or texts, so that the run of this checkpoint must repeat them."""
    states = contents.get("callbacks", {}).values()
    return any(state.get("validating") or state.get("epoch_without_texts") for state in states)


def is_complete(contents: dict[str, Any]) -> bool:
    """Whether the run of this checkpoint has nothing left to do: it has done all its steps, or has stopped early."""
    states = contents.get("callbacks", {}).values()
    stopped_early = any(state.get("wait_count", 0) >= state.get("patience", inf) for state in states)
    all_steps = int(contents["global_step"]) >= int(contents["hyper_parameters"]["total_steps"])
    return (stopped_early or all_steps) and not is_interrupted(contents)
