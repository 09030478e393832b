"""Sequences cut from a text, and the order of their batches.

Sequence i is a slice of the memory-mapped ids. The order of the sequences in an epoch depends on (seed, epoch) only. So
two numbers describe the position of a loader, and a resumed run continues exactly.
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
        targets: (B, L) token ids; `targets[b, i]` is the token that follows `inputs[b, i]`.
        num_targets: number of targets that count in the loss: this batch, all processes.
        step_targets: number of targets that count in the loss: all batches of the optimizer step, all processes.
    """

    inputs: Tensor
    targets: Tensor
    num_targets: int
    step_targets: int


class Sequences:
    """Cuts a split of a text into sequences of L + 1 tokens: L inputs and, one position later, L targets.

    Args:
        ids: the split.
        length: L.
        cut: "truncate" takes the start of each document and pads it, as the notebook does. "pack" cuts the whole text
            into consecutive windows, and pads only the last one.
        end_token: whether [END] stays after each document. With "pack" it always stays.
        count_padding: whether padding counts as a target in the loss.
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
        """Return the same sequences on a device. This copies the whole text: 2 or 4 bytes per token."""
        moved = copy.copy(self)
        for name in ("starts", "sizes", "tokens", "positions"):
            setattr(moved, name, getattr(self, name).to(device))
        return moved

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Numbers of sequences (B,) -> token ids (B, L + 1)."""
        inside = self.positions < self.sizes[rows, None]
        where = torch.where(inside, self.starts[rows, None] + self.positions, 0)
        return torch.where(inside, self.tokens[where].long() & self.largest_id, PADDING_ID)


class BatchLoader:
    """Yields the batches of one process. Every process computes the order of all batches itself.

    Args:
        sequences: the training or validation sequences.
        batch_size: sequences per batch, over all processes.
        seed: random seed of the order, used together with the epoch. If None, the sequences keep the order of the text.
        rank: number of this process. It takes every `world_size`-th sequence of a batch.
        world_size: number of processes.
        accumulate: batches per optimizer step.
        max_batches: largest number of batches per epoch.
        max_sequences: use at most this many sequences, drawn with the seed.
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
        self._keep_position = True  # whether the next pass starts at this position

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        if not self._keep_position and self.batches_done:  # the caller stopped the last pass early
            self.epoch, self.batches_done = self.epoch + 1, 0
        self._keep_position = False
        order = self.rows
        if self.seed is not None:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(order)
        batches = [slice(i * self.batch_size, (i + 1) * self.batch_size) for i in range(self.num_batches)]
        counts = [int(self.sequences.target_counts[order[batch]].sum()) for batch in batches]
        rows = torch.from_numpy(order).to(self.sequences.starts.device)
        for number in range(self.batches_done, self.num_batches):
            step = number - number % self.accumulate
            # Update the position before `yield`: Lightning does not continue this loop after the last batch.
            last = number + 1 == self.num_batches
            self.epoch, self.batches_done = (self.epoch + 1, 0) if last else (self.epoch, number + 1)
            ids = self.sequences[rows[batches[number]][self.rank :: self.world_size]]  # (B, L + 1)
            inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
            yield Batch(inputs, targets, counts[number], sum(counts[step : step + self.accumulate]))

    # Not named state_dict: Lightning would then save the loader's state too, but it ignores that state at the end of an
    # epoch. It always loads the state of the DataModule.
    def state(self) -> dict[str, int]:
        """Return the position: the epoch, and the number of batches done in it."""
        return {"epoch": self.epoch, "batches_done": self.batches_done}

    def restore(self, state: dict[str, int]) -> None:
        """Start the next pass at a position that `state` has returned."""
        self.epoch, self.batches_done = state["epoch"], state["batches_done"]
        self._keep_position = True
