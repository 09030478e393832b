"""Checks of the processes of a training: their speed, their clocks, their folder, and the network between them."""

import math
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from minigpt_pl.config import DataConfig, DoctorConfig, ModelConfig, OptimizerConfig
from minigpt_pl.diagnosis.machine import MOUNT_WITH_LOCKS, Check, is_locked, scratch_folder
from minigpt_pl.errors import InputError
from minigpt_pl.files import flush

if TYPE_CHECKING:
    import torch

    from minigpt_pl.training.cluster import Cluster

SKEW = 1.0  # seconds between two clocks: programs compare the times of files of different machines
SHARE = "give a folder that all machines share"


def step(config: DoctorConfig, group: "Cluster") -> Check:
    """Compare the time of a training step of the notebook's shape with the time of building its batch."""
    import numpy as np
    import torch

    from minigpt_pl.cpu.allocator import keep_freed_memory
    from minigpt_pl.data.batches import BatchLoader, Sequences
    from minigpt_pl.data.corpus import Ids, Shard, ShardSize
    from minigpt_pl.model import MiniGPT
    from minigpt_pl.tokenizer import NUM_SPECIAL, PADDING_ID
    from minigpt_pl.training import trainer
    from minigpt_pl.training.optimizers import build_optimizer

    keep_freed_memory()  # as a training does
    shape, batch_size, device = ModelConfig(), DataConfig.batch_size, _device(group)
    documents, words = 100 * batch_size, 2 * shape.max_length  # of a document
    tokens = np.random.default_rng(0).integers(NUM_SPECIAL, shape.vocab_size, documents * words, dtype=np.uint16)
    shard = Shard(tokens, np.arange(0, len(tokens) + 1, words))
    ids = Ids([ShardSize(len(tokens), documents, 0)], lambda number: shard)
    sequences = Sequences(ids, shape.max_length, "truncate", end_token=True, count_padding=False)
    batches = iter(BatchLoader(sequences.to(device) if device.type == "cuda" else sequences, batch_size, seed=0))
    batch = next(batches)
    inputs, targets = batch.inputs.to(device), batch.targets.to(device)
    model = MiniGPT(**asdict(shape)).to(device)
    optimizer = build_optimizer(model, OptimizerConfig(), None)
    uses_bf16 = trainer.precision("auto", "auto") == "bf16-mixed"

    def train() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16):
            loss = model.loss(inputs, targets, PADDING_ID) / batch.num_targets
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    of_step, of_batch = _seconds(train, 1, device), _seconds(lambda: next(batches), 20, device)
    text = f"{device}: a training step takes {_time(of_step)}, its batch {_time(of_batch)}"
    is_fast = of_batch < of_step
    remedy = "" if is_fast else "; end other programs, or give each process more CPU cores (--cpus-per-task)"
    return Check("step", is_fast, text + remedy)


def clocks(config: DoctorConfig, group: "Cluster") -> Check:
    """Each process asks the first one for its time. The error is at most half of the time until the answer."""
    error, difference = math.inf, 0.0
    for number in range(3):
        for rank in range(1, group.world_size):
            key = f"clock/{number}/{rank}"
            if group.is_first:
                group.store.get(f"{key}/asked")  # waits until there is a value
                group.store.set(key, str(time.time()))
            elif rank == group.rank:
                asked = time.time()
                group.store.set(f"{key}/asked", "")
                answer, half = float(group.store.get(key)), (time.time() - asked) / 2
                if half < error:
                    error, difference = half, asked + half - answer
    found = group.gather("clock", (abs(difference), error, f"process {group.rank} on {socket.gethostname()}"))
    if not group.is_first:
        return Check("clocks", None, "compared by the first process")
    difference, error, where = max(found[1:])
    text = f"at most {_time(difference)} apart (error {_time(error)})"
    remedy = f"; {where} is wrong or the first one is; set the clocks by NTP" if difference - error > SKEW else ""
    return Check("clocks", not remedy, text + remedy)


def shared_folder(config: DoctorConfig, group: "Cluster") -> Check:
    """Each process writes a file into a folder of the first one, and looks at its lock."""
    with ExitStack() as stack:

        def make() -> str | None:
            try:
                scratch = stack.enter_context(scratch_folder(config))
                stack.enter_context(FileLock(scratch / "lock"))
            except (InputError, OSError, NotImplementedError):  # the check of this folder tells why
                return None
            return str(scratch)

        if (made := group.decide("shared folder", make)) is None:
            return Check("shared folder", None, "not tested, because the folder is not usable")
        scratch, problem = Path(made), ""
        try:
            (scratch / str(group.rank)).touch()
            flush(scratch / str(group.rank))
            if not group.is_first and not is_locked(scratch / "lock"):
                problem = f"a lock of the first process cannot be seen; {MOUNT_WITH_LOCKS}"
        except OSError as error:
            problem = f"cannot be written ({error.strerror}); {SHARE}"
        wrote = group.gather("wrote", not problem)
        if missing := [rank for rank, has in enumerate(wrote) if has and not (scratch / str(rank)).exists()]:
            problem = f"the files of the processes {missing} cannot be seen; {SHARE}"
    if problem:
        return Check("shared folder", False, f"output_dir={config.output_dir}: {problem}")
    return Check("shared folder", True, "all processes write into output_dir, and see its locks")


def all_reduce(config: DoctorConfig, group: "Cluster") -> Check:
    """Measure how long the processes take to add up the gradients of the notebook's model."""
    import torch
    import torch.distributed as dist

    from minigpt_pl.training.memory import num_parameters

    device = _device(group)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    group.init_process_group(backend)
    gradients = torch.zeros(num_parameters(ModelConfig()), device=device if device.type == "cuda" else "cpu")
    seconds = _seconds(lambda: dist.all_reduce(gradients), 5, device)
    dist.destroy_process_group()
    size = gradients.nbytes
    text = f"{backend}: {size / 1e6:.1f} MB of gradients in {_time(seconds)} ({size / seconds / 1e9:.2f} GB/s)"
    return Check("all-reduce", None, text)


def _device(group: "Cluster") -> "torch.device":
    """The device that Lightning chooses for this process."""
    import torch

    if gpus := torch.cuda.device_count():
        return torch.device("cuda", group.local_rank % gpus)
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _seconds(work: Callable[[], object], times: int, device: "torch.device") -> float:
    """The mean time of some calls, after a first one."""
    import torch

    start = 0.0
    for number in range(1 + times):
        if number == 1:
            start = time.perf_counter()
        work()
        if number in (0, times) and device.type != "cpu":
            torch.accelerator.synchronize(device)
    return (time.perf_counter() - start) / times


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.2g} ms" if seconds < 0.1 else f"{1e3 * seconds:,.0f} ms"
