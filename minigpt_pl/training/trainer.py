"""The Trainer of the settings: callbacks, loggers, processes, precision."""

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch import loggers as lightning_loggers
from lightning.pytorch.utilities import rank_zero_only

from minigpt_pl.checkpoints import read_checkpoint
from minigpt_pl.config import TrainConfig, TrainerConfig
from minigpt_pl.cpu import onednn
from minigpt_pl.data.datamodule import TextDataModule
from minigpt_pl.training import loss_curve
from minigpt_pl.training.callbacks import Ending, StopAtNaN, TextGenerator, Throughput
from minigpt_pl.training.progress import Progress


def validates(config: TrainConfig, datamodule: TextDataModule) -> bool:
    """Whether anything is held out, and looked at."""
    return datamodule.corpus.validation is not None and config.trainer.limit_val_batches != 0


def build_trainer(
    config: TrainConfig, folder: Path, datamodule: TextDataModule, prompts: list[str], resume_from: Path | None
) -> L.Trainer:
    """The Trainer of the settings, with its callbacks and loggers.

    Args:
        prompts: of the TextGenerator.
        resume_from: the checkpoint that the run goes on with; metrics.csv keeps its lines up to there.
    """
    settings = config.trainer
    checkpoints = folder / "checkpoints"
    callbacks = [
        TextGenerator(config.text_generator, prompts, datamodule.corpus.tokenizer, folder, config.seed),
        Throughput(),
        StopAtNaN(),
        lightning_callbacks.LearningRateMonitor(logging_interval="step"),
    ]
    if validates(config, datamodule):
        best = lightning_callbacks.ModelCheckpoint(
            checkpoints, "best", monitor="val/loss", enable_version_counter=False
        )
        callbacks.append(best)
    if settings.patience is not None:
        callbacks.append(lightning_callbacks.EarlyStopping("val/loss", patience=settings.patience))
    if settings.ema_decay is not None:
        callbacks.append(lightning_callbacks.EMAWeightAveraging(decay=settings.ema_decay))
    if settings.progress_bar:
        callbacks.append(Progress())
    callbacks.append(Ending(checkpoints / "last.ckpt", settings.max_steps, _seconds(settings.max_time)))
    loggers = _build_loggers(config, folder, resume_from) if rank_zero_only.rank == 0 else True
    return L.Trainer(
        **processes(settings),
        precision=precision(settings.precision, settings.accelerator),
        max_epochs=settings.max_epochs,
        accumulate_grad_batches=settings.accumulate_grad_batches,
        gradient_clip_val=settings.gradient_clip_val,
        check_val_every_n_epoch=settings.check_val_every_n_epoch,
        val_check_interval=settings.val_check_interval,
        limit_val_batches=_limit_val_batches(config, datamodule),
        num_sanity_val_steps=0,
        log_every_n_steps=min(settings.log_every_n_steps, datamodule.batches_per_epoch()),
        profiler=settings.profiler,
        deterministic=settings.deterministic,
        detect_anomaly=settings.detect_anomaly,
        enable_progress_bar=False,  # our own shows the numbers in full
        enable_model_summary=False,
        use_distributed_sampler=False,  # the loader shares out its batches itself
        default_root_dir=folder,
        callbacks=callbacks,
        logger=loggers,
    )


def _limit_val_batches(config: TrainConfig, datamodule: TextDataModule) -> int | float:
    if not validates(config, datamodule):
        return 0
    return 1.0 if config.trainer.limit_val_batches is None else config.trainer.limit_val_batches


def _seconds(max_time: str | None) -> float | None:
    if max_time is None:
        return None
    days, hours, minutes, seconds = map(int, max_time.split(":"))
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def processes(settings: TrainerConfig) -> dict[str, Any]:
    """Devices, machines and strategy; where torchrun has started the processes, its numbers."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return {name: getattr(settings, name) for name in ("accelerator", "devices", "num_nodes", "strategy")}
    here, everywhere = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    strategy = "ddp" if everywhere > 1 else settings.strategy
    return {
        "accelerator": settings.accelerator,
        "devices": here,
        "num_nodes": everywhere // here,
        "strategy": strategy,
    }


def precision(wanted: str, accelerator: str) -> str:
    """`auto` is bf16-mixed where the hardware that `accelerator` stands for has bf16 matrix units, else 32-true."""
    if wanted != "auto":
        return wanted
    if accelerator != "cpu" and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    if accelerator in ("auto", "mps") and torch.backends.mps.is_available():
        return "32-true"
    return "bf16-mixed" if onednn.BF16_IS_FAST else "32-true"


def _build_loggers(config: TrainConfig, folder: Path, resume_from: Path | None) -> list[Any]:
    kept = [] if resume_from is None else loss_curve.read_metrics(folder)
    csv_logger = lightning_loggers.CSVLogger(folder, name="", version="", flush_logs_every_n_steps=1)
    steps_done = 0 if resume_from is None else read_checkpoint(resume_from)["global_step"]
    for row in kept:  # the logger begins an empty file: give it what stands, up to where the run goes on
        step = int(row.pop("step"))
        if step < steps_done:
            csv_logger.experiment.log_metrics(row, step)
    if config.logger.name == "tensorboard":
        return [csv_logger, lightning_loggers.TensorBoardLogger(folder, name="", version="")]
    if config.logger.name == "wandb":
        options = {"project": config.logger.project, "offline": config.logger.offline, "save_dir": folder}
        return [csv_logger, lightning_loggers.WandbLogger(name=folder.name, **options)]
    return [csv_logger]
