"""Run folders: name, record, settings and lock of a run.

outputs/<run name>/
    run.json         the record: status, command, source of the text, versions.
    config.yaml      all settings.
    tokenizer.json   the vocabulary.
    checkpoints/     last.ckpt: the newest; step-00000391.ckpt: an older one; best.ckpt: the lowest val/loss.
                     Those of trainer.strategy=fsdp2 are folders (`sharded_checkpoints`).
    metrics.csv  samples.jsonl  loss.png
    evaluation.json  evaluation.png  explore/  export/
"""

import errno
import json
import logging
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from minigpt_pl.config import DataConfig, ModelConfig, range_problems
from minigpt_pl.errors import InputError
from minigpt_pl.files import atomic_write, make_folder, remove_temporaries, write_text

log = logging.getLogger(__name__)

RECORD = "run.json"
META = "meta.pt"  # in a checkpoint that is a folder
IMPORTED_FROM = "imported_from"  # key in the record of a run that `convert` made: the Keras file


def how_to_continue(folder: Path) -> str:
    """The sentence that names the command. The run's own settings are in its record, also those of a job of a sweep."""
    return f"To continue the run: python -m minigpt_pl.train resume={folder}"


def make_run_folder(output_dir: Path, run_name: str | None, prefix: str, **record: Any) -> Path:
    """Create the folder of a new run, with its record.

    Args:
        run_name: its name; None for `<prefix>-001` or the next free number.
        record: first values of the record.

    Raises:
        InputError: a run of that name exists, or the folder cannot be created.
    """
    make_folder(output_dir, "output_dir")
    remove_temporaries(output_dir)
    number = 1
    while True:
        folder = output_dir / (run_name or f"{prefix}-{number:03d}")
        try:
            with atomic_write(folder) as temporary:  # if two runs start at the same time, only one succeeds
                temporary.mkdir()
                update_record(temporary, **record)
            return folder
        except OSError as error:
            if not folder.exists():
                unnameable = error.errno in (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ)
                setting = f"run_name={folder.name}" if unnameable else f"output_dir={output_dir}"
                raise InputError(f"{setting}: cannot create {folder} ({error.strerror}); give another") from error
            if run_name is not None:
                raise InputError(
                    f"run_name={run_name}: {folder} exists; add resume=auto to continue it, or choose another name"
                ) from error
            number += 1


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints of a run: the newest first, best.ckpt last."""
    older = sorted(folder.glob("checkpoints/step-*.ckpt"), key=lambda path: path.stat().st_mtime, reverse=True)
    named = [folder / "checkpoints" / name for name in ("last.ckpt", "best.ckpt")]
    return [path for path in (named[0], *older, named[1]) if path.exists()]


def read_record(folder: Path) -> dict[str, Any]:
    """Read the record of a run; empty if the folder has none.

    Raises:
        InputError: the record is damaged.
    """
    path = folder / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); restore it or remove the run") from error
    types = {"text": dict, "overrides": list}
    if not isinstance(record, dict) or not all(
        isinstance(record.get(name, type_()), type_) for name, type_ in types.items()
    ):
        raise InputError(f"{path}: not the record of a run; restore it or remove the run")
    return record


def update_record(folder: Path, **values: Any) -> None:
    """Add values and the current time, in seconds since 1970 (UTC), to the record of a run."""
    record = read_record(folder) | values | {"updated": time.time()}
    write_text(folder / RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def read_settings(folder: Path) -> dict[str, Any]:
    """Read the config.yaml of a run: values and groups of values by name.

    Raises:
        InputError: the file is missing or damaged.
    """
    path = folder / "config.yaml"
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); a run folder keeps its settings there") from error
    except (yaml.YAMLError, UnicodeDecodeError):
        settings = None
    if not isinstance(settings, dict) or not all(isinstance(settings.get(name), dict) for name in ("model", "data")):
        raise InputError(f"{path}: not the settings of a run; restore it, or train again")
    return settings


def read_data_settings(folder: Path) -> tuple[DataConfig, int]:
    """The settings of the run's text, and its maximum vocabulary size: the arguments of `open_corpus`.

    Raises:
        InputError: as `read_settings`.
    """
    settings = read_settings(folder)
    try:
        data: dict[str, Any] = settings["data"]
        if data.get("tokenizer", "") is None:  # a run of an older version
            del data["tokenizer"]
        kinds = [kind for kind in DataConfig.__subclasses__() if data.keys() <= {field.name for field in fields(kind)}]
        kind = min(kinds, key=lambda kind: len(fields(kind)))  # several if an old run has only the common settings
        model = ModelConfig(vocab_size=settings["model"]["vocab_size"])
        data_config = kind(**data)
        if problems := [*range_problems(model, "model."), *range_problems(data_config, "data.")]:
            raise ValueError(*problems)
        return data_config, model.vocab_size
    except (TypeError, KeyError, ValueError) as error:
        raise InputError(f"{folder}/config.yaml: not the settings of a run; restore it, or train again") from error


def lock(folder: Path) -> FileLock:
    """Reserve a run for this process until the lock is released or the process ends.

    Raises:
        InputError: another process trains the run.
    """
    file_lock = FileLock(folder / ".lock")
    try:
        file_lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(f"run_name={folder.name}: another process trains {folder}; wait, or stop it") from error
    return file_lock


def runs_by_status(output_dir: Path, *statuses: str) -> list[Path]:
    """Runs with one of these statuses, or all runs if none is given. The run with the newest record is the first."""
    updated = {}
    for path in output_dir.glob(f"*/{RECORD}"):
        try:
            record = read_record(path.parent)
            if not statuses or record.get("status") in statuses:
                updated[path.parent] = float(record["updated"])
        except (InputError, KeyError, TypeError, ValueError) as error:
            log.warning("%s: left out, because its %s is damaged (%s)", path.parent, RECORD, error)
    return sorted(updated, key=updated.__getitem__, reverse=True)
