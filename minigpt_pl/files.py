"""Atomic writes: a reader sees the old file or the new one, never a part of it."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minigpt_pl.errors import InputError


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
    remove(temporary)  # left by a killed process with the same process id
    try:
        yield temporary
        for written in (*temporary.rglob("*"), temporary):
            flush(written)
        temporary.replace(path)
    except BaseException:
        remove(temporary)
        raise
    flush(path.parent)


def flush(path: Path) -> None:
    """Wait until a file, or the list of the files in a folder, is on the disk."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
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
