"""MANIFEST.json of an exported folder: the run, the packages that wrote it, and the SHA-256 of each file."""

import hashlib
import importlib.util
import json
import sys
from importlib.metadata import version
from pathlib import Path

from tokenizers import Tokenizer

from minigpt_pl import runs
from minigpt_pl.tokenizer import fingerprint

NAME = "MANIFEST.json"
PACKAGES = ("minigpt_pl", "torch", "tokenizers", "transformers", "safetensors", "onnx", "onnxscript", "onnxruntime")


def write(folder: Path, run: str, checkpoint: Path, tokenizer: Tokenizer) -> None:
    """List the files of the folder and of its subfolders.

    Args:
        run: name of the run.
        checkpoint: its weights.
    """
    versions = {name: version(name) for name in PACKAGES if importlib.util.find_spec(name) is not None}
    # meta.pt of a sharded checkpoint has the checksums of its other files.
    weights = checkpoint / runs.META if checkpoint.is_dir() else checkpoint
    manifest = {
        "run": run,
        "checkpoint": {"name": checkpoint.name, "sha256": _sha256(weights)},
        "words": fingerprint(tokenizer),
        "versions": {"python": sys.version.split()[0], **versions},
        "files": {name: _sha256(folder / name) for name in _files(folder)},
    }
    (folder / NAME).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def is_export(path: Path) -> bool:
    """Whether the folder is empty or holds only files that its manifest lists, so that nothing is lost with it."""
    try:
        files = json.loads((path / NAME).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        files = {}
    return path.is_dir() and {*_files(path)} <= {NAME, *files}


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
