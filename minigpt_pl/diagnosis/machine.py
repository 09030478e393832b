"""Checks of one machine: packages, devices, data, and the folder of the runs."""

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from filelock import FileLock, Timeout

from minigpt_pl.config import DoctorConfig
from minigpt_pl.files import flush, make_folder, remove, temporary_path

if TYPE_CHECKING:
    from minigpt_pl.training.cluster import Cluster

PACKAGES = ("torch", "lightning", "tokenizers", "datasets", "numpy", "hydra-core")
NVIDIA_DRIVER = Path("/dev/nvidiactl")
FREE_SPACE = 2**30  # bytes; the checkpoints of the notebook's model need half of it
MOUNT_WITH_LOCKS = "two jobs could write into one run; mount the disk with locks (NFS: no nolock; Lustre: flock)"


class Check(NamedTuple):
    """The result of a check.

    Attributes:
        name: the first words of its line.
        ok: whether all is well; None if the line is only information.
        text: the finding; if `ok` is False, also the remedy.
    """

    name: str
    ok: bool | None
    text: str


def packages(config: DoctorConfig, group: "Cluster") -> Check:
    """The versions of Python and of the packages that decide what a training computes."""
    versions = {"python": sys.version.split()[0]} | {name: version(name) for name in PACKAGES}
    return Check("packages", True, ", ".join(f"{name} {number}" for name, number in versions.items()))


def device(config: DoctorConfig, group: "Cluster") -> Check:
    """The CPU cores and GPUs that this process may use."""
    import torch

    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text, problem = f"{cores} CPU cores, {', '.join(gpus) or 'no NVIDIA GPU'}", ""
    if NVIDIA_DRIVER.exists() and not gpus:
        problem = ", but NVIDIA's driver; install PyTorch for CUDA, or correct CUDA_VISIBLE_DEVICES"
    elif gpus and len(gpus) < group.local_world_size:
        problem = f" for {group.local_world_size} processes; each needs a GPU and must see all (--gpus-per-node)"
    return Check("device", not problem, text + problem)


def precision(config: DoctorConfig, group: "Cluster") -> Check:
    """What `trainer.precision=auto` means here."""
    from minigpt_pl.training import trainer

    chosen = trainer.precision("auto", "auto")
    return Check("precision", None, f"{chosen}; {'' if chosen == 'bf16-mixed' else 'no '}bf16 matrix units")


def onednn(config: DoctorConfig, group: "Cluster") -> Check:
    """The private operators of PyTorch that make training and sampling on a CPU faster."""
    from minigpt_pl.cpu import int8, onednn

    has = {"fp32": onednn.HAS_FP32, "bf16": onednn.HAS_BF16, "fast bf16": onednn.BF16_IS_FAST, "int8": int8.HAS_INT8}
    return Check("oneDNN", None, ", ".join(f"{name}: {'yes' if value else 'no'}" for name, value in has.items()))


def data(config: DoctorConfig, group: "Cluster") -> Check:
    """Find the text. The hub is asked for its commit; files are hashed, unless `data.cache_dir` has their hashes."""
    from minigpt_pl.data.sources import open_source

    source = open_source(config.data)
    fingerprint = hashlib.sha256(json.dumps(source.identity, sort_keys=True).encode()).hexdigest()[:16]
    return Check("data", True, f"{source.description}; fingerprint {fingerprint}")


def free_space(config: DoctorConfig, group: "Cluster") -> Check:
    """The free space of the disks of `output_dir` and `data.cache_dir`, without quotas."""
    found, problems = [], []
    for setting, given in {"output_dir": config.output_dir, "data.cache_dir": config.data.cache_dir}.items():
        path = Path(given).absolute()
        free = shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free
        found.append(f"{free / 1e9:,.0f} GB in {setting}")
        if free < FREE_SPACE:
            problems.append(f"{setting}={given}: has only {free / 1e9:.2f} GB; free some, or give another folder")
    return Check("free space", not problems, "; ".join(problems) or ", ".join(found))


def folder(config: DoctorConfig, group: "Cluster") -> Check:
    """Flush, rename and lock files in `output_dir`, as a training does."""
    with scratch_folder(config) as scratch:
        old, new, lock = scratch / "old", scratch / "new", scratch / "lock"
        old.write_text("old")
        new.write_text("new")
        start = time.perf_counter()
        flush(new)
        power = math.ceil(math.log10(1e3 * (time.perf_counter() - start)))  # rounded, so that machines can be compared
        new.replace(old)
        if old.read_text() != "new":
            problem = "a file does not replace another; give another folder"
        elif not _another_process_sees(lock):
            problem = f"another process does not see a lock; {MOUNT_WITH_LOCKS}"
        else:
            return Check(
                "folder", True, f"output_dir: rename and lock work, a flush takes less than {10 ** max(power, 0):,} ms"
            )
    return Check("folder", False, f"output_dir={config.output_dir}: {problem}")


@contextmanager
def scratch_folder(config: DoctorConfig) -> Iterator[Path]:
    """A folder in `output_dir`. It is removed afterwards; after a kill, the next training removes it.

    Raises:
        InputError: output_dir cannot be created.
    """
    make_folder(Path(config.output_dir), "output_dir")
    scratch = temporary_path(Path(config.output_dir) / "doctor")
    remove(scratch)
    scratch.mkdir()
    try:
        yield scratch
    finally:
        remove(scratch)


def _another_process_sees(lock: Path) -> bool:
    code = "import sys; from minigpt_pl.diagnosis.machine import is_locked; sys.exit(not is_locked(sys.argv[1]))"
    with FileLock(lock):
        return subprocess.run([sys.executable, "-c", code, str(lock)], timeout=30).returncode == 0


def is_locked(path: str | Path) -> bool:
    """Whether another process holds this lock."""
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True


def network(config: DoctorConfig, group: "Cluster") -> Check:
    """The variables that configure the communication of the processes."""
    found = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(("NCCL_", "GLOO_"))]
    return Check("network", None, ", ".join(found) or "no variables NCCL_* or GLOO_*")
