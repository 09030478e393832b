"""Logs what the training measures: the losses, the learning rate, and the training speed."""

import logging
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from minigpt_pl.files import GrowingFile, write_text
from minigpt_pl.training import loss_curve

log = logging.getLogger(__name__)

COLUMNS = (
    *("epoch", "step", "train/loss", "train/perplexity", "train/epoch_loss"),
    *("val/loss", "val/perplexity", "val/word_loss", "val/word_perplexity", "learning_rate", "tokens_per_second"),
)


class Metrics(L.Callback):
    """Writes `metrics.csv`, and sends the same values to other loggers.

    It writes a row after every `log_every_n_steps` steps of the Trainer, after each validation and after each epoch.
    Lightning itself would log after the checkpoint is written: a crash between the two would lose a row. This callback
    writes before, and the checkpoint holds the size of the file. So after a resume the file has each row exactly once.

    `tokens_per_second` is the training speed of all processes together. It counts input tokens, including padding. It
    does not count the time of validation and of generated texts. It measures from the end of one batch to the end of
    the next, because the GPU still computes when the training step returns.

    Args:
        folder: the run folder.
        loggers: for example TensorBoard. Each row is also sent to them.
    """

    def __init__(self, folder: Path, loggers: list[Logger]):
        self.path, self.loggers = folder / "metrics.csv", loggers
        self.file_state: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        for logger in self.loggers:
            logger.save()
        return self.file.state() if hasattr(self, "file") else {}  # only the first process has the file

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.file_state = state_dict

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.tokens, self.seconds, self.last = 0, 0.0, time.perf_counter()
        if not trainer.is_global_zero:
            return
        if trainer.global_step and self.file_state is None:
            self.file_state = self._convert_old(trainer.global_step)
        self.file = GrowingFile(self.path, self.file_state, header=",".join(COLUMNS) + "\n")

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.last = time.perf_counter()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.learning_rate = trainer.optimizers[0].param_groups[0]["lr"]  # after the step, it is that of the next step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        self.tokens += batch.inputs.numel() * trainer.world_size
        self.seconds += now - self.last
        self.last = now
        pl_module.log("tokens_per_second", self.tokens / self.seconds)
        is_step = trainer.is_last_batch or (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if is_step and trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            names = ("train/loss", "train/perplexity", "tokens_per_second")
            self._write(trainer, *names, learning_rate=self.learning_rate)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.last = time.perf_counter()
        self._write(trainer, "val/loss", "val/perplexity", "val/word_loss", "val/word_perplexity")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._write(trainer, **{"train/epoch_loss": pl_module.epoch_loss()})

    @rank_zero_only
    def _write(self, trainer: L.Trainer, *names: str, **values: float) -> None:
        """Log these names of `trainer.callback_metrics`, and these values. Lightning counts steps from 0."""
        values |= {name: float(trainer.callback_metrics[name]) for name in names}
        step = trainer.global_step - 1
        for logger in self.loggers:
            logger.log_metrics(values | {"epoch": trainer.current_epoch}, step)
        self.file.append(_line({"epoch": trainer.current_epoch, "step": step} | values))

    def _convert_old(self, steps: int) -> dict[str, Any]:
        """Give the file of an older version our columns, and cut it at a step. Returns its state."""
        rows = [row for row in loss_curve.read_metrics(self.path.parent) if row["step"] < steps]
        text = ",".join(COLUMNS) + "\n" + "".join(map(_line, rows))
        write_text(self.path, text)
        return {"size": len(text.encode()), "waiting": ""}


def _line(row: dict[str, float]) -> str:
    return ",".join(str(row.get(name, "")) for name in COLUMNS) + "\n"
