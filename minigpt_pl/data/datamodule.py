"""The LightningDataModule: turns a text into batches of token ids."""

from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as L
import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from minigpt_pl.config import DataConfig, ModelConfig
from minigpt_pl.data.batches import BatchLoader, Sequences
from minigpt_pl.data.corpus import Corpus, Ids, encode_text, read_corpus
from minigpt_pl.data.streaming import StreamLoader
from minigpt_pl.errors import InputError
from minigpt_pl.tokenizer import END, PADDING_ID, fingerprint

PAIR_TOKENS = 20_000_000  # of the text, whose neighbours are counted
MAX_GPU_TEXT_BYTES = 4 * 2**30  # a larger encoded text stays in main memory


class PairCounts(NamedTuple):
    """How often a token follows another: int64 tensors of one length, with an entry for each pair that occurs."""

    first: Tensor
    second: Tensor
    counts: Tensor


class TextDataModule(L.LightningDataModule):
    """Encodes a text, and yields batches of its token ids.

    The vocabulary size of the model depends on the text. So a script first calls `prepare_data()` and `setup("fit")`,
    and then builds the model (docs/examples/lightning_script.py).

    Args:
        data: where the text is and how it is cut, for example `TextConfig(path="my.txt")` or `ImdbConfig()`.
        max_vocab_size: maximum vocabulary size. It is smaller if the text has fewer different words.
        max_length: L, tokens per sequence.
        seed: random seed of the order of the sequences.
        tokenizer: its vocabulary is used. If None, the vocabulary is the most frequent words of the training text.
    """

    # `setup` sets these attributes.
    corpus: Corpus
    tokenizer: Tokenizer
    vocab_size: int  # V, number of token ids; also the number of logits that the model needs
    end_id: int | None  # id of [END]; None if `data.end_token` is false
    num_sequences: int  # training sequences per epoch
    has_validation: bool  # whether the held-out text has at least one target

    def __init__(
        self,
        data: DataConfig,
        max_vocab_size: int = ModelConfig.vocab_size,
        max_length: int = ModelConfig.max_length,
        seed: int = 0,
        tokenizer: Tokenizer | None = None,
    ):
        super().__init__()
        self.data, self.max_vocab_size, self.max_length, self.seed = data, max_vocab_size, max_length, seed
        self._given_tokenizer = tokenizer
        self.folder: Path | None = None  # of the encoded text; who knows it may set it, and `prepare_data` does nothing
        self._train_loader: BatchLoader | None = None
        self._resumed_state: dict[str, Any] = {}

    def prepare_data(self) -> None:
        """Encode the text, unless the cache already has it. Lightning calls this once per machine.

        Raises:
            InputError: the text cannot be found or read.
        """
        if self.folder is None:
            self.folder = encode_text(self.data, self.max_vocab_size, self._given_tokenizer)

    def setup(self, stage: str | None = None) -> None:
        """Open the encoded text. Lightning calls this in every process.

        Raises:
            InputError: the text is too small for one batch.
        """
        if hasattr(self, "corpus"):
            return
        self.prepare_data()  # in the other processes, the text is already in the cache
        assert self.folder is not None
        self.corpus = read_corpus(self.folder)
        self.tokenizer, self.vocab_size = self.corpus.tokenizer, self.corpus.tokenizer.get_vocab_size()
        self.end_id = self.tokenizer.token_to_id(END) if self.data.end_token else None
        self._train_sequences = self._cut(self.corpus.train)
        self._val_sequences = None if self.corpus.validation is None else self._cut(self.corpus.validation)
        self.has_validation = bool(self._val_sequences)
        self.num_sequences = self._build_train_loader(self._train_sequences).num_sequences
        if not self.num_sequences and not self.data.end_token:
            raise InputError(
                "data.end_token=false: all documents have one word, so there is nothing to predict; give longer"
                " documents, or set data.end_token=true"
            )
        if self.num_sequences < self.data.batch_size:
            raise InputError(
                f"data.batch_size={self.data.batch_size}: the text has only {self.num_sequences} sequences;"
                " lower it, give more text, cut it into more documents, or set data.cut=pack to use all tokens"
            )

    def _cut(self, ids: Ids) -> Sequences:
        return Sequences(ids, self.max_length, self.data.cut, self.data.end_token, self.data.loss_on_padding)

    def batches_per_epoch(self, limit: int | None = None) -> int:
        """Number of batches in one epoch; at most `limit`."""
        return len(self._build_train_loader(self._train_sequences, max_batches=limit))

    def train_dataloader(self) -> BatchLoader:
        options = {}
        if (trainer := self.trainer) is not None:
            options = {"rank": trainer.global_rank, "world_size": trainer.world_size}
            options["accumulate"] = trainer.accumulate_grad_batches
            if isinstance(trainer.limit_train_batches, int):  # Lightning itself applies a fraction
                options["max_batches"] = trainer.limit_train_batches
        sequences = self._train_sequences if self.data.streaming else self._on_device(self._train_sequences)
        self._train_loader = self._build_train_loader(sequences, **options)
        if self._resumed_state:
            self._train_loader.restore(self._resumed_state)
        return self._train_loader

    def _build_train_loader(self, sequences: Sequences, **options: Any) -> BatchLoader:
        if self.data.streaming:
            share = self.data.validation_share
            return StreamLoader(self.corpus, self._train_sequences, share, self.data.batch_size, self.seed, **options)
        max_sequences = self.data.max_sequences
        return BatchLoader(sequences, self.data.batch_size, self.seed, max_sequences=max_sequences, **options)

    def val_dataloader(self) -> BatchLoader | list[Any]:
        if not self._val_sequences:
            return []
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return BatchLoader(self._on_device(self._val_sequences), self.data.batch_size, None, rank, world_size)

    def _on_device(self, sequences: Sequences) -> Sequences:
        """Copy the text to the GPU if it is smaller than MAX_GPU_TEXT_BYTES. Then the GPU also builds the batches."""
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        return sequences.to(device) if device.type == "cuda" and sequences.nbytes < MAX_GPU_TEXT_BYTES else sequences

    def state_dict(self) -> dict[str, Any]:
        """The position in the epoch, the settings that determine the order, and the fingerprint of the tokenizer."""
        position = {} if self._train_loader is None else self._train_loader.state() | {"order": self.order}
        return position | {"tokenizer": fingerprint(self.tokenizer)}

    @property
    def order(self) -> dict[str, int]:
        """The settings that determine the order of the batches: name -> value."""
        return {"seed": self.seed, "data.batch_size": self.data.batch_size, "sequences": self.num_sequences}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "epoch" in state_dict:  # checkpoints of `convert` have no position
            self._resumed_state = state_dict
            if self._train_loader is not None:
                self._train_loader.restore(state_dict)

    def target_shares(self) -> Tensor:
        """Share of each token id among the training targets, (V,), estimated from at most 50,000 sequences."""
        targets = self._some_sequences()[:, 1:].numpy()
        if not self.data.loss_on_padding:
            targets = targets[targets != PADDING_ID]
        counts = np.bincount(targets.ravel(), minlength=self.vocab_size) + 1  # so no share is 0
        return torch.from_numpy(counts / counts.sum()).float()

    def pair_counts(self) -> PairCounts:
        """How often a token follows another: in at most 50,000 sequences, and in the first tokens of the text."""
        sequences, end_id = self._some_sequences(), self.tokenizer.token_to_id(END)
        tokens = torch.from_numpy(self.corpus.train.shard(0).tokens[:PAIR_TOKENS].astype(np.int64))
        inside = tokens[:-1] != end_id  # the next document is no continuation
        if not self.data.end_token:
            inside &= tokens[1:] != end_id
        parts = [(tokens[:-1][inside], tokens[1:][inside]), (sequences[:, :-1].flatten(), sequences[:, 1:].flatten())]
        pairs = torch.cat([first * self.vocab_size + second for first, second in parts])
        if not self.data.loss_on_padding:
            pairs = pairs[pairs % self.vocab_size != PADDING_ID]
        pairs, counts = torch.unique(pairs, return_counts=True)
        return PairCounts(pairs // self.vocab_size, pairs % self.vocab_size, counts)

    def _some_sequences(self) -> Tensor:
        """At most 50,000 training sequences, (N, L + 1)."""
        return self._train_sequences[np.arange(0, len(self._train_sequences), -(-len(self._train_sequences) // 50_000))]
