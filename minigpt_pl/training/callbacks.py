"""What happens beside the training step: text after an epoch, throughput, a tidy end."""

import json
import logging
import signal
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Checkpoint, WeightAveraging
from lightning.pytorch.utilities import rank_zero_only
from tokenizers import Tokenizer

from minigpt_pl.config import TextGeneratorConfig
from minigpt_pl.errors import InputError
from minigpt_pl.files import write_text
from minigpt_pl.generation.text import generate_texts
from minigpt_pl.text_model import TextModel

log = logging.getLogger(__name__)


class Interrupted(Exception):
    """Training was asked to stop, and its checkpoint is written."""


class TextGenerator(L.Callback):
    """Writes a text for every prompt after each `every_n_epochs`, as the seed's callback of that name does.

    The texts are printed, appended to `samples.jsonl` in the run folder, and sent to loggers that take text.
    They have generators of their own, so training is the same with and without them.
    """

    def __init__(self, config: TextGeneratorConfig, prompts: list[str], tokenizer: Tokenizer, folder: Path, seed: int):
        self.config, self.prompts, self.tokenizer, self.seed = config, prompts, tokenizer, seed
        self.path = folder / "samples.jsonl"

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.path.exists():  # a resumed run writes again what came after its checkpoint
            with self.path.open(encoding="utf-8") as file:  # not splitlines: a text may hold U+0085 and the like
                lines = list(file)
            write_text(self.path, "".join(line for line in lines if json.loads(line)["step"] <= trainer.global_step))

    @rank_zero_only
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.config.every_n_epochs or (trainer.current_epoch + 1) % self.config.every_n_epochs:
            return
        controls = {name: getattr(self.config, name) for name in ("num_tokens", "temperature", "top_k")}
        network = _averaged(trainer, pl_module).model.eval()
        model = TextModel(network, self.tokenizer, pl_module.hparams.end_id)
        texts = [group[0] for group in generate_texts(model, self.prompts, seed=self.seed, **controls)]
        network.train()
        place = {"epoch": trainer.current_epoch + 1, "step": trainer.global_step}
        with self.path.open("a", encoding="utf-8") as file:
            for prompt, text in zip(self.prompts, texts, strict=True):
                record = place | {"prompt": prompt, **controls, "seed": self.seed, "text": text}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        for text in texts:
            print(f"epoch {place['epoch']}: {text}", flush=True)
        _log_texts(trainer, texts)


def _averaged(trainer: L.Trainer, pl_module: L.LightningModule) -> L.LightningModule:
    """The module whose weights are validated and saved: the average where `ema_decay` asks for one."""
    for callback in trainer.callbacks:
        if isinstance(callback, WeightAveraging):
            return callback._average_model.module  # there is no public way to it
    return pl_module


def _log_texts(trainer: L.Trainer, texts: list[str]) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, L.loggers.TensorBoardLogger):
            logger.experiment.add_text("samples", "\n\n".join(texts), trainer.global_step)
        elif isinstance(logger, L.loggers.WandbLogger):
            logger.log_text("samples", columns=["text"], data=[[text] for text in texts], step=trainer.global_step)


class Throughput(L.Callback):
    """Logs `tokens_per_second`: input tokens of all processes, padding included; validation and texts left out.

    Time runs from batch to batch, since a GPU still computes when Python has left the step.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.tokens, self.seconds, self.since = 0, 0.0, time.perf_counter()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.since = time.perf_counter()

    on_validation_end = on_train_epoch_start

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        self.tokens, self.seconds, self.since = (
            self.tokens + batch.inputs.numel() * trainer.world_size, self.seconds + now - self.since, now,
        )  # fmt: skip
        pl_module.log("tokens_per_second", self.tokens / self.seconds)


class Ending(Checkpoint):
    """Keeps `last.ckpt` where training stands, and ends it: after `max_steps`, after `max_time`, on a signal.

    `last.ckpt` is written after each epoch, and wherever training ends inside one, always behind a whole step, so
    a resumed run goes on exactly. (Trainer's own `max_steps` and `max_time` end the epoch with it, and a resumed
    run would begin the next.) After `max_steps` and `max_time` there is a last validation; the first Ctrl-C or
    SIGTERM ends without one, and a second Ctrl-C at once, without a checkpoint.

    Args:
        checkpoint: the path of `last.ckpt`.
        max_steps: optimizer steps; None: no limit.
        max_time: seconds of training, those before a resumed run's checkpoint included; None: no limit.
    """

    def __init__(self, checkpoint: Path, max_steps: int | None = None, max_time: float | None = None):
        self.checkpoint, self.max_steps, self.max_time = checkpoint, max_steps, max_time
        self.asked, self.agreed, self.previous = False, False, {}
        self.seconds_before, self.saved_step = 0.0, None

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self._seconds()}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.seconds_before = state_dict["seconds"]

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.start

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start = time.monotonic()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.previous = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        log.info("Stopping after this step, with a checkpoint; Ctrl-C again stops at once, without.")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.is_last_batch and (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # inside a step
        over = self.max_steps is not None and trainer.global_step >= self.max_steps
        late = self.max_time is not None and self._seconds() >= self.max_time
        # Signals and clocks reach the processes at different batches; they must agree, or one would wait for ever.
        self.agreed = trainer.strategy.reduce_boolean_decision(self.asked, all=False)
        if over or trainer.strategy.reduce_boolean_decision(late, all=False):
            trainer.should_stop = True
        if (self.agreed or trainer.should_stop) and not trainer.is_last_batch:
            self._save(trainer)

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if self.agreed:  # only now, since the batch's numbers are logged after on_train_batch_end
            raise Interrupted

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.saved_step != trainer.global_step:
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.checkpoint)
        self.saved_step = trainer.global_step

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


class StopAtNaN(L.Callback):
    """Ends a training that has diverged before it harms `last.ckpt`; looks every `log_every_n_steps`, and before
    an epoch's end."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        looks = trainer.is_last_batch or trainer.global_step % trainer.log_every_n_steps == 0
        if looks and not torch.isfinite(trainer.callback_metrics["train/loss"]):
            raise InputError(
                f"optimizer.learning_rate={pl_module.learning_rate}: the loss is no number any more at step"
                f" {trainer.global_step}; lower it, or set trainer.gradient_clip_val=1"
            )
