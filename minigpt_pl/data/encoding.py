"""Encodes documents into shards of token ids: in parallel processes, with bounded memory, and resumable.

The first pass reads the text once. One process reads; others split the documents into pieces (`tokenizer.Rules`). The
pieces are numbered in order of appearance. These provisional ids go to one file per split and shard. The second pass
replaces them by the final ids, shard by shard. So the memory grows only with the different pieces, the longest
document, and the validation documents of the source (8-byte hashes). The disk needs 6 bytes per token meanwhile, and 2
afterwards.

The result does not depend on the number of processes. A killed encoding continues after its last finished shard.
"""

import hashlib
import json
import logging
import multiprocessing
import os
import signal
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain, count, islice
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from minigpt_pl.data.sources import Source
from minigpt_pl.errors import InputError
from minigpt_pl.files import flush, remove, write_text
from minigpt_pl.tokenizer import (
    END,
    NUM_SPECIAL,
    Rules,
    build_tokenizer,
    build_vocabulary,
    content,
    piece_encoder,
    train_bpe,
)

log = logging.getLogger(__name__)

SPLITS = ("train", "validation")
SHARD_TOKENS = 2**26  # a shard is complete when it has so many: 128 MB
BATCH_CHARACTERS = 2**20  # a process encodes so many at a time
PIECE = 2**20  # token ids in memory at a time, in the second pass
_WAITING = 3  # batches in memory for each process


class _Read(NamedTuple):
    """The position of the reader."""

    documents: int
    duplicates: int  # left out, because the validation documents of the source contain them
    size: int  # bytes


class _Encoded(NamedTuple):
    """A batch of documents as provisional ids.

    Attributes:
        pieces: `""`, then the different pieces.
        counts: how often each of them occurs in the training documents.
        tokens: split -> positions in `pieces`, with a 0 after each document.
    """

    read: _Read
    pieces: list[str]
    counts: np.ndarray
    tokens: dict[str, np.ndarray]


def encode(
    folder: Path,
    source: Source,
    validation_share: float,
    vocab_size: int,
    rules: Rules,
    tokenizer: Tokenizer | None,
    processes: int = 1,
) -> dict[str, Any]:
    """Write the files of an encoded text. Returns the values for its manifest.

    Args:
        folder: an empty folder, or what a killed `encode` with the same arguments has left.
        rules: the rules of the tokenizer.
        tokenizer: if None, it is made from the training text.
        processes: processes that encode. One process works alone; several get documents from this one.

    Raises:
        InputError: there is no training text, or a process was killed.
    """
    start = time.monotonic()
    with _start_processes(processes) as run:
        numbers, counts, shards = _number_pieces(folder, source, validation_share, rules, run)
        if tokenizer is None:
            tokenizer = _make_tokenizer(rules, numbers, counts, vocab_size)
        _write_final_ids(folder, tokenizer, list(numbers))
        names = [f"{split}-{number:05}" for split in SPLITS for number in range(len(shards))]
        sizes = list(run(_renumber, [folder / name for name in names]))  # per shard: tokens, documents, one-word ones

    by_split = {split: sizes[i * len(shards) : (i + 1) * len(shards)] for i, split in enumerate(SPLITS)}
    documents = {split: sum(size[1] for size in by_split[split]) for split in SPLITS}
    words = {split: sum(size[0] for size in by_split[split]) - documents[split] for split in SPLITS}
    if not documents["train"] and documents["validation"] and source.validation is None:
        raise InputError(
            f"data.validation_share={validation_share}: holds out all {documents['validation']} documents; give more"
            " text, or cut it into more documents (data.document)"
        )
    if not documents["train"]:
        raise InputError(f"data: {source.description} has no words; give a text with words")
    tokenizer.save(str(folder / "tokenizer.json"))
    hash_of_all = hashlib.sha256(content(tokenizer))
    for name in names:
        for kind in ("tokens", "offsets"):
            hash_of_all.update(np.load(folder / f"{name}.{kind}.npy", mmap_mode="r").data)
    temporary = ("*.provisional", "pieces-*", "shard-*", "final_*.npy")
    for path in chain.from_iterable(map(folder.glob, temporary)):
        path.unlink()
    total = f"{sum(documents.values()):,}", f"{sum(words.values()):,}"
    log.info("Encoded %s documents, %s tokens, in %.1f s.", *total, time.monotonic() - start)
    record = {
        "train_documents": documents["train"],
        "train_tokens": words["train"],
        "distinct_words": int((counts > 0).sum()),
        "vocab_size": tokenizer.get_vocab_size(),
        "validation_documents": documents["validation"],
        "validation_tokens": words["validation"],
        "validation_duplicates_left_out": shards[-1]["duplicates"],
        "content": hash_of_all.hexdigest()[:16],
    }
    return {"source": source.description, "counts": record, "shards": by_split}


