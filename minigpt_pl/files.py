"""Atomic writes: a reader sees the old file or the new one, never a part of it."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from minigpt_pl.errors import InputError

MAX_TEXT_LENGTH = 10_000_000  # of prompts and vocabularies, in characters


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Write a file or a folder atomically.

    Yields a temporary path in the same folder, for the caller to write. Afterwards this file is flushed to disk and
    renamed to `path`. After an exception it is removed, and `path` is unchanged.

    Example:
        >>> with atomic_write(Path("model.pt")) as temporary:
        ...     torch.save(weights, temporary)
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    _remove(temporary)  # left by a killed process with the same process id
    try:
        yield temporary
        for written in (*temporary.rglob("*"), temporary):
            _flush(written)
        temporary.replace(path)
    except BaseException:
        _remove(temporary)
        raise
    _flush(path.parent)


def _flush(path: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_figure(path: Path, figure: Any, dpi: int = 120) -> None:
    """Write a matplotlib figure as PNG, atomically."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)


def make_folder(path: Path, setting: str) -> None:
    """Create a folder and its parents, if they are missing.

    Raises:
        InputError: the folder cannot be created. The message names `setting`.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{setting}={path}: cannot be created ({error.strerror}); give another folder") from error


def read_text(path: Path | TextIO) -> str:
    """Read a small UTF-8 text: a file, with or without a byte-order mark, or an open stream.

    Raises:
        OSError, ValueError: it cannot be read, is larger than `MAX_TEXT_LENGTH`, or is not UTF-8.
    """
    if isinstance(path, Path):
        with path.open(encoding="utf-8-sig") as file:
            return read_text(file)
    text = path.read(MAX_TEXT_LENGTH + 1)
    if len(text) > MAX_TEXT_LENGTH:
        raise ValueError(f"longer than {MAX_TEXT_LENGTH:,} characters")
    return text
