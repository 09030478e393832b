"""Memory that a training needs, from the settings alone. A model that cannot fit is refused before it is built."""

import logging
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from minigpt_pl.config import ModelConfig, TrainConfig
from minigpt_pl.errors import InputError
from minigpt_pl.training.trainer import processes

log = logging.getLogger(__name__)

CONTROL_GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")  # those of this process, and their limits


def check_memory(config: TrainConfig, vocab_size: int) -> None:
    """Warn if one process needs more than half of the memory.

    Raises:
        InputError: it needs more than all. The message names the setting that needs most.
    """
    config = replace(config, model=replace(config.model, vocab_size=vocab_size))
    on_gpu = config.trainer.accelerator != "cpu" and torch.cuda.is_available()
    available = torch.cuda.get_device_properties(0).total_memory if on_gpu else machine_bytes()
    needed = training_bytes(config)
    if available is None or needed < available / 2:
        return
    names = [*(f"model.{field.name}" for field in fields(ModelConfig)), "data.batch_size"]
    name = min(names, key=lambda name: training_bytes(_with_default(config, name)))
    group, _, field = name.partition(".")
    problem = (
        f"{name}={getattr(getattr(config, group), field)}: the training needs at least {needed / 1e9:,.1f} GB of"
        f" memory, and there are {available / 1e9:,.1f} GB; lower it, another size of the model, or data.batch_size"
    )
    if needed > available:
        raise InputError(problem)
    log.warning("%s", problem)


def _with_default(config: TrainConfig, name: str) -> TrainConfig:
    group, _, field = name.partition(".")
    settings: Any = getattr(config, group)
    return replace(config, **{group: replace(settings, **{field: getattr(type(settings), field)})})


def training_bytes(config: TrainConfig) -> int:
    """A lower bound for one process: weights, gradients, both moments of Adam, and the blocks' inputs and outputs."""
    model, options = config.model, processes(config.trainer)
    batch_size = -(-config.data.batch_size // (options["devices"] * options["num_nodes"]))  # of this process
    head_dim = model.embed_dim if model.head_dim is None else model.head_dim
    number_bytes = {"64-true": 8, "32-true": 4}.get(config.trainer.precision, 2)
    copies = 4 + (config.trainer.ema_decay is not None)
    per_block = 2 * model.embed_dim + 4 * model.num_heads * head_dim + model.feed_forward_dim
    tokens = batch_size * model.max_length
    in_blocks = model.num_blocks * per_block
    if config.trainer.activation_checkpointing:  # the inputs of all blocks, and one block
        in_blocks = model.num_blocks * model.embed_dim + per_block
    weights = copies * num_parameters(model) * max(number_bytes, 4)  # bf16-mixed keeps the weights in fp32
    if config.trainer.strategy == "fsdp2":  # each process has a share
        weights //= options["devices"] * options["num_nodes"]
    return int(weights + tokens * (model.embed_dim + in_blocks) * number_bytes)


def num_parameters(model: ModelConfig) -> int:
    """The number of parameters of `MiniGPT` with these settings."""
    width, hidden = model.embed_dim, model.feed_forward_dim
    heads = model.num_heads * (width if model.head_dim is None else model.head_dim)  # H*K
    attention = 3 * (width + 1) * heads + (heads + 1) * width
    feed_forward = (width + 1) * hidden + (hidden + 1) * width
    block = attention + feed_forward + 4 * width  # two norms
    output = model.vocab_size * (1 if model.tie_embeddings else width + 1)
    return (model.vocab_size + model.max_length) * width + model.num_blocks * block + output


def machine_bytes() -> int | None:
    """Memory of this machine, or of the control group (container, job) of this process. None if unknown (Windows)."""
    if not hasattr(os, "sysconf"):
        return None
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    process_file, root = CONTROL_GROUPS
    for line in process_file.read_text().splitlines() if process_file.is_file() else ():
        _, controllers, group = line.split(":", 2)  # 0::/user.slice (version 2) or 4:memory:/job (version 1)
        if controllers in ("", "memory"):
            folder = root / controllers / group.lstrip("/")
            name = "memory.limit_in_bytes" if controllers else "memory.max"
            files = [place / name for place in (folder, *folder.parents)]  # a parent's limit counts too
            values = [file.read_text().strip() for file in files if file.is_file()]
            limits += [int(value) for value in values if value.isdecimal()]  # no limit is "max"
    return min(limits)