# ------------------------------------------------------------------------------------------------ first pass


def _number_pieces(
    folder: Path, source: Source, validation_share: float, rules: Rules, run: "_Run"
) -> tuple[dict[str, int], np.ndarray, list[dict[str, Any]]]:
    """Write the provisional ids. Returns the id of each piece, its count in the training text, and the shards."""
    ids, counts, shards = _finished_shards(folder)
    skip = shards[-1]["documents"] if shards else 0
    encoded: Iterator[_Encoded] = iter(())
    if not (shards and shards[-1]["is_last"]):
        encoded = run(partial(_encode_batch, rules), _batches(source, validation_share, skip))
    if shards:
        log.info("Continuing a killed encoding after %s documents.", f"{skip:,}")
    start, start_size = time.monotonic(), 0
    while not (shards and shards[-1]["is_last"]):
        number, tokens, known = len(shards), 0, len(ids)
        paths = {split: folder / f"{split}-{number:05}.provisional" for split in SPLITS}
        with ExitStack() as stack:
            files = {split: stack.enter_context(path.open("wb")) for split, path in paths.items()}
            for batch in encoded:
                found = np.fromiter((ids.setdefault(piece, len(ids)) for piece in batch.pieces), np.uint32)
                if len(ids) > len(counts):
                    counts = np.concatenate([counts, np.zeros(len(ids), np.int64)])  # more than double
                counts[found] += batch.counts
                for split in SPLITS:
                    tokens += files[split].write(found[batch.tokens[split]].data) // found.itemsize
                start_size = start_size or batch.read.size
                if tokens >= SHARD_TOKENS:
                    break
        paths["pieces"] = folder / f"pieces-{number:05}"
        paths["pieces"].write_text(json.dumps([*islice(ids, known, None)]))
        sizes = {path.name: path.stat().st_size for path in paths.values()}
        is_last, read = tokens < SHARD_TOKENS, batch.read
        shards.append(read._asdict() | {"is_last": is_last, "sizes": sizes})
        if is_last and not number:  # a small text is encoded again after a kill
            break
        for path in paths.values():
            flush(path)
        write_text(folder / f"shard-{number:05}", json.dumps(shards[-1]))
        rate = max(read.size - start_size, 1) / (time.monotonic() - start)  # bytes per second
        left = (
            ""
            if source.size is None
            else f", about {tqdm.format_interval(max(source.size - read.size, 0) / rate)} left"
        )
        log.info("Shard %d: %s tokens (%.1f GB of text are read%s).", number, f"{tokens:,}", read.size / 1e9, left)
    return ids, counts[: len(ids)], shards


