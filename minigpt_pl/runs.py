"""Run folders: their names, their record, their checkpoints. Knows PyTorch but not Lightning.

outputs/<run name>/
    run.json         the record: status, command, source of the text, versions
    config.yaml      every setting
    tokenizer.json   the words
    checkpoints/     best.ckpt, last.ckpt
    metrics.csv  samples.jsonl  loss.png
    evaluation.json  evaluation.png
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from minigpt_pl.config import DataConfig, ImdbConfig, TextConfig
from minigpt_pl.errors import InputError
from minigpt_pl.files import make_folder, write_text
from minigpt_pl.model import MiniGPT

RECORD = "run.json"
LAST = Path("checkpoints", "last.ckpt")
IMPORTED_FROM = "imported_from"  # in the record of a run that `convert` made: the Keras file


def make_run_folder(output_dir: Path, run_name: str | None, prefix: str, begin_again: bool = False) -> Path:
    """Create a run's folder.

    Args:
        run_name: its name; None: `<prefix>-001`, or the next free number.
        begin_again: take a folder that exists but holds no checkpoint: a run that ended before its first.

    Raises:
        InputError: a run of that name exists.
    """
    make_folder(output_dir, "output_dir")
    if run_name is not None:
        folder = output_dir / run_name
        try:
            folder.mkdir()  # fails if it exists, so of two runs that start together one is refused
        except FileExistsError as error:
            if not begin_again or not folder.is_dir() or (folder / LAST).exists():
                raise InputError(
                    f"run_name={run_name}: {folder} exists; add resume=auto to go on with it, or take another name"
                ) from error
        except OSError as error:  # too long, or not to be written
            raise InputError(f"run_name={run_name}: cannot be made ({error.strerror}); take another name") from error
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


def read_settings(folder: Path) -> dict[str, Any]:
    """A run's config.yaml: values, and groups of values, by name.

    Raises:
        InputError: there is none, or it is not one of ours.
    """
    path = folder / "config.yaml"
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); a run folder keeps its settings there") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not the settings of a run; restore it, or train again") from error
    if not isinstance(settings, dict) or not all(isinstance(settings.get(name), dict) for name in ("model", "data")):
        raise InputError(f"{path}: not the settings of a run; restore it, or train again")
    return settings


def read_data_settings(folder: Path) -> tuple[DataConfig, int]:
    """Of a run's settings those of its text, and of its vocabulary's size: what `open_corpus` takes.

    Raises:
        InputError: as `read_settings`.
    """
    settings = read_settings(folder)
    try:
        kind = TextConfig if "path" in settings["data"] else ImdbConfig
        return kind(**settings["data"]), settings["model"]["vocab_size"]
    except (TypeError, KeyError) as error:
        raise InputError(f"{folder}/config.yaml: not the settings of a run; restore it, or train again") from error


def update_record(folder: Path, **values: Any) -> None:
    """Add values to a run's record, and the time (seconds since 1970, UTC)."""
    record = read_record(folder) | values | {"updated": time.time()}
    write_text(folder / RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def hold(folder: Path) -> Any:
    """Keep a run for this process until the returned lock is released, or the process ends.

    Raises:
        InputError: another process has it.
    """
    from filelock import FileLock, Timeout  # comes with torch

    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(f"run_name={folder.name}: {folder} is being trained by another process") from error
    return lock


def newest_unfinished_run(output_dir: Path) -> Path | None:
    """The run whose record changed last, of those with a checkpoint to go on with that nobody is training."""
    for folder in _newest_first(output_dir, "interrupted", "failed", "running"):
        if (folder / LAST).is_file():
            try:
                hold(folder).release()
            except InputError:
                continue
            return folder
    return None


def _newest_first(output_dir: Path, *statuses: str) -> list[Path]:
    records = {path.parent: read_record(path.parent) for path in output_dir.glob(f"*/{RECORD}")}
    folders = [folder for folder, record in records.items() if record.get("status") in statuses]
    return sorted(folders, key=lambda folder: records[folder]["updated"], reverse=True)


def find_checkpoint(path: str | Path, output_dir: Path | None = None, last: bool = False, setting: str = "run") -> Path:
    """The checkpoint that a path stands for: itself; or of a run folder the best, else the last.

    Args:
        path: a checkpoint, a run folder, or the name of one inside `output_dir`.
        last: of a run folder always the last.
        setting: named in the error.

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
    found = "holds no checkpoint" if any(place.is_dir() for place in places) else "no such run folder or checkpoint"
    raise InputError(f"{setting}={path}: {found}; give a trained run's folder, or a checkpoint's path")


def choose_checkpoint(output_dir: Path, run: str | None) -> Path:
    """The checkpoint of a run that a person named (as in `find_checkpoint`); None: of the newest finished run.

    Raises:
        InputError: there is none.
    """
    if run is not None:
        return find_checkpoint(run, output_dir)
    finished = [folder for folder in _newest_first(output_dir, "finished") if (folder / LAST).is_file()]
    if not finished:
        raise InputError(f"output_dir={output_dir}: no finished run there; train one, or give run=FOLDER")
    return find_checkpoint(finished[0])


def load_network(checkpoint: Path) -> tuple[MiniGPT, int | None]:
    """The network of a checkpoint, and the id of its end token (None: it learned no end of a text).

    Nothing else of the file is read from the disk.

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
    return network, contents["hyper_parameters"].get("end_id")


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
