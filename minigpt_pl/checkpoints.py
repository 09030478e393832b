"""Checkpoints: find the one that a user means, check that it is not damaged, and read it."""

import difflib
import errno
import logging
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import torch

from minigpt_pl import runs
from minigpt_pl.errors import InputError
from minigpt_pl.files import file_crc32, remove
from minigpt_pl.model import MiniGPT

log = logging.getLogger(__name__)

MAX_NAMES = 8  # runs that an error lists, the newest first


class DamagedError(InputError):
    """The contents of a checkpoint are damaged."""


def find_checkpoint(path: str | Path, output_dir: Path | None = None, setting: str = "run") -> Path:
    """Find the checkpoint of a path. A run folder gives its best checkpoint, else its newest.

    Args:
        path: a checkpoint, a run folder, or the name of a run in `output_dir`.
        setting: name of the setting, for the error message.

    Raises:
        InputError: there is none.
    """
    places = [Path(path)] if output_dir is None else [output_dir / path, Path(path)]
    for place in places:
        if place.is_file() or (place / runs.META).is_file():
            return place
        if found := runs.checkpoints_of(place):
            return found[-1] if found[-1].name == "best.ckpt" else found[0]
    reason = "holds no checkpoint" if any(place.is_dir() for place in places) else "no such run folder or checkpoint"
    folders = runs.runs_by_status(output_dir) if output_dir is not None else []
    names = [folder.name for folder in folders if runs.checkpoints_of(folder)]
    remedy = f"give a run, such as {', '.join(names[:MAX_NAMES])}"
    if not names:
        remedy = f"go to the folder in which you trained (this is {Path.cwd()}), give the folder of a trained run"
    similar = "".join(f"did you mean {name}? " for name in difflib.get_close_matches(str(path), names, 1))
    raise InputError(f"{setting}={path}: {reason}; {similar}{remedy}, or the path of a checkpoint")


def choose_checkpoint(output_dir: Path, run: str | None) -> Path:
    """The checkpoint of a run, as in `find_checkpoint`. If `run` is None, that of the newest finished run.

    Raises:
        InputError: there is none.
    """
    if run is not None:
        return find_checkpoint(run, output_dir)
    folders = [folder for folder in runs.runs_by_status(output_dir) if runs.checkpoints_of(folder)]
    newest = next((folder for folder in folders if runs.read_record(folder).get("status") == "finished"), None)
    if newest is not None:
        return find_checkpoint(newest)
    remedy = "train one, go to the folder in which you trained, or give run=FOLDER"
    if folders:
        remedy = f"finish {folders[0].name} with train resume={folders[0].name}, or give run={folders[0].name}"
    raise InputError(f"output_dir={output_dir}: holds no finished run ({output_dir.resolve()}); {remedy}")


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run that is not damaged; None if the run has no checkpoint yet.

    If a newer one is damaged, it is renamed to NAME.damaged, with a warning.

    Raises:
        InputError: all checkpoints are damaged. Nothing is renamed.
    """
    damaged: dict[Path, str] = {}
    for path in runs.checkpoints_of(folder):
        try:
            read_checkpoint(path)
        except DamagedError as error:
            damaged[path] = str(error)
            continue
        for other, problem in damaged.items():
            log.warning("%s. It is kept as %s.damaged, and %s is used.", problem, other.name, path.name)
            remove(aside := other.with_name(f"{other.name}.damaged"))
            other.replace(aside)
        return path
    if damaged:
        names = ", ".join(path.name for path in damaged)
        raise InputError(f"{folder}: all its checkpoints are damaged (tried {names}); restore one, or start a new run")
    return None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read the contents of a checkpoint, on the CPU and memory-mapped, after a test of all its checksums.

    Those of a sharded checkpoint have no weights and no moments. `read_whole_checkpoint` reads them too.

    Raises:
        InputError: the file cannot be read.
        DamagedError: the file is damaged, or not a checkpoint of this project.
    """
    sharded = path.is_dir()
    try:
        if sharded and not (path / runs.META).is_file():
            raise zipfile.BadZipFile(f"{runs.META} is missing")
        file = path / runs.META if sharded else path
        with zipfile.ZipFile(file) as archive:
            if (record := archive.testzip()) is not None:  # PyTorch does not compare the checksums
                raise zipfile.BadZipFile(f"wrong checksum of {record}")
        contents: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if sharded:
            _check_parts(path, contents["files"])
    except OSError as error:
        kind = DamagedError if error.errno == errno.EIO else InputError  # EIO: the disk is damaged
        raise kind(f"checkpoint={path}: cannot be read ({error.strerror}); give another checkpoint") from error
    except Exception as error:  # zip, pickle or runtime errors, depending on the damage
        reason = textwrap.shorten(str(error) or type(error).__name__, 120, placeholder=" ...")
        remedy = "it is damaged, or not a checkpoint; give another one"
        raise DamagedError(f"checkpoint={path}: cannot be read ({reason}); {remedy}") from error
    settings = contents.get("hyper_parameters") if isinstance(contents, dict) else None
    if isinstance(contents, dict) and isinstance(settings, dict) and isinstance(settings.get("model"), dict):
        return contents
    raise DamagedError(f"checkpoint={path}: not a checkpoint of minigpt_pl; give one from a run folder")


def _check_parts(folder: Path, checksums: dict[str, tuple[int, int]]) -> None:
    for name, (size, crc32) in checksums.items():
        path = folder / name
        if not path.is_file():
            raise zipfile.BadZipFile(f"{name} is missing")
        if path.stat().st_size != size or file_crc32(path) != crc32:
            raise zipfile.BadZipFile(f"wrong checksum of {name}")


def read_whole_checkpoint(path: Path, with_moments: bool = True) -> dict[str, Any]:
    """As `read_checkpoint`. The contents of a sharded checkpoint are those of a file.

    Args:
        with_moments: if it is sharded, also read the moments of the optimizer.
    """
    contents = read_checkpoint(path)
    if path.is_dir():
        from minigpt_pl.sharded_checkpoints import join, read_whole  # takes half a second

        join(contents, read_whole(path, with_moments))
    return contents


def load_network(path: Path) -> tuple[MiniGPT, int | None, str | None]:
    """Load the network of a checkpoint. The optimizer state is not loaded.

    Returns:
        The network; the id of its end token, None if it was trained without one; and the fingerprint of its tokenizer,
        None in checkpoints of older versions.

    Raises:
        InputError: the file is damaged, or not a checkpoint of this project.
    """
    contents = read_whole_checkpoint(path, with_moments=False)
    try:
        network = MiniGPT(**contents["hyper_parameters"]["model"])
        network.load_state_dict({name.removeprefix("model."): w for name, w in contents["state_dict"].items()})
    except (TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise InputError(f"checkpoint={path}: not a checkpoint of minigpt_pl; give one from a run folder") from error
    fingerprint = contents.get("TextDataModule", {}).get("tokenizer")
    return network, contents["hyper_parameters"].get("end_id"), fingerprint
