"""Generates texts during the training, like the callback `TextGenerator` of the notebook."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_only

from minigpt_pl.config import ImdbConfig, TextGeneratorConfig, TrainConfig
from minigpt_pl.data.corpus import Corpus
from minigpt_pl.errors import InputError
from minigpt_pl.files import write_text
from minigpt_pl.generation.prompts import encode_prompts
from minigpt_pl.generation.text import generate_texts
from minigpt_pl.text_model import TextModel
from minigpt_pl.tokenizer import END, UNKNOWN_ID


class TextGenerator(L.Callback):
    """Generates one text per prompt after every `every_n_epochs` epochs.

    Prints the texts, appends them to `samples.jsonl` in the run folder, and sends them to loggers that accept text.
    Sampling uses separate random generators, so it does not change the training.

    Raises:
        InputError: a prompt has no known word, or `top_k` is larger than the vocabulary.
    """

    def __init__(self, config: TrainConfig, corpus: Corpus):
        settings, self.tokenizer, self.seed = config.text_generator, corpus.tokenizer, config.seed
        self.every_n_epochs = settings.every_n_epochs
        default_prompt = "this movie is" if isinstance(config.data, ImdbConfig) else _first_known_words(corpus)
        self.prompts = [default_prompt] if settings.prompts is None else settings.prompts
        encode_prompts(self.tokenizer, self.prompts, "text_generator.prompts")
        top_k, words = settings.top_k, self.tokenizer.get_vocab_size()
        if top_k is not None and top_k > words:
            if top_k != TextGeneratorConfig.top_k:
                raise InputError(f"text_generator.top_k={top_k}: the text has only {words} words; lower it")
            top_k = words  # the default value must work with every text
        self.controls: dict[str, Any] = {"num_tokens": settings.num_tokens, "temperature": settings.temperature}
        self.controls["top_k"] = top_k

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.path = Path(trainer.default_root_dir, "samples.jsonl")
        if self.path.exists():  # remove the texts that a resumed run will write again
            with self.path.open(encoding="utf-8") as file:  # splitlines() would also split at U+0085
                lines = [line for line in file if json.loads(line)["step"] <= trainer.global_step]
            write_text(self.path, "".join(lines))

    @rank_zero_only
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        epoch = trainer.current_epoch + 1
        if epoch % self.every_n_epochs:
            return
        network = pl_module.model
        for callback in trainer.callbacks:  # use the averaged network if `ema_decay` is set
            if isinstance(callback, WeightAveraging) and callback._average_model is not None:
                network = callback._average_model.module.model
        network.eval()
        model = TextModel(network, self.tokenizer, pl_module.end_id)
        texts = [group[0] for group in generate_texts(model, self.prompts, seed=self.seed, **self.controls)]
        network.train()
        with self.path.open("a", encoding="utf-8") as file:
            for prompt, text in zip(self.prompts, texts, strict=True):
                record = {"epoch": epoch, "step": trainer.global_step, "prompt": prompt, **self.controls}
                record |= {"seed": self.seed, "text": text}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                print(f"epoch {epoch}: {text}", flush=True)
        for logger in trainer.loggers:
            if isinstance(logger, L.loggers.TensorBoardLogger):
                logger.experiment.add_text("samples", "\n\n".join(texts), trainer.global_step)
            elif isinstance(logger, L.loggers.WandbLogger):
                logger.log_text("samples", columns=["text"], data=[[text] for text in texts], step=trainer.global_step)


def _first_known_words(corpus: Corpus) -> str:
    """The first three known words in a row. If there are none, the first known word."""
    tokens = corpus.train.tokens[:10_000]
    known = (tokens != UNKNOWN_ID) & (tokens != corpus.tokenizer.token_to_id(END))
    three = known[:-2] & known[1:-1] & known[2:]
    start, length = (three.argmax(), 3) if three.any() else (known.argmax(), 1)
    return str(corpus.tokenizer.decode(tokens[start : start + length].tolist()))