def _finished_shards(folder: Path) -> tuple[dict[str, int], np.ndarray, list[dict[str, Any]]]:
    """What a killed process has left: as `_number_pieces`. Removes all other files."""
    shards, pieces = [], [""]  # id 0 marks the end of a document; no piece is empty
    kept = set()
    for number in count():
        path = folder / f"shard-{number:05}"
        if not path.exists():
            break
        shard = json.loads(path.read_text())
        if any(not (folder / n).exists() or (folder / n).stat().st_size != s for n, s in shard["sizes"].items()):
            break  # a power cut
        if f"pieces-{number:05}" not in shard["sizes"]:
            break  # of an older version
        shards.append(shard)
        kept |= {path.name, *shard["sizes"]}
        pieces += json.loads((folder / f"pieces-{number:05}").read_text())
    for path in folder.iterdir():
        if path.name not in kept:
            remove(path)
    counts = np.zeros(len(pieces), np.int64)
    for number in range(len(shards)):
        for piece in _read_pieces(folder / f"train-{number:05}.provisional"):
            counts += np.bincount(piece, minlength=len(counts))
    counts[0] = 0  # not a piece
    return {piece: id_ for id_, piece in enumerate(pieces)}, counts, shards


def _batches(source: Source, validation_share: float, skip: int) -> Iterator[tuple[_Read, dict[str, list[str]]]]:
    """Yield the documents of each split in batches, without the first `skip` documents. The last batch may be empty."""
    documents = duplicates = size = characters = 0
    texts: dict[str, list[str]] = {split: [] for split in SPLITS}
    with tqdm(total=source.size, desc="Encoding", unit="B", unit_scale=True, disable=None, leave=False) as progress:
        for split, text, text_size in _read(source, validation_share):
            documents, duplicates, size = documents + 1, duplicates + (split is None), size + text_size
            progress.update(text_size)
            if split is not None and documents > skip:
                texts[split].append(text)
                characters += len(text)
            if characters >= BATCH_CHARACTERS:
                yield _Read(documents, duplicates, size), texts
                texts, characters = {split: [] for split in SPLITS}, 0
    yield _Read(documents, duplicates, size), texts


def _read(source: Source, validation_share: float) -> Iterator[tuple[str | None, str, int]]:
    """Yield each document with its split and its size in bytes. The split of a left-out duplicate is None."""
    held_out_hashes = set()
    for text in source.validation() if source.validation else ():
        encoded = text.encode()
        held_out_hashes.add(content_hash(encoded))
        yield "validation", text, len(encoded)
    for text in source.train():
        encoded = text.encode()
        content = content_hash(encoded)
        if content in held_out_hashes:
            yield None, text, len(encoded)
        elif source.validation is None and is_held_out(content, validation_share):
            yield "validation", text, len(encoded)
        else:
            yield "train", text, len(encoded)


def _encode_batch(rules: Rules, batch: tuple[_Read, dict[str, list[str]]]) -> _Encoded:
    read, texts = batch
    ids, tokens = {"": 0}, {}
    for split, documents in texts.items():
        ids_of_split = array("I")
        for text in documents:
            if pieces := rules.split(text):
                ids_of_split.extend([ids.setdefault(piece, len(ids)) for piece in pieces])
                ids_of_split.append(0)
        tokens[split] = np.array(ids_of_split, dtype=np.uint32)
    counts = np.bincount(tokens["train"], minlength=len(ids))
    counts[0] = 0  # not a piece
    return _Encoded(read, list(ids), counts, tokens)


def content_hash(document: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(document, digest_size=8).digest())


def is_held_out(content: int, share: float) -> bool:
    """The content decides, so copies of a document are always in the same split."""
    return content / 2**64 < share


# ----------------------------------------------------------------------------------------------- second pass


def _make_tokenizer(rules: Rules, numbers: dict[str, int], counts: np.ndarray, vocab_size: int) -> Tokenizer:
    """A tokenizer of the most frequent pieces. `numbers` has the position of each piece in `counts`."""
    words, different = int(counts.sum()), int((counts > 0).sum())
    if rules.kind == "word" and words > 1000 and different > words / 2:
        log.warning(
            "%s of %s words differ. If the text has no spaces between its words, use data.tokenizer=bpe or char.",
            *(f"{number:,}" for number in (different, words)),
        )
    if rules.kind == "bpe":
        of_text = {piece: int(counts[number]) for piece, number in numbers.items() if counts[number]}
        return train_bpe(of_text, vocab_size, rules.lowercase)
    # Sort only pieces that can be among the most frequent ones.
    wanted = min(max(vocab_size - NUM_SPECIAL, 1), len(counts))
    lowest = max(np.partition(counts, -wanted)[-wanted], 1)
    frequent = (counts >= lowest).tolist()
    of_frequent = {piece: int(counts[number]) for piece, number in numbers.items() if frequent[number]}
    return build_tokenizer(build_vocabulary(of_frequent, vocab_size), rules)


