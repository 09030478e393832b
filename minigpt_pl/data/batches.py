"""Sequences cut from a text, and the order of their batches.

A sequence is a slice of the memory-mapped ids. The order of the sequences in an epoch depends on (seed, epoch) only. So
two numbers describe the position of a loader, and a resumed run continues exactly. A large text is shuffled in windows,
so the memory does not depend on its length.
"""

import copy
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minigpt_pl.data.corpus import Ids, ShardSize
from minigpt_pl.tokenizer import PADDING_ID

WINDOW = 2**24  # sequences that are shuffled together: 128 MB in each process


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
        cut: "truncate" takes the start of each document and pads it, as the notebook does. "pack" cuts each shard into
            consecutive windows, and pads only the last one.
        end_token: whether [END] stays after each document. With "pack" it always stays.
        count_padding: whether padding counts as a target in the loss.
    """

    def __init__(self, ids: Ids, length: int, cut: str, end_token: bool, count_padding: bool):
        self.ids, self.length, self.cut = ids, length, cut
        self.end_token, self.count_padding = end_token, count_padding
        # A document of one word without [END] has no target.
        self.leaves_out = cut == "truncate" and not end_token and not count_padding
        self.shard_sizes = [self._count(size) for size in ids.sizes]
        self.firsts = np.cumsum([0, *self.shard_sizes])  # number of the first sequence of each shard
        self.positions = torch.arange(length + 1)
        self.all_tokens: Tensor | None = None  # of all shards, if `to` has copied them
        self.documents = lru_cache(8)(self._documents)

    def _count(self, size: ShardSize) -> int:
        if self.cut == "pack":
            return max(-(-(size.tokens - 1) // self.length), 0)
        return size.documents - size.one_word_documents * self.leaves_out

    def to(self, device: torch.device) -> "Sequences":
        """Return the same sequences with all tokens on a device. It also builds the batches."""
        moved = copy.copy(self)
        moved.all_tokens, moved.positions = _as_tensor(self.ids.tokens).to(device), self.positions.to(device)
        return moved

    @property
    def nbytes(self) -> int:
        """Bytes of all tokens."""
        return sum(size.tokens for size in self.ids.sizes) * self.ids.shard(0).tokens.itemsize

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def __getitem__(self, rows: np.ndarray) -> Tensor:
        """Numbers of sequences (B,) -> token ids (B, L + 1)."""
        shards, starts, sizes = self._places(rows)
        device = self.positions.device
        result = torch.full((len(rows), self.length + 1), PADDING_ID, device=device)
        if self.all_tokens is not None:
            first_tokens = np.cumsum([0, *(size.tokens for size in self.ids.sizes)])
            starts, shards = starts + first_tokens[shards], np.zeros_like(shards)
        for shard in np.unique(shards):
            here = torch.from_numpy(np.flatnonzero(shards == shard)).to(device)
            tokens = _as_tensor(self.ids.shard(shard).tokens) if self.all_tokens is None else self.all_tokens
            largest_id = 2 ** (8 * tokens.itemsize) - 1
            start, size = (torch.from_numpy(values[shards == shard]).to(device)[:, None] for values in (starts, sizes))
            inside = self.positions < size
            ids = tokens[torch.where(inside, start + self.positions, 0)].long() & largest_id
            result[here] = torch.where(inside, ids, PADDING_ID)
        return result

    def count_targets(self, rows: np.ndarray) -> int:
        """Numbers of sequences (B,) -> number of targets that count in the loss."""
        if self.count_padding:
            return len(rows) * self.length
        _, _, sizes = self._places(rows)
        return int(sizes.sum()) - len(rows)

    def _places(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Numbers of sequences (B,) -> shard, first token in the shard, and number of tokens, each (B,)."""
        shards = np.searchsorted(self.firsts, rows, side="right") - 1
        starts, ends = np.empty_like(rows), np.empty_like(rows)
        for shard in np.unique(shards):
            here = shards == shard
            numbers = rows[here] - self.firsts[shard]
            tokens, offsets = self.ids.shard(shard)
            if self.cut == "pack":
                starts[here], ends[here] = numbers * self.length, len(tokens)
            else:
                documents = self.documents(shard)[numbers] if self.leaves_out else numbers
                starts[here], ends[here] = offsets[documents], offsets[documents + 1] - (not self.end_token)
        return shards, starts, np.minimum(ends - starts, self.length + 1)

    def _documents(self, shard: int) -> np.ndarray:
        """The documents of a shard that have more than one word."""
        return np.flatnonzero(np.diff(self.ids.shard(shard).offsets) > 2)


def _as_tensor(tokens: np.ndarray) -> Tensor:
    return torch.from_numpy(tokens.view(f"i{tokens.itemsize}"))  # PyTorch cannot index unsigned integers


