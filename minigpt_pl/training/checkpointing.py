"""When the training saves a checkpoint, when it stops, and how a checkpoint is written."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint, WeightAveraging
from torch.distributed.tensor import DTensor

from minigpt_pl import signals
from minigpt_pl.checkpoints import DamagedError, read_checkpoint, read_whole_checkpoint
from minigpt_pl.config import CheckpointConfig
from minigpt_pl.errors import InputError, TextLostError
from minigpt_pl.files import atomic_write, remove
from minigpt_pl.runs import META, checkpoints_of
from minigpt_pl.sharded_checkpoints import split, write_parts
from minigpt_pl.signals import SIGNALS, Interrupted

log = logging.getLogger(__name__)

VOTE_SECONDS = 2


class CheckpointWriter(TorchCheckpointIO):
    """Writes checkpoints atomically. Keeps the older files of `last.ckpt` as `step-<step>.ckpt`.

    If the weights are sharded, the checkpoint is too (`sharded_checkpoints`), and all processes must call
    `save_checkpoint`. Otherwise only the first process calls it.

    A failed write is a warning. After `max_failures` of them in a row, it is an error.

    Args:
        keep: number of newest checkpoints to keep, `last.ckpt` included.
    """

    def __init__(self, keep: int, max_failures: int):
        super().__init__()
        self.keep, self.max_failures, self.failures = keep, max_failures, 0
        self.step_of_last: int | None = None  # None: not written by this process

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        try:
            if any(isinstance(weight, DTensor) for weight in checkpoint["state_dict"].values()):
                self._save_sharded(checkpoint, path)
            else:
                with self._new_checkpoint(path, checkpoint["global_step"]) as temporary:
                    self._write(checkpoint, temporary)
        except OSError as error:  # for example a full disk, or a network share that is gone
            self.failures += 1
            if self.failures >= self.max_failures or not path.parent.parent.is_dir():
                raise InputError(
                    f"checkpoint.max_failures={self.max_failures}: {path} cannot be written ({error.strerror});"
                    f" free some space or mend the disk, and continue with resume={path.parent.parent.name}"
                ) from error
            log.warning("%s: cannot be written (%s). The training continues, and tries again.", path, error.strerror)
        else:
            self.failures = 0

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        if Path(path).is_dir():  # a sharded checkpoint, for a strategy that does not shard
            return read_whole_checkpoint(Path(path))
        return super().load_checkpoint(path, map_location, weights_only)

    @contextmanager
    def _new_checkpoint(self, path: Path, step: int) -> Iterator[Path]:
        """`atomic_write` of a checkpoint. The older one is renamed or replaced, and the oldest is removed."""
        path.parent.mkdir(exist_ok=True)  # not its parents: somebody may have removed the run folder
        is_last, replaced = path.name == "last.ckpt", path.with_name("best.ckpt.replaced")
        with atomic_write(path) as temporary:
            yield temporary
            if is_last and path.exists():
                remove(old := path.with_name(self._name_of_old(path)))
                path.replace(old)
            elif path.is_dir() or (path.exists() and temporary.is_dir()):  # the system does not replace folders
                remove(replaced)
                path.replace(replaced)
        remove(replaced)
        if is_last:
            self.step_of_last = step
        self._remove_old(path.parent)

    def _save_sharded(self, checkpoint: dict[str, Any], path: Path) -> None:
        contents, tensors = split(checkpoint)

        def begin() -> Path:
            folder = stack.enter_context(self._new_checkpoint(path, checkpoint["global_step"]))
            folder.mkdir()
            return folder

        def finish() -> None:
            self._write(contents | {"files": files}, folder / META)
            stack.close()

        with ExitStack() as stack:  # empty in all processes but the first
            folder = _in_first_process(begin)
            files = write_parts(tensors, folder)
            _in_first_process(finish)

    def _write(self, checkpoint: dict[str, Any], path: Path) -> None:
        with path.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # PyTorch hides the OSError of `file.write` behind "unexpected pos"
                raise error.__context__ or error  # noqa: B904

    def _name_of_old(self, last: Path) -> str:
        """The new name of the previous `last.ckpt`."""
        try:
            step = self.step_of_last
            return f"step-{read_checkpoint(last)['global_step'] if step is None else step:08d}.ckpt"
        except InputError:  # it is damaged, and the run continues from another one
            return "last.ckpt.damaged"

    def _remove_old(self, folder: Path) -> None:
        older = [path for path in checkpoints_of(folder.parent) if path.name.startswith("step-")]
        for path in older[self.keep - 1 :]:
            remove(path)


def _in_first_process(action: Callable[[], Any]) -> Any:
    """Do this in the first process. All processes return its result, or raise its OSError."""
    result: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            result = [action()]
        except OSError as error:
            result = [error]
    dist.broadcast_object_list(result)
    if isinstance(result[0], OSError):
        raise result[0]
    return result[0]


class SaveAndStop(Checkpoint):
    """Decides after each optimizer step whether to save a checkpoint, and whether to stop.

    It saves `last.ckpt` after each epoch, after the steps and minutes of `settings`, and before the training stops. It
    saves `best.ckpt` after a validation with a lower val/loss than all before.

    It stops at `max_steps`, at `max_time` and after a signal. A resumed run continues exactly at that step. (The
    Trainer's own `max_steps` and `max_time` would end the epoch: a resumed run would start the next one.) A last
    validation follows, except after a signal. A signal also interrupts a validation, which a resumed run repeats. A
    second signal ends the process at once.

    Args:
        folder: of the checkpoints.
        max_steps: number of optimizer steps; None for no limit.
        max_time: seconds of training, including the time before a resume; None for no limit.
    """

    def __init__(
        self,
        folder: Path,
        settings: CheckpointConfig,
        max_steps: int | None = None,
        max_time: float | None = None,
    ):
        self.folder, self.settings, self.max_steps, self.max_time = folder, settings, max_steps, max_time
        self.writer = CheckpointWriter(settings.keep, settings.max_failures)
        self.best = math.inf  # the lowest val/loss
        self.saved_step = -1  # the step of last.ckpt
        self.save_is_due = False
        self.seconds_before = 0.0
        self.signal = 0  # the signal that this process has got
        self.calls, self.next_vote = 0, 1  # of `_vote`: since the last vote, and until the next one
        self.vote_time = 0.0
        self.raise_at_once = False  # in the signal handler
        self.validating = False
        self.handlers: dict[Any, Any] = {}

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self._seconds(), "best": self.best, "validating": self.validating}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.seconds_before, self.best = state_dict["seconds"], state_dict["best"]

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        # Older versions kept the time under this name. For newer ones, load_state_dict follows.
        self.seconds_before = checkpoint.get("callbacks", {}).get("Ending", {}).get("seconds", 0.0)

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.start

    def seconds_left(self) -> float:
        """Seconds until `max_time`; infinite without a limit."""
        return math.inf if self.max_time is None else self.max_time - self._seconds()

    # ---------------------------------------------------------------------------------------- after a step

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start = self.saved_time = self.vote_time = time.monotonic()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # A run that was killed after a validation continues from before it. The best.ckpt of this validation stays.
        path = self.folder / "best.ckpt"
        if trainer.global_step and path.exists():
            try:
                states = read_checkpoint(path)["callbacks"].values()
            except DamagedError as error:
                log.warning("%s. The next validation replaces it.", error)
                states = []
            # Older versions have "best_model_score", the state of Lightning's ModelCheckpoint.
            scores = [state.get("best", state.get("best_model_score")) for state in states]
            self.best = min([self.best, *(float(score) for score in scores if score is not None)])
            self.best = trainer.strategy.broadcast(self.best)
        self.handlers = signals.set_handlers(dict.fromkeys(SIGNALS, self._on_signal))  # replaces Lightning's

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.is_last_batch and (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # inside an optimizer step
        late, due, number = self._vote(trainer)
        if self.settings.every_n_steps is not None:
            due |= trainer.global_step % self.settings.every_n_steps == 0
        if late or (self.max_steps is not None and trainer.global_step >= self.max_steps):
            trainer.should_stop = True
        self.save_is_due |= bool(due or number or trainer.should_stop)
        interval: Any = trainer.val_check_batch  # batches
        validates = (trainer.current_epoch + 1) % (trainer.check_val_every_n_epoch or 1) == 0
        if trainer.is_last_batch or (validates and (batch_idx + 1) % interval == 0):
            return  # this class saves after the validation; a run that is resumed from here would skip it
        if self.save_is_due:
            self._save_last(trainer)
        if number:
            raise Interrupted(number)

    def _vote(self, trainer: L.Trainer, now: bool = False) -> list[int]:
        """Whether the time is over, whether to save, and the signal. All processes get the same answer.

        Several processes vote every two seconds, because a vote is a device synchronisation. They count calls of this
        function instead of seconds, because all of them must vote after the same step.

        Args:
            now: do not wait for the next vote.
        """
        minutes, time_ = self.settings.every_minutes, time.monotonic()
        late = self.seconds_left() <= 0
        due = minutes is not None and time_ - self.saved_time >= 60 * minutes
        if trainer.world_size == 1:
            return [late, due, self.signal]
        self.calls += 1
        if self.calls < self.next_vote and not now:
            return [0, 0, 0]
        calls = int(VOTE_SECONDS * self.calls / max(time_ - self.vote_time, 1e-3))
        votes = torch.tensor([late, due, self.signal, -max(calls, 1)], device=trainer.strategy.root_device)
        *answer, calls = trainer.strategy.reduce(votes, reduce_op="max").tolist()
        self.calls, self.next_vote, self.vote_time = 0, -calls, time.monotonic()
        return answer

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save_last(trainer)
        if trainer.world_size > 1 and (number := self._vote(trainer, now=True)[2]):
            raise Interrupted(number)  # one process alone stops after the next step

    # -------------------------------------------------------------------------------------------- validation

    def _restart_votes(self) -> None:
        """Measure the calls per second anew. A training step takes longer than a batch of the validation."""
        self.calls, self.next_vote, self.vote_time = 0, 2, time.monotonic()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restart_votes()

    def on_validation_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self.validating = True
        if number := self._vote(trainer)[2]:
            raise Interrupted(number)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.validating = False
        self._restart_votes()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loss = float(trainer.callback_metrics["val/loss"])
        if loss < self.best:
            before, self.best = self.best, loss
            if not self._save(trainer, "best.ckpt"):
                self.best = before
        if not trainer.is_last_batch and (self.save_is_due or trainer.should_stop):  # EarlyStopping may set should_stop
            self._save_last(trainer)

    # ------------------------------------------------------------------------------------------------ saving

    def _save_last(self, trainer: L.Trainer) -> None:
        """Write last.ckpt, unless it was already written at this step."""
        self.save_is_due, self.saved_time = False, time.monotonic()
        if self.saved_step != trainer.global_step and self._save(trainer, "last.ckpt"):
            self.saved_step = trainer.global_step

    def _save(self, trainer: L.Trainer, name: str) -> bool:
        """Write a checkpoint. Returns whether this succeeded. The first process knows it, and tells the others."""
        trainer.save_checkpoint(self.folder / name)
        return trainer.strategy.broadcast(self.writer.failures) == 0

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        # If one of several processes has lost the text, the others cannot take part in saving.
        is_alone_without_text = isinstance(exception, TextLostError) and trainer.world_size == 1
        if isinstance(exception, Interrupted) or is_alone_without_text:
            if self.validating:
                for callback in trainer.callbacks:  # type: ignore[attr-defined]
                    if isinstance(callback, WeightAveraging):
                        callback.on_validation_epoch_end(trainer, pl_module)  # puts the weights of the training back
                progress: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress
                progress.reset()  # a resumed run repeats the whole validation
                progress.total.ready = progress.total.started = 1
            self._save_last(trainer)
        self.teardown(trainer, pl_module, "fit")  # Lightning does not call it after an exception

    # ----------------------------------------------------------------------------------------------- signals

    def _on_signal(self, number: int, frame: Any) -> None:
        signals.set_handlers(dict.fromkeys(SIGNALS, signals.exit_at_once))
        signals.say("Stopping after this step. A second signal (or Ctrl-C again) stops at once, without a checkpoint.")
        self.signal = number
        if self.raise_at_once:
            raise Interrupted(number)

    @contextmanager
    def interruptible(self, trainer: L.Trainer) -> Iterator[None]:
        """Inside, a signal raises `Interrupted` at once, and this class saves a checkpoint. For slow work after a step.

        Several processes must stop at the same step. So for them the caller catches `Interrupted`, and continues.
        """
        self.raise_at_once = True
        try:
            if self.signal:
                raise Interrupted(self.signal)
            yield
        finally:
            self.raise_at_once = False

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        signals.set_handlers(self.handlers)


class StopAtNaN(L.Callback):
    """Stops the training if it has diverged. A checkpoint with NaN weights is never written.

    It reads the loss after every `log_every_n_steps` steps of the Trainer, and at the end of each epoch.
    """

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        is_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        due = trainer.is_last_batch or (is_step and trainer.global_step % trainer.log_every_n_steps == 0)  # type: ignore[attr-defined]
        if due and not torch.isfinite(trainer.callback_metrics["train/loss"]):
            raise _diverged(trainer, pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        weights = [w.to_local() if isinstance(w, DTensor) else w for w in checkpoint["state_dict"].values()]
        finite = torch.tensor(float(all(w.isfinite().all() for w in weights)), device=trainer.strategy.root_device)
        if not trainer.strategy.reduce(finite, reduce_op="min"):  # each process has other parts of the weights
            raise _diverged(trainer, pl_module)


def _diverged(trainer: L.Trainer, pl_module: L.LightningModule) -> InputError:
    return InputError(
        f"optimizer.learning_rate={pl_module.learning_rate}: the training has diverged (NaN or infinite values at step"
        f" {trainer.global_step}); lower it, or set trainer.gradient_clip_val=1"
    )
