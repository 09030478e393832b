"""Writes a run in the formats of `python -m minigpt_pl.export`."""

import importlib.util

from minigpt_pl.errors import InputError


def require(*packages: str) -> None:
    """Raise an `InputError` that names the first missing package of the extra `export`."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise InputError(f"{package} is not installed, and this export needs it; pip install 'minigpt_pl[export]'")
