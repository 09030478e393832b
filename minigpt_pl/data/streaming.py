"""Batches of a text that is read while the training runs.

The chunks of the Parquet files are permuted by (seed, pass). Some chunks make a window: it is read, encoded, shuffled
by (seed, pass, window), used, and dropped. A thread reads the next window meanwhile. The position is the number of the
pass, of the window, and of the sequences used in it, so a resumed run continues exactly.
"""

import queue
import threading
from array import array
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch

from minigpt_pl.data.batches import Batch, BatchLoader, Sequences
from minigpt_pl.data.corpus import Corpus, Ids, Shard, ShardSize
from minigpt_pl.data.encoding import content_hash, is_held_out
from minigpt_pl.tokenizer import END, piece_encoder, rules_of

WINDOW_ROWS = 2**16  # rows that are shuffled together


class _Position(NamedTuple):
    """The first sequence that is not used yet."""

    pass_number: int
    window: int
    used: int  # sequences of the window


class _Window(NamedTuple):
    sequences: Sequences
    rows: np.ndarray  # the numbers of its sequences in shuffled order


class StreamLoader(BatchLoader):
    """Yields the batches of one process. Every process reads the whole text.

    An epoch has a fixed number of batches: about one pass, estimated from the first documents. The next epoch continues
    where it ends.

    Args:
        corpus: a streamed text.
        sample: the sequences of `corpus.train`.
        validation_share: share of the documents that is held out, if the source has no validation documents.
        batch_size, seed, max_batches, options: as in `BatchLoader`.

    Raises:
        TextLostError: in an iteration, if the text cannot be read any more.
    """

    def __init__(
        self,
        corpus: Corpus,
        sample: Sequences,
        validation_share: float,
        batch_size: int,
        seed: int,
        max_batches: int | None = None,
        **options: Any,
    ):
        super().__init__(sample, batch_size, seed, **options)
        assert corpus.stream is not None
        self.stream, self.held_out, self.validation_share = corpus.stream, corpus.held_out, validation_share
        counts = corpus.record
        documents = counts["train_documents"] + counts["validation_duplicates_left_out"]
        if self.held_out is None:
            documents += counts["validation_documents"]
        self.num_sequences = len(sample) * counts["streamed_rows"] // documents
        self.num_batches = min(self.num_sequences // batch_size, max_batches or self.num_sequences)
        self.split, self.encode = rules_of(corpus.tokenizer).split, lru_cache(2**20)(piece_encoder(corpus.tokenizer))
        self.end_id: int = corpus.tokenizer.get_vocab()[END]
        self.position = _Position(0, 0, 0)  # of the first batch of the step

    def __iter__(self) -> Iterator[Batch]:
        if not self._keep_position and self.batches_done:  # the caller stopped the last pass early
            self.epoch, self.batches_done = self.epoch + 1, 0
        self._keep_position = False
        done, world_size, batches = self.batches_done, self.world_size, self._batches(self.position)
        for step in range(done - done % self.accumulate, self.num_batches, self.accumulate):
            numbers = range(step, min(step + self.accumulate, self.num_batches))
            parts_and_ends = [next(batches) for _ in numbers]
            counts = [sum(s.count_targets(rows) for s, rows in parts) for parts, _ in parts_and_ends]
            for number, (parts, end), count in zip(numbers, parts_and_ends, counts, strict=True):
                if number < done:
                    continue  # a resumed run continues inside the step
                last = number + 1 == self.num_batches
                self.epoch, self.batches_done = (self.epoch + 1, 0) if last else (self.epoch, number + 1)
                if number == numbers[-1]:
                    self.position = end
                own, before = [], 0
                for sequences, rows in parts:
                    own.append(sequences[rows[(self.rank - before) % world_size :: world_size]])
                    before += len(rows)
                ids = torch.cat(own)  # (B, L + 1)
                yield Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), count, sum(counts))

    def state(self) -> dict[str, int]:
        """Return the position: as in `BatchLoader`, and the place in the stream."""
        return super().state() | self.position._asdict()

    def restore(self, state: dict[str, int]) -> None:
        super().restore(state)
        self.position = _Position(*(state[name] for name in _Position._fields))

    def _batches(self, position: _Position) -> Iterator[tuple[list[_Window], _Position]]:
        """Yield the sequences of each batch, over all processes, and the position after it."""
        pass_number, number, used = position
        windows = self._windows(pass_number)
        window = self._read(pass_number, windows[number], number)
        parts: list[_Window] = []
        missing = self.batch_size
        while True:
            ahead = (pass_number, number + 1) if number + 1 < len(windows) else (pass_number + 1, 0)
            windows = windows if ahead[0] == pass_number else self._windows(ahead[0])
            following = _in_thread(self._read, ahead[0], windows[ahead[1]], ahead[1])
            while used < len(window.rows):
                rows = window.rows[used : used + missing]
                parts.append(_Window(window.sequences, rows))
                used, missing = used + len(rows), missing - len(rows)
                if not missing:
                    is_over = used == len(window.rows)
                    yield parts, _Position(*ahead, 0) if is_over else _Position(pass_number, number, used)
                    parts, missing = [], self.batch_size
            window = following()
            (pass_number, number), used = ahead, 0

    def _windows(self, pass_number: int) -> list[np.ndarray]:
        """The numbers of the chunks in each window of a pass."""
        rows = np.array([chunk.rows for chunk in self.stream.chunks])
        order = np.random.default_rng([self.seed or 0, pass_number]).permutation(len(rows))
        windows = (np.cumsum(rows[order]) - 1) // WINDOW_ROWS
        return [order[windows == window] for window in np.unique(windows)]

    def _read(self, pass_number: int, chunks: np.ndarray, number: int) -> _Window:
        tokens, offsets = array("I"), [0]
        for chunk in chunks:
            for text in self.stream.read(self.stream.chunks[chunk]):
                content = content_hash(text.encode())
                held_out = (
                    is_held_out(content, self.validation_share) if self.held_out is None else content in self.held_out
                )
                if not held_out and (pieces := self.split(text)):
                    tokens.extend(chain.from_iterable(map(self.encode, pieces)))
                    tokens.append(self.end_id)
                    offsets.append(len(tokens))
        shard = Shard(np.array(tokens, dtype=np.uint32), np.array(offsets))
        size = ShardSize(len(tokens), len(offsets) - 1, int((np.diff(shard.offsets) == 2).sum()))
        like = self.sequences
        ids = Ids([size], lambda _: shard)
        sequences = Sequences(ids, like.length, like.cut, like.end_token, like.count_padding)
        random = np.random.default_rng([self.seed or 0, pass_number, number + 1])
        return _Window(sequences, random.permutation(len(sequences)))


def _in_thread(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """Start a function in a thread. Returns a function that waits for its result, or raises its error."""
    results: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            results.put((function(*arguments), None))
        except BaseException as error:
            results.put((None, error))

    def result() -> Any:
        value, error = results.get()
        if error is not None:
            raise error
        return value

    # A daemon: the end of the process does not wait for the network.
    threading.Thread(target=run, name="read ahead", daemon=True).start()
    return result
