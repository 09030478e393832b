"""Checks before the training starts: of the machine, of the text, and of the checkpoint to resume from."""

import importlib.util
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from minigpt_pl import runs
from minigpt_pl.checkpoints import read_checkpoint
from minigpt_pl.config import ModelConfig, OptimizerConfig, TrainConfig
from minigpt_pl.data.corpus import is_same_text
from minigpt_pl.data.datamodule import TextDataModule
from minigpt_pl.errors import InputError
from minigpt_pl.tokenizer import fingerprint
from minigpt_pl.training.module import MiniGPTModule
from minigpt_pl.training.trainer import batches_per_epoch, processes


def check_machine(config: TrainConfig) -> None:
    """Check that this machine can train with these settings, before any process starts and any text is read.

    Raises:
        InputError: one line per problem, for example a missing device or package.
    """
    settings, problems = config.trainer, []
    process_options = processes(settings)
    devices = process_options["devices"]
    if settings.accelerator in ("gpu", "cuda") and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        problems.append(f"trainer.accelerator={settings.accelerator}: PyTorch finds no GPU here; use auto or cpu")
    elif settings.accelerator == "mps" and not torch.backends.mps.is_available():
        problems.append("trainer.accelerator=mps: PyTorch finds no MPS device here; use auto or cpu")
    elif settings.accelerator != "cpu" and torch.cuda.is_available() and devices > torch.cuda.device_count():
        remedy = "lower it" if settings.devices else "start fewer tasks, or use --gpus-per-node, not --gpus-per-task"
        gpus = torch.cuda.device_count()
        problems.append(f"trainer.devices={devices}: this process sees only {gpus} GPUs; {remedy}")
    elif settings.accelerator == "cpu" or not torch.cuda.is_available():
        cores = max(os.cpu_count() or 2, 2)
        if (settings.devices or 1) > cores:  # srun and torchrun may start more
            problems.append(f"trainer.devices={devices}: this machine has only {cores} CPU cores; lower it")
    world_size = devices * process_options["num_nodes"]
    if config.data.batch_size < world_size:
        problems.append(f"data.batch_size={config.data.batch_size}: must be at least the number of processes")
    if config.logger.name != "csv" and importlib.util.find_spec(config.logger.name) is None:
        name = config.logger.name
        problems.append(f"logger.name={name}: not installed; pip install 'minigpt_pl[{name}]'")
    if config.find_learning_rate and world_size > 1:
        problems.append(f"trainer.devices={devices}: find_learning_rate=true needs one process; set it to 1")
    if config.find_learning_rate and importlib.util.find_spec("matplotlib") is None:
        problems.append("find_learning_rate=true: needs matplotlib; pip install 'minigpt_pl[show]'")
    if problems:
        raise InputError(*problems)


def check_text(config: TrainConfig, datamodule: TextDataModule) -> None:
    """Check that the settings fit the text.

    Raises:
        InputError: one line per problem, for example too little text.
    """
    settings, problems = config.trainer, []
    if settings.patience is not None and (not datamodule.has_validation or settings.limit_val_batches == 0):
        problems.append(f"trainer.patience={settings.patience}: nothing is held out; set data.validation_share")
    interval, batches = settings.val_check_interval, batches_per_epoch(config, datamodule)
    if interval is not None and interval > batches:
        problems.append(f"trainer.val_check_interval={interval}: an epoch has only {batches} batches; lower it")
    if problems:
        raise InputError(*problems)


def check_resume(checkpoint: Path, module: MiniGPTModule, datamodule: TextDataModule) -> dict[str, Any]:
    """Check that a run can continue from a checkpoint with these settings.

    Returns:
        The contents of the checkpoint.

    Raises:
        InputError: one line per problem, for example a changed setting that must stay the same.
    """
    contents, folder = read_checkpoint(checkpoint), checkpoint.parent.parent
    _check_tokenizer(contents, folder, datamodule)
    groups = {"model": asdict(ModelConfig())}
    if contents["optimizer_states"]:  # they contain the old settings, which would silently replace the new ones
        groups["optimizer"] = asdict(OptimizerConfig())
    problems = []
    for group, defaults in groups.items():
        before = defaults | contents["hyper_parameters"][group]  # an old checkpoint lacks the newer settings
        problems += [
            f"{group}.{name}={value}: the checkpoint has {before[name]}; keep that value, or start a new run"
            for name, value in module.hparams[group].items()
            if value != before[name] and name != "dropout"
        ]
    position = contents.get("TextDataModule", {})
    if position.get("batches_done"):  # the order must not change inside an epoch
        problems += [
            f"{name}: the checkpoint is inside an epoch that started with {position['order'][name]}, not {value};"
            " keep the old value until the epoch ends, or start a new run"
            for name, value in datamodule.order.items()
            if value != position["order"][name]
        ]
    record = runs.read_record(folder)
    text = record.get("text", {})
    imported = runs.IMPORTED_FROM in record and not text  # the text of a Keras model is unknown
    if not imported and not is_same_text(text, datamodule.corpus.record):
        problems.append(
            f"data: this is not the text that {folder} was trained on ({text.get('source')}); give the same text, or"
            " start a new run"
        )
    if problems:
        raise InputError(*problems)
    return contents


def _check_tokenizer(contents: dict[str, Any], folder: Path, datamodule: TextDataModule) -> None:
    """Refuse other tokens first, because they also change the vocabulary size and the text."""
    before = contents.get("TextDataModule", {}).get("tokenizer")
    if before in (None, fingerprint(datamodule.tokenizer)):  # None: of an older version, or of `convert`
        return
    data_before = asdict(type(datamodule.data)()) | runs.read_settings(folder)["data"]
    if problems := [
        f"data.{name}={value}: the run has {data_before[name]}; leave it out, or start a new run"
        for name in ("tokenizer", "lowercase")
        if (value := getattr(datamodule.data, name)) != data_before[name]
    ]:
        raise InputError(*problems)
