"""Folders and files, made so that nothing that stands is harmed."""

import os
from pathlib import Path
from typing import Any

from minigpt_pl.errors import InputError


def write_aside(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old one or the new one, never half of it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def write_figure(path: Path, figure: Any, dpi: int = 120) -> None:
    """Write a matplotlib figure as PNG, aside and renamed."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    figure.savefig(aside, format="png", dpi=dpi)
    aside.replace(path)


def make_folder(path: Path, setting: str) -> None:
    """Make a folder and those above it, where they are missing.

    Raises:
        InputError: it cannot be made; the message names `setting`.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{setting}={path}: cannot be made ({error.strerror}); give a folder to write in") from error
