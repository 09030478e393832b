"""Sequences cut from a split, and the order in which they are met.

Both are plain functions of the settings: sequence i is a slice of the memory-mapped ids, and the order of an
epoch depends on (seed, epoch) alone. So a loader's state is two numbers, and a resumed run goes on exactly.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minigpt_pl.data.corpus import Ids
from minigpt_pl.tokenizer import PADDING_ID


class Batch(NamedTuple):
    """One process's share of a step.

    Attributes:
        inputs: (B, L) token ids.
        targets: (B, L), the same ids one place on.
        targets_per_share: counted targets of the whole step (all processes, all accumulated batches) divided
            by the number of shares. A share's summed loss over this is its part of the step's exact mean.
    """

    inputs: Tensor
    targets: Tensor
    targets_per_share: float


class Sequences:
    """A split cut into sequences of `length + 1` tokens: inputs and, one place on, targets.

    Args:
        ids: the split.
        length: L.
        cut: "truncate": the beginning of each document, padded, as the seed does; "pack": consecutive windows
            over all documents, the last one padded.
        end_token: keep the token that closes each document (pack always does).
        count_padding: whether padding counts among the targets.
        device: where sequences are made. On a GPU all the ids are copied there: 2 bytes a token.
    """

    def __init__(
        self, ids: Ids, length: int, cut: str, end_token: bool, count_padding: bool, device: torch.device | str = "cpu"
    ):
        if cut == "pack":
            starts = np.arange(0, len(ids.tokens) - 1, length)
            ends = np.full_like(starts, len(ids.tokens))
        else:
            starts, ends = ids.offsets[:-1], ids.offsets[1:] - (not end_token)
        sizes = np.minimum(ends - starts, length + 1)
        target_counts = np.full_like(sizes, length) if count_padding else sizes - 1
        useful = target_counts > 0  # a document of one word teaches nothing
        self.target_counts = target_counts[useful]
        self.starts, self.sizes = (torch.from_numpy(x[useful]).to(device) for x in (starts, sizes))
        # PyTorch selects from signed integers only.
        self.tokens = torch.from_numpy(ids.tokens.view(f"i{ids.tokens.itemsize}")).to(device)
        self.largest_id = int(np.iinfo(ids.tokens.dtype).max)
        self.places = torch.arange(length + 1, device=device)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """(B,) sequence numbers -> (B, L + 1) ids."""
        inside = self.places < self.sizes[rows, None]
        where = torch.where(inside, self.starts[rows, None] + self.places, 0)
        return torch.where(inside, self.tokens[where].long() & self.largest_id, PADDING_ID)


class BatchLoader:
    """Batches of one process, in an order that every process knows.

    Args:
        sequences: what to draw from.
        batch_size: sequences a batch, over all processes.
        seed: with the epoch it fixes the order; None keeps the order of the text.
        rank, world_size: this process and how many there are; each takes every `world_size`-th sequence.
        accumulate: batches a step.
        max_batches: batches an epoch, at most.
        max_sequences: use this many sequences only, drawn by the seed.
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
        if len(self.rows) % batch_size and len(self.rows) % batch_size < world_size and seed is not None:
            self.num_batches -= 1  # too little left for each process to have a part
        if max_batches is not None:
            self.num_batches = min(self.num_batches, max_batches)
        self.epoch, self.batches_done = 0, 0
        self._resumed = True  # the first pass starts where the state says

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        if not self._resumed and self.batches_done:  # the last pass was left early: go on with the next epoch
            self.epoch, self.batches_done = self.epoch + 1, 0
        self._resumed = False
        order = (
            self.rows if self.seed is None else np.random.default_rng([self.seed, self.epoch]).permutation(self.rows)
        )
        batches = [slice(i * self.batch_size, (i + 1) * self.batch_size) for i in range(self.num_batches)]
        counts = [int(self.sequences.target_counts[order[batch]].sum()) for batch in batches]
        order = torch.from_numpy(order).to(self.sequences.starts.device)
        for number in range(self.batches_done, self.num_batches):
            step = number - number % self.accumulate
            step_counts = counts[step : step + self.accumulate]
            # Before the batch leaves: Lightning never asks for one more than there are.
            last = number + 1 == self.num_batches
            self.epoch, self.batches_done = (self.epoch + 1, 0) if last else (self.epoch, number + 1)
            ids = self.sequences[order[batches[number]][self.rank :: self.world_size]]  # (B, L + 1)
            yield Batch(
                ids[:, :-1].contiguous(),
                ids[:, 1:].contiguous(),
                sum(step_counts) / (self.accumulate * self.world_size),
            )

    # Not state_dict and load_state_dict: Lightning would use them, but leaves out the loading when a checkpoint
    # was written at an epoch's end. The DataModule's own state is always loaded.
    def state(self) -> dict[str, int]:
        return {"epoch": self.epoch, "batches_done": self.batches_done}

    def restore(self, state: dict[str, int]) -> None:
        self.epoch, self.batches_done = state["epoch"], state["batches_done"]
        self._resumed = True
