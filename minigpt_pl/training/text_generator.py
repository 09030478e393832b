"""Generates texts during the training, like the callback `TextGenerator` of the notebook."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from minigpt_pl.config import ImdbConfig, TextGeneratorConfig, TrainConfig
from minigpt_pl.data.corpus import Corpus
from minigpt_pl.errors import InputError
from minigpt_pl.files import GrowingFile, complete_lines
from minigpt_pl.generation.prompts import encode_prompts
from minigpt_pl.generation.text import generate_texts
from minigpt_pl.signals import Interrupted
from minigpt_pl.text_model import TextModel
from minigpt_pl.tokenizer import END, UNKNOWN_ID
from minigpt_pl.training.checkpointing import SaveAndStop


class TextGenerator(L.Callback):
    """Generates one text per prompt after every `every_n_epochs` epochs.

    Prints the texts, appends them to `samples.jsonl` in the run folder, and sends them to loggers that accept text.
    Sampling uses separate random generators, so it does not change the training. A signal interrupts it, and a resumed
    run generates the missing texts.

    Args:
        folder: the run folder.
        loggers: for example TensorBoard.
        stop: lets a signal interrupt the texts.

    Raises:
        InputError: a prompt has no known word, or `top_k` is larger than the vocabulary.
    """

    def __init__(self, config: TrainConfig, corpus: Corpus, folder: Path, loggers: Sequence[Logger], stop: SaveAndStop):
        self.path, self.loggers, self.stop = folder / "samples.jsonl", loggers, stop
        self.file_state: dict[str, Any] | None = None
        self.epoch_without_texts: int | None = None  # because a signal came
        settings, self.tokenizer, self.seed = config.text_generator, corpus.tokenizer, config.seed
        self.every_n_epochs = settings.every_n_epochs
        default_prompt = "this movie is" if isinstance(config.data, ImdbConfig) else _first_known_words(corpus)
        self.prompts = [default_prompt] if settings.prompts is None else settings.prompts
        try:
            encode_prompts(self.tokenizer, self.prompts, "text_generator.prompts")
        except InputError as error:
            if settings.prompts is not None:
                raise
            problem = f"the default {default_prompt!r} has no known word; raise model.vocab_size, or give prompts"
            raise InputError(f"text_generator.prompts: {problem}") from error
        top_k, words = settings.top_k, self.tokenizer.get_vocab_size()
        if top_k is not None and top_k > words:
            if top_k != TextGeneratorConfig.top_k:
                raise InputError(f"text_generator.top_k={top_k}: the text has only {words} words; lower it")
            top_k = words  # the default value must work with every text
        self.controls: dict[str, Any] = {"num_tokens": settings.num_tokens, "temperature": settings.temperature}
        self.controls["top_k"] = top_k

    def state_dict(self) -> dict[str, Any]:
        state = self.file.state() if hasattr(self, "file") else {}  # only the first process has the file
        return state | {"epoch_without_texts": self.epoch_without_texts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.file_state, self.epoch_without_texts = state_dict, state_dict["epoch_without_texts"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._open_file(trainer)
        if self.epoch_without_texts is not None:
            self._generate(trainer, pl_module, self.epoch_without_texts)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.epoch_without_texts is not None:  # only the texts were missing, so there was no training
            self._open_file(trainer)
            self._generate(trainer, pl_module, self.epoch_without_texts)

    @rank_zero_only
    def _open_file(self, trainer: L.Trainer) -> None:
        if trainer.global_step and self.file_state is None and self.path.exists():  # a checkpoint of an older version
            lines = [line for line in complete_lines(self.path) if json.loads(line)["step"] <= trainer.global_step]
            self.file_state = {"size": len("".join(lines).encode()), "waiting": ""}
        self.file = GrowingFile(self.path, self.file_state)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._generate(trainer, pl_module, trainer.current_epoch + 1)

    def _generate(self, trainer: Any, pl_module: Any, epoch: int) -> None:
        self.epoch_without_texts = epoch
        network = pl_module.whole_network()
        for callback in trainer.callbacks:  # use the averaged network if `ema_decay` is set
            if isinstance(callback, WeightAveraging) and callback._average_model is not None:
                network = callback._average_model.module.model
        if trainer.is_global_zero:
            network.eval()
            try:
                self._write_texts(trainer, TextModel(network, self.tokenizer, pl_module.end_id), epoch)
            except Interrupted:
                if trainer.world_size == 1:
                    raise
                return  # all processes stop together, at the end of the epoch
            finally:
                network.train()
        self.epoch_without_texts = None

    def _write_texts(self, trainer: Any, model: TextModel, epoch: int) -> None:
        with self.stop.interruptible(trainer):
            texts = [group[0] for group in generate_texts(model, self.prompts, seed=self.seed, **self.controls)]
        lines = []
        for prompt, text in zip(self.prompts, texts, strict=True):
            record = {"epoch": epoch, "step": trainer.global_step, "prompt": prompt, **self.controls}
            record |= {"seed": self.seed, "text": text}
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
            print(f"epoch {epoch}: {text}", flush=True)
        self.file.append("".join(lines))
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("samples", "\n\n".join(texts), trainer.global_step)
            elif isinstance(logger, WandbLogger):
                logger.log_text("samples", columns=["text"], data=[[text] for text in texts], step=trainer.global_step)


def _first_known_words(corpus: Corpus) -> str:
    """The first three known words in a row. If there are none, the first known word."""
    tokens = corpus.train.tokens[:10_000]
    known = (tokens != UNKNOWN_ID) & (tokens != corpus.tokenizer.token_to_id(END))
    three = known[:-2] & known[1:-1] & known[2:]
    start, length = (three.argmax(), 3) if three.any() else (known.argmax(), 1)
    return str(corpus.tokenizer.decode(tokens[start : start + length].tolist()))
