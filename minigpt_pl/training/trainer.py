"""Builds the Trainer from the settings: callbacks, loggers, processes, precision."""

import logging
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch import loggers as lightning_loggers
from lightning.pytorch.utilities import rank_zero_only

from minigpt_pl.checkpoints import read_checkpoint
from minigpt_pl.config import TrainConfig, TrainerConfig, WandbConfig
from minigpt_pl.cpu import onednn
from minigpt_pl.data.datamodule import TextDataModule
from minigpt_pl.training import loss_curve
from minigpt_pl.training.callbacks import AtomicCheckpointIO, GracefulStop, LastCheckpoint, StopAtNaN, Throughput
from minigpt_pl.training.progress import Progress

log = logging.getLogger(__name__)
# `L.Trainer` accepts these settings without a change.
UNCHANGED = (
    *("max_epochs", "accumulate_grad_batches", "gradient_clip_val", "check_val_every_n_epoch", "val_check_interval"),
    *("limit_train_batches", "profiler", "deterministic", "detect_anomaly"),
)


def build_trainer(
    config: TrainConfig, folder: Path, datamodule: TextDataModule, callbacks: list[L.Callback], resume_from: Path | None
) -> L.Trainer:
    """Build the Trainer from the settings.

    Args:
        folder: the run folder.
        datamodule: the text, after `setup`.
        callbacks: additional callbacks.
        resume_from: the checkpoint of a resumed run. metrics.csv keeps its rows up to the step of the checkpoint.
    """
    settings = config.trainer
    validates = datamodule.has_validation and settings.limit_val_batches != 0
    if not validates:
        log.info("This run has no validation, so val/loss is not computed.")
    last_checkpoint = LastCheckpoint(folder / "checkpoints" / "last.ckpt")
    callbacks = [*callbacks, Throughput(), lightning_callbacks.LearningRateMonitor(logging_interval="step")]
    if validates:
        best = lightning_callbacks.ModelCheckpoint(
            folder / "checkpoints", "best", monitor="val/loss", enable_version_counter=False
        )
        callbacks.append(best)
    if settings.patience is not None:
        callbacks.append(lightning_callbacks.EarlyStopping("val/loss", patience=settings.patience))
    if settings.ema_decay is not None:
        callbacks.append(lightning_callbacks.EMAWeightAveraging(decay=settings.ema_decay))
    if settings.progress_bar:
        callbacks.append(Progress())
    max_time = None
    if settings.max_time is not None:
        days, hours, minutes, seconds = map(int, settings.max_time.split(":"))
        max_time = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    # Both come after EMAWeightAveraging: it updates the average before GracefulStop saves, and it puts the average into
    # the checkpoint before StopAtNaN checks the weights.
    callbacks += [StopAtNaN(), GracefulStop(last_checkpoint, settings.max_steps, max_time)]
    return L.Trainer(
        **processes(settings),
        precision=precision(settings.precision, settings.accelerator),
        **{name: getattr(settings, name) for name in UNCHANGED},
        limit_val_batches=settings.limit_val_batches if validates else 0,
        num_sanity_val_steps=0,
        log_every_n_steps=min(settings.log_every_n_steps, batches_per_epoch(config, datamodule)),
        enable_progress_bar=False,  # our callback Progress replaces it
        enable_model_summary=False,
        use_distributed_sampler=False,  # BatchLoader gives each process its part
        default_root_dir=folder,
        callbacks=[*callbacks, last_checkpoint],
        logger=_build_loggers(config, folder, resume_from) if is_first_process() else True,
        plugins=[AtomicCheckpointIO()],
    )


def is_first_process() -> bool:
    """Whether this is the process with rank 0. Only this process writes files."""
    return getattr(rank_zero_only, "rank", 0) == 0


def processes(settings: TrainerConfig) -> dict[str, Any]:
    """Accelerator, devices, nodes and strategy for `L.Trainer`. Under torchrun, its numbers are used."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return {name: getattr(settings, name) for name in ("accelerator", "devices", "num_nodes", "strategy")}
    local_processes, world_size = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    strategy = "ddp" if world_size > 1 else settings.strategy
    numbers = {"devices": local_processes, "num_nodes": world_size // local_processes}
    return {"accelerator": settings.accelerator, "strategy": strategy, **numbers}


def batches_per_epoch(config: TrainConfig, datamodule: TextDataModule) -> int:
    """Number of batches in one epoch with these settings."""
    process_options = processes(config.trainer)
    world_size = process_options["devices"] * process_options["num_nodes"]
    return datamodule.batches_per_epoch(world_size, config.trainer.limit_train_batches)


def precision(wanted: str, accelerator: str) -> Any:
    """The precision for `L.Trainer`. `auto` means bf16-mixed if the hardware has bf16 matrix units, else 32-true."""
    if wanted != "auto":
        return wanted
    if accelerator != "cpu" and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    if accelerator in ("auto", "mps") and torch.backends.mps.is_available():
        return "32-true"
    return "bf16-mixed" if onednn.BF16_IS_FAST else "32-true"


def _build_loggers(config: TrainConfig, folder: Path, resume_from: Path | None) -> list[Any]:
    earlier_rows = [] if resume_from is None else loss_curve.read_metrics(folder)
    steps_done = 0 if resume_from is None else read_checkpoint(resume_from)["global_step"]
    csv_logger = lightning_loggers.CSVLogger(folder, name="", version="", flush_logs_every_n_steps=1)
    for row in earlier_rows:  # the logger starts with an empty file, so write the old rows again
        step = int(row.pop("step"))
        if step < steps_done:
            csv_logger.experiment.log_metrics(row, step)
    if config.logger.name == "tensorboard":
        return [csv_logger, lightning_loggers.TensorBoardLogger(folder, name="", version="")]
    if isinstance(config.logger, WandbConfig):
        project, offline = config.logger.project, config.logger.offline
        return [csv_logger, lightning_loggers.WandbLogger(folder.name, folder, offline=offline, project=project)]
    return [csv_logger]
