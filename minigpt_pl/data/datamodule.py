"""The DataModule: the corpus's two splits as loaders of batches."""

from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from minigpt_pl.config import TrainConfig
from minigpt_pl.data.batches import BatchLoader, Sequences
from minigpt_pl.data.corpus import Corpus, Ids, open_corpus
from minigpt_pl.errors import InputError
from minigpt_pl.tokenizer import PADDING_ID

GPU_TEXT_BYTES = 4 * 2**30  # of encoded text; larger ones stay on the disk


class TextDataModule(L.LightningDataModule):
    """Opens (and, the first time, encodes) the text on construction, since the model's size hangs on its words.

    Args:
        config: `model.vocab_size` and `model.max_length`, `data`, and the trainer's limits are used.
        tokenizer: of a model that brings its own words; None: the text's words are counted.

    Attributes:
        corpus: the encoded text with its tokenizer.
    """

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer | None = None):
        super().__init__()
        self.config = config
        self.train_loader: BatchLoader | None = None
        self.resumed_state: dict[str, Any] | None = None
        self.corpus: Corpus = open_corpus(config.data, config.model.vocab_size, tokenizer)
        rows = len(self._new_train_loader().rows)
        if rows < config.data.batch_size:
            raise InputError(
                f"data.batch_size={config.data.batch_size}: the text gives only {rows} sequences;"
                " lower it, give more text, or take all of its tokens with data.cut=pack"
            )

    def _sequences(self, ids: Ids) -> Sequences:
        data = self.config.data
        return Sequences(
            ids, self.config.model.max_length, data.cut, data.end_token, data.loss_on_padding, self._device(ids)
        )

    def _device(self, ids: Ids) -> torch.device | str:
        """Where batches are made: on the GPU that they are for, if the text leaves room there for the training."""
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        return device if device.type == "cuda" and ids.tokens.nbytes < GPU_TEXT_BYTES else "cpu"

    def batches_per_epoch(self) -> int:
        """Batches of one pass over the training text."""
        return len(self._new_train_loader())

    def target_shares(self) -> Tensor:
        """Each id's share of the training targets, never 0, from 50,000 sequences at most. (V,)"""
        sequences = self._sequences(self.corpus.train)
        rows = np.arange(0, len(sequences), -(-len(sequences) // 50_000))
        targets = sequences[torch.from_numpy(rows)][:, 1:].numpy()
        if not self.config.data.loss_on_padding:
            targets = targets[targets != PADDING_ID]
        counts = np.bincount(targets.ravel(), minlength=self.corpus.tokenizer.get_vocab_size()) + 1
        return torch.from_numpy(counts / counts.sum()).float()

    def train_dataloader(self) -> BatchLoader:
        self.train_loader = self._new_train_loader()
        if self.resumed_state is not None:
            self.train_loader.restore(self.resumed_state)
        return self.train_loader

    def _new_train_loader(self) -> BatchLoader:
        config = self.config
        return BatchLoader(
            self._sequences(self.corpus.train),
            config.data.batch_size,
            config.seed,
            *self._rank_and_world_size(),
            accumulate=config.trainer.accumulate_grad_batches,
            max_batches=config.trainer.limit_train_batches,
            max_sequences=config.data.max_sequences,
        )

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, and what its order hangs on."""
        loader = self.train_loader or self._new_train_loader()
        order = {"seed": loader.seed, "data.batch_size": loader.batch_size, "sequences": len(loader.rows)}
        return loader.state() | {"order": order}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.resumed_state = state_dict
        if self.train_loader is not None:
            self.train_loader.restore(state_dict)

    def val_dataloader(self) -> BatchLoader | list:
        if self.corpus.validation is None:
            return []
        sequences = self._sequences(self.corpus.validation)
        return BatchLoader(sequences, self.config.data.batch_size, None, *self._rank_and_world_size())

    def _rank_and_world_size(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
