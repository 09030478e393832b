"""Callbacks that measure the throughput, stop the training, write last.ckpt and check for NaN."""

import logging
import signal
import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from minigpt_pl.errors import InputError
from minigpt_pl.files import atomic_write

log = logging.getLogger(__name__)


class Interrupted(Exception):
    """A signal has stopped the training, after the checkpoint was written."""


class Throughput(L.Callback):
    """Logs `tokens_per_second`: the training speed of all processes together.

    Counts input tokens, including padding. Does not count the time of validation and of generated texts. Measures from
    the end of one batch to the end of the next, because the GPU still computes when the training step returns.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.tokens, self.seconds, self.last = 0, 0.0, time.perf_counter()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.last = time.perf_counter()

    on_validation_end = on_train_epoch_start

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        self.tokens += batch.inputs.numel() * trainer.world_size
        self.seconds += now - self.last
        self.last = now
        pl_module.log("tokens_per_second", self.tokens / self.seconds)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically: a crash during the write keeps the old file intact."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            torch.save(checkpoint, temporary)


class LastCheckpoint(Checkpoint):
    """Writes `last.ckpt` after each epoch, and when the training stops inside an epoch.

    An early stop follows a validation: after it, this class saves. At other stops in an epoch, `GracefulStop` saves.
    """

    def __init__(self, path: Path):
        self.path, self.saved_step = path, -1

    def save(self, trainer: L.Trainer) -> None:
        """Write the checkpoint, unless it was already written at this step."""
        if self.saved_step != trainer.global_step:
            trainer.save_checkpoint(self.path)
            self.saved_step = trainer.global_step

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.should_stop and not trainer.is_last_batch:
            self.save(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.save(trainer)


class GracefulStop(L.Callback):
    """Stops the training after an optimizer step: at `max_steps`, at `max_time`, or after a signal.

    It saves a checkpoint, and a resumed run continues exactly at that step. The Trainer's own `max_steps` and
    `max_time` would end the epoch: a resumed run would start the next one. A last validation follows, except after a
    signal (Ctrl-C or SIGTERM). A second Ctrl-C stops at once, without a checkpoint.

    Args:
        last_checkpoint: writes the checkpoint.
        max_steps: number of optimizer steps; None for no limit.
        max_time: seconds of training, including the time before a resume; None for no limit.
    """

    state_key = "Ending"  # old name of this class; old checkpoints use it

    def __init__(self, last_checkpoint: LastCheckpoint, max_steps: int | None = None, max_time: float | None = None):
        self.last_checkpoint, self.max_steps, self.max_time = last_checkpoint, max_steps, max_time
        self.signalled = False  # in this process
        self.interrupted = False  # in any process
        self.handlers: dict[int, Any] = {}
        self.seconds_before = 0.0

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self._seconds()}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.seconds_before = state_dict["seconds"]

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.start

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start = time.monotonic()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():  # Python accepts signal handlers only there
            signals = (signal.SIGINT, signal.SIGTERM)
            self.handlers = {number: signal.signal(number, self._on_signal) for number in signals}

    def _on_signal(self, number: int, frame: Any) -> None:
        self.signalled = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        log.info("Stopping after this step. Press Ctrl-C again to stop now, without a checkpoint.")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.is_last_batch and (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # inside an optimizer step
        # Signals and time limits can come at different steps in different processes, but all must stop at the same one.
        late = self.max_time is not None and self._seconds() >= self.max_time
        late = trainer.strategy.reduce_boolean_decision(late, all=False)
        self.interrupted = trainer.strategy.reduce_boolean_decision(self.signalled, all=False)
        if late or (self.max_steps is not None and trainer.global_step >= self.max_steps):
            trainer.should_stop = True
        if (self.interrupted or trainer.should_stop) and not trainer.is_last_batch:
            self.last_checkpoint.save(trainer)

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if self.interrupted:  # not earlier: Lightning logs a batch after on_train_batch_end
            raise Interrupted

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


class StopAtNaN(L.Callback):
    """Stops the training if it has diverged. A checkpoint with NaN weights is never written.

    It reads the loss after every `log_every_n_steps` steps and at the end of each epoch.
    """

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        due = trainer.is_last_batch or trainer.global_step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if due and not torch.isfinite(trainer.callback_metrics["train/loss"]):
            raise _diverged(trainer, pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if not all(torch.isfinite(weight).all() for weight in checkpoint["state_dict"].values()):
            raise _diverged(trainer, pl_module)


def _diverged(trainer: L.Trainer, pl_module: L.LightningModule) -> InputError:
    return InputError(
        f"optimizer.learning_rate={pl_module.learning_rate}: the training has diverged (NaN or infinite values at step"
        f" {trainer.global_step}); lower it, or set trainer.gradient_clip_val=1"
    )
