"""What happens beside the training step: text after an epoch, throughput, a tidy end."""

import json
import logging
import signal
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_only
from tokenizers import Tokenizer

from minigpt_pl import runs
from minigpt_pl.config import TextGeneratorConfig
from minigpt_pl.generation.text import TextModel, generate_texts

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
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            runs.write_aside(
                self.path, "".join(line for line in lines if json.loads(line)["step"] <= trainer.global_step)
            )

    @rank_zero_only
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.config.every_n_epochs or (trainer.current_epoch + 1) % self.config.every_n_epochs:
            return
        controls = {name: getattr(self.config, name) for name in ("num_tokens", "temperature", "top_k")}
        pl_module.eval()
        model = TextModel(pl_module.model, self.tokenizer)
        texts = [group[0] for group in generate_texts(model, self.prompts, seed=self.seed, **controls)]
        pl_module.train()
        place = {"epoch": trainer.current_epoch + 1, "step": trainer.global_step}
        with self.path.open("a", encoding="utf-8") as file:
            for prompt, text in zip(self.prompts, texts, strict=True):
                record = place | {"prompt": prompt, **controls, "seed": self.seed, "text": text}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        for text in texts:
            print(f"epoch {place['epoch']}: {text}", flush=True)
        _log_texts(trainer, texts)


def _log_texts(trainer: L.Trainer, texts: list[str]) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, L.loggers.TensorBoardLogger):
            logger.experiment.add_text("samples", "\n\n".join(texts), trainer.global_step)
        elif isinstance(logger, L.loggers.WandbLogger):
            logger.log_text("samples", columns=["text"], data=[[text] for text in texts], step=trainer.global_step)


class Throughput(L.Callback):
    """Logs `tokens_per_second`: input tokens of all processes, padding included, validation left out."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.tokens, self.seconds = 0, 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.tokens += batch.inputs.numel() * trainer.world_size
        self.seconds += time.perf_counter() - self.start
        pl_module.log("tokens_per_second", self.tokens / self.seconds)


class StopAtStep(L.Callback):
    """Ends training after `max_steps` steps, with a last validation (Trainer(max_steps=...) leaves it out)."""

    def __init__(self, max_steps: int):
        self.max_steps = max_steps

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step >= self.max_steps


class StopOnSignal(L.Callback):
    """The first Ctrl-C (or SIGTERM) ends training after the batch at work, with `last.ckpt` written; after an
    epoch's last batch, with its validation.

    A second Ctrl-C ends it at once, without.
    """

    def __init__(self, checkpoint: Path):
        self.checkpoint, self.asked, self.agreed, self.previous = checkpoint, False, False, {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.previous = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        log.info("Stopping after this batch, with a checkpoint; Ctrl-C again stops at once, without.")

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        # Signals reach the processes at different batches; they must agree, or one would wait for ever.
        self.agreed = trainer.strategy.reduce_boolean_decision(self.asked, all=False)
        if self.agreed and not trainer.is_last_batch:  # after the last, the epoch ends with a checkpoint of its own
            trainer.save_checkpoint(self.checkpoint)

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if self.agreed:  # only now, since the batch's numbers are logged after on_train_batch_end
            raise Interrupted

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
