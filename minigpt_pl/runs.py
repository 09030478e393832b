"""Run folders: their names, their record, their checkpoints. Knows PyTorch but not Lightning.

outputs/<run name>/
    run.json         the record: status, command, source of the text, versions
    config.yaml      every setting
    tokenizer.json   the words
    checkpoints/     best.ckpt, last.ckpt
    metrics.csv  samples.jsonl  loss.png
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from minigpt_pl.errors import InputError
from minigpt_pl.model import MiniGPT

RECORD = "run.json"
IMPORTED_FROM = "imported_from"  # in the record of a run that `convert` made: the Keras file


def write_aside(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old one or the new one, never half of it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def make_run_folder(output_dir: Path, run_name: str | None, prefix: str, begin_again: bool = False) -> Path:
    """Create a run's folder.

    Args:
        run_name: its name; None: `<prefix>-001`, or the next free number.
        begin_again: take a folder that exists but holds no checkpoint: a run that ended before its first.

    Raises:
        InputError: a run of that name exists.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    if run_name is not None:
        folder = output_dir / run_name
        try:
            folder.mkdir()  # fails if it exists, so of two runs that start together one is refused
        except FileExistsError as error:
            if not begin_again or (folder / "checkpoints" / "last.ckpt").exists():
                raise InputError(
                    f"run_name={run_name}: {folder} exists; add resume=auto to go on with it, or take another name"
                ) from error
        return folder
    number = 1
    while True:
        folder = output_dir / f"{prefix}-{number:03d}"
        try:
            folder.mkdir()  # so two runs that start together get two folders
            return folder
        except FileExistsError:
            number += 1


def read_record(folder: Path) -> dict[str, Any]:
    """A run's record; empty if the folder has none."""
    path = folder / RECORD
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); restore it or remove the run") from error


def update_record(folder: Path, **values: Any) -> None:
    """Add values to a run's record, and the time (seconds since 1970, UTC)."""
    record = read_record(folder) | values | {"updated": time.time()}
    write_aside(folder / RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def newest_run(output_dir: Path, *statuses: str) -> Path | None:
    """The run of one of these statuses whose record changed last; None if there is none."""
    folders = [path.parent for path in output_dir.glob(f"*/{RECORD}")]
    candidates = [folder for folder in folders if read_record(folder).get("status") in statuses]
    return max(candidates, key=lambda folder: read_record(folder)["updated"], default=None)


def find_checkpoint(path: Path, *names: str) -> Path:
    """The checkpoint that a path stands for: itself, or the first of `names` in a run folder.

    Args:
        names: as they stand in `checkpoints/`; without any: the best, else the last.

    Raises:
        InputError: there is none.
    """
    if path.is_file():
        return path
    if not path.exists():
        raise InputError(f"{path}: no such run folder or checkpoint")
    for name in names or ("best.ckpt", "last.ckpt"):
        checkpoint = path / "checkpoints" / name
        if checkpoint.is_file():
            return checkpoint
    raise InputError(f"{path}: holds no checkpoint; give a run folder that was trained, or a checkpoint's path")


def choose_checkpoint(output_dir: Path, run: str | None) -> Path:
    """The checkpoint of a run that a person named: its best, else its last.

    Args:
        run: a run folder, its name inside `output_dir`, or a checkpoint; None: the newest finished run.

    Raises:
        InputError: there is none.
    """
    if run is not None:
        named = output_dir / run
        return find_checkpoint(named if named.is_dir() else Path(run))
    newest = newest_run(output_dir, "finished")
    if newest is None:
        raise InputError(f"output_dir={output_dir}: no finished run there; train one, or give run=FOLDER")
    return find_checkpoint(newest)


def load_network(checkpoint: Path) -> MiniGPT:
    """The network of a checkpoint; nothing else of the file is read from the disk.

    Raises:
        InputError: the file is damaged, or not a checkpoint of this project.
    """
    contents = read_checkpoint(checkpoint)
    try:
        network = MiniGPT(**contents["hyper_parameters"]["model"])
        network.load_state_dict(
            {name.removeprefix("model."): weight for name, weight in contents["state_dict"].items()}
        )
    except (TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise InputError(
            f"checkpoint={checkpoint}: not a checkpoint of minigpt_pl; give one from a run folder"
        ) from error
    return network


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's contents, on the CPU, memory-mapped.

    Raises:
        InputError: the file is damaged, or not a checkpoint of this project.
    """
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # zip, pickle and runtime errors, by where the damage is
        reason = str(error).splitlines()[0][:120]
        raise InputError(f"checkpoint={path}: cannot be read ({reason}); it is damaged or no checkpoint") from error
    settings = contents.get("hyper_parameters") if isinstance(contents, dict) else None
    if not isinstance(settings, dict) or not isinstance(settings.get("model"), dict):
        raise InputError(f"checkpoint={path}: not a checkpoint of minigpt_pl; give one from a run folder")
    return contents
