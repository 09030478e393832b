"""Builds the Trainer from the settings: callbacks, loggers, processes, precision."""

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import callbacks as lightning_callbacks

from minigpt_pl.config import TrainConfig, TrainerConfig
from minigpt_pl.cpu import onednn
from minigpt_pl.data.datamodule import TextDataModule
from minigpt_pl.training import cluster
from minigpt_pl.training.checkpointing import SaveAndStop, StopAtNaN
from minigpt_pl.training.fsdp import FSDP2Strategy
from minigpt_pl.training.progress import Progress

log = logging.getLogger(__name__)
# `L.Trainer` accepts these settings without a change.
UNCHANGED = (
    *("max_epochs", "accumulate_grad_batches", "gradient_clip_val", "check_val_every_n_epoch", "val_check_interval"),
    *("limit_train_batches", "profiler", "deterministic", "detect_anomaly"),
)


def build_trainer(
    config: TrainConfig, folder: Path, datamodule: TextDataModule, callbacks: list[L.Callback], stop: SaveAndStop
) -> L.Trainer:
    """Build the Trainer from the settings.

    Args:
        folder: the run folder.
        datamodule: the text, after `setup`.
        callbacks: additional callbacks.
        stop: saves the checkpoints.
    """
    settings = config.trainer
    validates = datamodule.has_validation and settings.limit_val_batches != 0
    if not validates:
        nothing_held_out = f"data.validation_share={config.data.validation_share:g} holds out nothing"
        reason = "trainer.limit_val_batches=0" if datamodule.has_validation else nothing_held_out
        log.info("This run has no validation (%s), so val/loss is not computed.", reason)
    callbacks = [*callbacks]
    if settings.patience is not None:
        callbacks.append(lightning_callbacks.EarlyStopping("val/loss", patience=settings.patience))
    if settings.ema_decay is not None:
        callbacks.append(lightning_callbacks.EMAWeightAveraging(decay=settings.ema_decay))
    if settings.progress_bar:
        callbacks.append(Progress(stop.seconds_left))
    # Both come after EMAWeightAveraging: it updates the average before SaveAndStop saves, and it puts the average into
    # the checkpoint before StopAtNaN checks the weights.
    callbacks += [StopAtNaN(), stop]
    options = processes(settings)
    if settings.strategy == "fsdp2":
        options["strategy"] = FSDP2Strategy(options["devices"] * options["num_nodes"])
    trainer = L.Trainer(
        **options,
        precision=precision(settings.precision, settings.accelerator),
        **{name: getattr(settings, name) for name in UNCHANGED},
        limit_val_batches=settings.limit_val_batches if validates else 0,
        num_sanity_val_steps=0,
        log_every_n_steps=min(settings.log_every_n_steps, batches_per_epoch(config, datamodule)),  # a row per epoch
        enable_progress_bar=False,  # our callback Progress replaces it
        enable_model_summary=False,
        use_distributed_sampler=False,  # BatchLoader gives each process its part
        default_root_dir=folder,
        callbacks=callbacks,
        logger=False,  # our callback Metrics writes all logs
        # SLURMEnvironment would write checkpoints in its signal handlers, which can deadlock (Lightning issue 21406).
        plugins=[stop.writer, LightningEnvironment() if cluster.join().world_size == 1 else TorchElasticEnvironment()],
    )
    connector: Any = trainer._signal_connector
    connector.register_signal_handlers = lambda: None  # SaveAndStop has its own
    loop: Any = trainer.fit_loop.epoch_loop
    loop._broadcast_sigterm_tensor = lambda: None  # a collective before each batch
    return trainer


def processes(settings: TrainerConfig) -> dict[str, Any]:
    """Accelerator, devices, nodes and strategy for `L.Trainer`. srun or torchrun gives the numbers that are not set."""
    found = cluster.join()
    devices = settings.devices or found.local_world_size
    num_nodes = settings.num_nodes or found.world_size // found.local_world_size
    strategy = "ddp" if settings.strategy == "auto" and devices * num_nodes > 1 else settings.strategy
    return {"accelerator": settings.accelerator, "devices": devices, "num_nodes": num_nodes, "strategy": strategy}


def max_seconds(config: TrainConfig) -> float | None:
    """`trainer.max_time` in seconds."""
    if config.trainer.max_time is None:
        return None
    days, hours, minutes, seconds = map(int, config.trainer.max_time.split(":"))
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def batches_per_epoch(config: TrainConfig, datamodule: TextDataModule) -> int:
    """Number of batches in one epoch with these settings."""
    return datamodule.batches_per_epoch(config.trainer.limit_train_batches)


def precision(wanted: str, accelerator: str) -> Any:
    """The precision for `L.Trainer`. `auto` means bf16-mixed if the hardware has bf16 matrix units, else 32-true."""
    if wanted != "auto":
        return wanted
    if accelerator != "cpu" and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    if accelerator in ("auto", "mps") and torch.backends.mps.is_available():
        return "32-true"
    return "bf16-mixed" if onednn.BF16_IS_FAST else "32-true"