def _write_final_ids(folder: Path, tokenizer: Tokenizer, pieces: list[str]) -> None:
    """Write the final ids of all pieces, one after the other, and the number of ids of each piece."""
    end_id, dtype = tokenizer.get_vocab()[END], np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
    encoded: list[list[int]] = [[end_id], *map(piece_encoder(tokenizer), pieces[1:])]
    np.save(folder / "final_ids.npy", np.fromiter(chain.from_iterable(encoded), dtype))
    np.save(folder / "final_counts.npy", np.fromiter(map(len, encoded), np.int64))


def _renumber(shard: Path) -> tuple[int, int, int]:
    """Write the final ids of a shard. Returns its number of tokens, of documents, and of documents of one word."""
    provisional = shard.with_name(f"{shard.name}.provisional")
    final_ids, counts = (np.load(shard.with_name(f"final_{name}.npy"), mmap_mode="r") for name in ("ids", "counts"))
    lengths = None if len(final_ids) == len(counts) else np.asarray(counts)  # None: each piece is one token
    starts = np.cumsum(counts) - counts

    def final(piece: np.ndarray) -> np.ndarray:
        if lengths is None:
            return np.asarray(final_ids[piece])
        sizes = lengths[piece]
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return np.asarray(final_ids[np.repeat(starts[piece], sizes) + within])

    size = sum(len(piece) if lengths is None else int(lengths[piece].sum()) for piece in _read_pieces(provisional))
    tokens, offsets = (shard.with_name(f"{shard.name}.{name}.npy") for name in ("tokens", "offsets"))
    _write_array(tokens, final_ids.dtype, size, map(final, _read_pieces(provisional)))
    documents = sum(int((piece == 0).sum()) for piece in _read_pieces(provisional))
    _write_array(offsets, np.dtype(np.int64), documents + 1, _offsets(np.load(tokens, mmap_mode="r"), final_ids[0]))
    of_document = np.diff(np.load(offsets, mmap_mode="r"))
    return size, documents, int((of_document == 2).sum())


def _read_pieces(provisional: Path) -> Iterator[np.ndarray]:
    with provisional.open("rb") as file:
        while (piece := np.fromfile(file, dtype=np.uint32, count=PIECE)).size:
            yield piece


def _offsets(tokens: np.ndarray, end_id: int) -> Iterator[np.ndarray]:
    """Yield the offsets of the documents in pieces."""
    yield np.zeros(1, dtype=np.int64)
    for start in range(0, len(tokens), PIECE):
        yield np.flatnonzero(tokens[start : start + PIECE] == end_id) + (start + 1)


def _write_array(path: Path, dtype: np.dtype, size: int, pieces: Iterator[np.ndarray]) -> None:
    """Write the file that `np.save` would write for the concatenated pieces."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (size,)}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for piece in pieces:
            file.write(piece.data)


# ------------------------------------------------------------------------------------------------- processes

_Run = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]  # like `map`: the results in the order of items


@contextmanager
def _start_processes(number: int) -> Iterator[_Run]:
    """Yields a function like `map`, which calls a function in other processes. With one process it is `map`."""
    if number == 1:
        yield map
        return
    # Not fork: it copies locks that another thread of this process may hold.
    pool = ProcessPoolExecutor(number, multiprocessing.get_context("spawn"), initializer=_start_worker)

    def run(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        waiting: deque[Future[Any]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= _WAITING * number:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    try:
        yield run
    except BrokenProcessPool as error:
        raise InputError(
            f"processes={number}: one of them was killed, probably because the memory was full; give fewer"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes; the first one ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Without this, processes whose parent was killed would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
