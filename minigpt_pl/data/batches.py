"""Sequences cut from a text, and the order of their batches.

Both are functions of the settings: sequence i is a slice of the memory-mapped ids, and the order of an epoch depends on
(seed, epoch) only. So two numbers describe the state of a loader, and a resumed run is exact.
"""

import copy
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minigpt_pl.data.corpus import Ids
from minigpt_pl.tokenizer import PADDING_ID


class Batch(NamedTuple):
    """The part of a batch that one process computes.

    Attributes:
        inputs: (B, L) token ids.
        targets: (B, L) the same ids, one position later.
        num_targets: counted targets of the batch, over all processes.
        step_targets: counted targets of the optimizer step, over all its batches and processes.
    """

    inputs: Tensor
    targets: Tensor
    num_targets: int
    step_targets: int


class Sequences:
    """A split of a text as sequences of `length + 1` tokens: the inputs and, one position later, the targets.

    Args:
        ids: the split.
        length: L.
        cut: "truncate": the start of each document, padded, as in the notebook; "pack": consecutive windows over all
            documents; only the last one is padded.
        end_token: keep [END] after each document (pack always does).
        count_padding: padding counts as a target.
    """

    def __init__(self, ids: Ids, length: int, cut: str, end_token: bool, count_padding: bool):
        if cut == "pack":
            starts = np.arange(0, len(ids.tokens) - 1, length)
            ends = np.full_like(starts, len(ids.tokens))
        else:
            starts, ends = ids.offsets[:-1], ids.offsets[1:] - (not end_token)
        sizes = np.minimum(ends - starts, length + 1)
        target_counts = np.full_like(sizes, length) if count_padding else sizes - 1
        useful = target_counts > 0  # a document of one token has no target
        self.target_counts = target_counts[useful]
        self.starts, self.sizes = torch.from_numpy(starts[useful]), torch.from_numpy(sizes[useful])
        # PyTorch cannot index unsigned integers.
        self.tokens = torch.from_numpy(ids.tokens.view(f"i{ids.tokens.itemsize}"))
        self.largest_id = int(np.iinfo(ids.tokens.dtype).max)
        self.positions = torch.arange(length + 1)

    def to(self, device: torch.device) -> "Sequences":
        """The same sequences on a device. On a GPU this copies the whole text: 2 bytes a token."""
        moved = copy.copy(self)
        for name in ("starts", "sizes", "tokens", "positions"):
            setattr(moved, name, getattr(self, name).to(device))
        return moved

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Numbers of sequences (B,) -> ids (B, L + 1)."""
        inside = self.positions < self.sizes[rows, None]
        where = torch.where(inside, self.starts[rows, None] + self.positions, 0)
        return torch.where(inside, self.tokens[where].long() & self.largest_id, PADDING_ID)


class BatchLoader:
    """The batches of one process. All processes know the order of all batches.

    Args:
        sequences: the training or validation sequences.
        batch_size: sequences per batch, over all processes.
        seed: random seed of the order, together with the epoch; None: the order of the text.
        rank, world_size: number of this process, and of all processes. Each takes every `world_size`-th sequence.
        accumulate: batches per optimizer step.
        max_batches: most batches per epoch.
        max_sequences: use only this many sequences, drawn with the seed.
    """

    def __init__(
        self,
        sequences: Sequences,
        batch_size: int,
        seed: int | None,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        max_batches: int | None = None,
        max_sequences: int | None = None,
    ):
        self.sequences, self.batch_size, self.seed = sequences, batch_size, seed
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate
        self.rows = np.arange(len(sequences))
        if max_sequences is not None and max_sequences < len(sequences):
            self.rows = np.sort(np.random.default_rng(seed).permutation(len(sequences))[:max_sequences])
        self.num_batches = -(-len(self.rows) // batch_size)
        if 0 < len(self.rows) % batch_size < world_size and seed is not None:
            self.num_batches -= 1  # the last batch has too few sequences for all processes
        if max_batches is not None:
            self.num_batches = min(self.num_batches, max_batches)
        self.epoch, self.batches_done = 0, 0
        self._resumed = True  # the first pass starts at the stored position

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        if not self._resumed and self.batches_done:  # the last pass was left early: start the next epoch
            self.epoch, self.batches_done = self.epoch + 1, 0
        self._resumed = False
        order = self.rows
        if self.seed is not None:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(order)
        batches = [slice(i * self.batch_size, (i + 1) * self.batch_size) for i in range(self.num_batches)]
        counts = [int(self.sequences.target_counts[order[batch]].sum()) for batch in batches]
        rows = torch.from_numpy(order).to(self.sequences.starts.device)
        for number in range(self.batches_done, self.num_batches):
            step = number - number % self.accumulate
            # Set before `yield`: Lightning never asks for a batch after the last one.
            last = number + 1 == self.num_batches
            self.epoch, self.batches_done = (self.epoch + 1, 0) if last else (self.epoch, number + 1)
            ids = self.sequences[rows[batches[number]][self.rank :: self.world_size]]  # (B, L + 1)
            inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
            yield Batch(inputs, targets, counts[number], sum(counts[step : step + self.accumulate]))

    # The names are not state_dict and load_state_dict: Lightning would call them, but it does not load the state of a
    # checkpoint from the end of an epoch. It always loads the state of the DataModule.
    def state(self) -> dict[str, int]:
        """Position of the loader: epoch, and batches done in it."""
        return {"epoch": self.epoch, "batches_done": self.batches_done}

    def restore(self, state: dict[str, int]) -> None:
        """Continue at a position that `state` has returned."""
        self.epoch, self.batches_done = state["epoch"], state["batches_done"]
        self._resumed = True