class Order:
    """The order of the sequences in one epoch.

    A text of at most `WINDOW` sequences is permuted as a whole. Of a larger one, the shards are permuted, and then the
    sequences of consecutive shards, about `WINDOW` at a time.

    Args:
        shard_sizes: sequences in each shard.
        seed: random seed, used together with the epoch. If None, the sequences keep the order of the text.
        max_sequences: use only so many sequences, drawn with the seed.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int | None, epoch: int, max_sequences: int):
        total = sum(shard_sizes)
        sizes = np.array(shard_sizes if total > WINDOW else [total])
        self.firsts, self.sizes = np.cumsum([0, *sizes]), sizes
        self.drawn = np.diff(self.firsts * min(max_sequences, total) // max(total, 1))  # sequences to use of each shard
        self.seed, self.epoch = seed, epoch
        shards = np.arange(len(sizes)) if seed is None else self._random().permutation(len(sizes))
        windows = np.cumsum(self.drawn[shards]) // WINDOW
        self.windows = [shards[windows == window] for window in np.unique(windows)]
        self.ends = np.cumsum([self.drawn[window].sum() for window in self.windows])
        self.window = lru_cache(2)(self._window)  # a batch can have sequences of two windows

    def _random(self, *numbers: int) -> np.random.Generator:
        return np.random.default_rng([self.seed or 0, self.epoch, *numbers])

    def _window(self, number: int) -> np.ndarray:
        rows = np.concatenate([self._rows_of(shard) for shard in self.windows[number]])
        return rows if self.seed is None else self._random(number).permutation(rows)

    def _rows_of(self, shard: int) -> np.ndarray:
        rows = np.arange(self.firsts[shard], self.firsts[shard + 1])
        if self.drawn[shard] == self.sizes[shard]:
            return rows
        random = np.random.default_rng([self.seed or 0, shard])  # the same in each epoch
        return np.sort(random.permutation(rows)[: self.drawn[shard]])

    def __getitem__(self, positions: slice) -> np.ndarray:
        """Positions in the epoch -> numbers of sequences."""
        start, stop = positions.start, min(positions.stop, self.ends[-1])
        parts = []
        while start < stop:
            window = int(np.searchsorted(self.ends, start, side="right"))
            rows = self.window(window)
            first = self.ends[window] - len(rows)
            parts.append(rows[start - first : stop - first])
            start += len(parts[-1])
        return np.concatenate(parts)


class BatchLoader:
    """Yields the batches of one process. Every process computes the order of all batches itself.

    Args:
        sequences: the training or validation sequences.
        batch_size: sequences per batch, over all processes.
        seed: random seed of the order, used together with the epoch. If None, the sequences keep the order of the text.
        rank: number of this process. It takes every `world_size`-th sequence of a batch, and none of a very small one.
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
        self.num_sequences = min(len(sequences), max_sequences or len(sequences))
        self.num_batches = -(-self.num_sequences // batch_size)
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
        order, done = self._order(self.epoch), self.batches_done
        for step in range(done - done % self.accumulate, self.num_batches, self.accumulate):
            numbers = range(step, min(step + self.accumulate, self.num_batches))
            batches = [order[number * self.batch_size : (number + 1) * self.batch_size] for number in numbers]
            counts = [self.sequences.count_targets(rows) for rows in batches]
            for number, rows, count in zip(numbers, batches, counts, strict=True):
                if number < done:
                    continue  # a resumed run continues inside the step
                # Update the position before `yield`: Lightning does not continue this loop after the last batch.
                last = number + 1 == self.num_batches
                self.epoch, self.batches_done = (self.epoch + 1, 0) if last else (self.epoch, number + 1)
                ids = self.sequences[rows[self.rank :: self.world_size]]  # (B, L + 1)
                inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
                yield Batch(inputs, targets, count, sum(counts))

    def _order(self, epoch: int) -> Order:
        return Order(self.sequences.shard_sizes, self.seed, epoch, self.num_sequences)

    def count_targets(self) -> int:
        """Number of targets in all sequences."""
        order, starts = self._order(0), range(0, self.num_sequences, WINDOW)
        return sum(self.sequences.count_targets(order[start : start + WINDOW]) for start in starts)

    # Not named state_dict: Lightning would then save the loader's state too, but it ignores that state at the end of an
    # epoch. It always loads the state of the DataModule.
    def state(self) -> dict[str, int]:
        """Return the position: the epoch, and the number of batches done in it."""
        return {"epoch": self.epoch, "batches_done": self.batches_done}

    def restore(self, state: dict[str, int]) -> None:
        """Start the next pass at a position that `state` has returned."""
        self.epoch, self.batches_done = state["epoch"], state["batches_done"]
        self._keep_position = True
