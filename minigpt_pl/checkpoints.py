"""Checkpoints: find the file that a user means, and read it."""

import textwrap
from pathlib import Path
from typing import Any

import torch

from minigpt_pl import runs
from minigpt_pl.errors import InputError
from minigpt_pl.model import MiniGPT


def find_checkpoint(path: str | Path, output_dir: Path | None = None, last: bool = False, setting: str = "run") -> Path:
    """Find the checkpoint of a path. A run folder gives its best checkpoint, else its last.

    Args:
        path: a checkpoint, a run folder, or the name of a run in `output_dir`.
        last: always take the last checkpoint of a run folder.
        setting: name of the setting, for the error message.

    Raises:
        InputError: there is none.
    """
    places = [Path(path)] if output_dir is None else [output_dir / path, Path(path)]
    for place in places:
        if place.is_file():
            return place
        for name in ("last.ckpt",) if last else ("best.ckpt", "last.ckpt"):
            if (place / "checkpoints" / name).is_file():
                return place / "checkpoints" / name
    reason = "holds no checkpoint" if any(place.is_dir() for place in places) else "no such run folder or checkpoint"
    raise InputError(f"{setting}={path}: {reason}; give the folder of a trained run, or the path of a checkpoint")


def choose_checkpoint(output_dir: Path, run: str | None) -> Path:
    """The checkpoint of a run, as in `find_checkpoint`. If `run` is None, that of the newest finished run.

    Raises:
        InputError: there is none.
    """
    if run is not None:
        return find_checkpoint(run, output_dir)
    finished = runs.runs_by_status(output_dir, "finished")
    if not finished:
        raise InputError(f"output_dir={output_dir}: holds no finished run; train one, or give run=FOLDER")
    return find_checkpoint(finished[0])


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read the contents of a checkpoint, on the CPU and memory-mapped.

    Raises:
        InputError: the file is damaged, or not a checkpoint of this project.
    """
    try:
        contents: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # zip, pickle or runtime errors, depending on the damage
        reason = textwrap.shorten(str(error).splitlines()[0], 120, placeholder=" ...")
        raise InputError(f"checkpoint={path}: cannot be read ({reason}); it is damaged, or not a checkpoint") from error
    settings = contents.get("hyper_parameters") if isinstance(contents, dict) else None
    if isinstance(contents, dict) and isinstance(settings, dict) and isinstance(settings.get("model"), dict):
        return contents
    raise InputError(f"checkpoint={path}: not a checkpoint of minigpt_pl; give one from a run folder")


def load_network(path: Path) -> tuple[MiniGPT, int | None]:
    """Load the network of a checkpoint, and the id of its end token; None if it was trained without one.

    Only the weights are read from disk, not the optimizer state.

    Raises:
        InputError: the file is damaged, or not a checkpoint of this project.
    """
    contents = read_checkpoint(path)
    try:
        network = MiniGPT(**contents["hyper_parameters"]["model"])
        network.load_state_dict({name.removeprefix("model."): w for name, w in contents["state_dict"].items()})
    except (TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise InputError(f"checkpoint={path}: not a checkpoint of minigpt_pl; give one from a run folder") from error
    return network, contents["hyper_parameters"].get("end_id")
