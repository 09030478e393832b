"""The Keras side of a comparison, run as a program of its own."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

NUM_REVIEWS = 5_000
SEED_VOCABULARY = 20_000
# One thread, as for ours: libraries whose threads spin on the same few cores take three times as long.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "2", "CUDA_VISIBLE_DEVICES": ""} | os.environ


def skip_without_keras() -> None:
    for module in ("keras", "tensorflow"):
        if importlib.util.find_spec(module) is None:  # importing it would fix the backend, and takes seconds
            pytest.skip(f"{module} is not installed: pip install 'minigpt_pl[parity]'")


def run_keras(backend: str, job: str, folder: Path, options: dict, **arrays: np.ndarray) -> dict[str, np.ndarray]:
    """Run a job of keras_side.py; its arrays."""
    skip_without_keras()
    (folder / "in.json").write_text(json.dumps(options))
    np.savez(folder / "in.npz", **arrays)
    helper = Path(__file__).with_name("keras_side.py")
    done = subprocess.run(
        [sys.executable, helper, backend, job, folder], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(np.load(folder / "out.npz"))
