"""Encodes documents into shards of token ids: in parallel processes, with bounded memory, and resumable.

The first pass reads the text once. One process reads; others split the documents into words. The words are numbered in
order of appearance. These provisional ids go to one file per split and shard. The second pass replaces them by the
final ids, shard by shard. So the memory grows only with the different words, the longest document, and the validation
documents of the source (8-byte hashes). The disk needs 6 bytes per token meanwhile, and 2 afterwards.

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
from itertools import count, islice
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from minigpt_pl.data.sources import Source
from minigpt_pl.errors import InputError
from minigpt_pl.files import flush, remove, write_text
from minigpt_pl.tokenizer import NUM_SPECIAL, UNKNOWN_ID, build_tokenizer, build_vocabulary, split_words

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
        words: `""`, then the different words.
        counts: how often each of them occurs in the training documents.
        tokens: split -> positions in `words`, with a 0 after each document.
    """

    read: _Read
    words: list[str]
    counts: np.ndarray
    tokens: dict[str, np.ndarray]


def encode(
    folder: Path,
    source: Source,
    validation_share: float,
    vocab_size: int,
    vocabulary: list[str] | None,
    processes: int = 1,
) -> dict[str, Any]:
    """Write the files of an encoded text. Returns the values for its manifest.

    Args:
        folder: an empty folder, or what a killed `encode` with the same arguments has left.
        vocabulary: if None, the most frequent words of the training text.
        processes: processes that encode. One process works alone; several get documents from this one.

    Raises:
        InputError: there is no training text, or a process was killed.
    """
    start = time.monotonic()
    with _start_processes(processes) as run:
        ids, counts, shards = _number_words(folder, source, validation_share, run)
        if vocabulary is None:
            vocabulary = _most_frequent(ids, counts, vocab_size)
        final_ids = np.full(len(ids), UNKNOWN_ID, dtype=np.uint16 if len(vocabulary) <= 2**16 else np.uint32)
        for id_, word in enumerate(vocabulary[NUM_SPECIAL - 1 : -1], start=NUM_SPECIAL - 1):
            if word in ids:  # a given vocabulary can have words that are not in this text
                final_ids[ids[word]] = id_
        final_ids[0] = len(vocabulary) - 1
        np.save(folder / "final_ids.npy", final_ids)
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
        raise InputError(f"{source.description}: no text to train on; give documents that contain words")
    build_tokenizer(vocabulary).save(str(folder / "tokenizer.json"))
    content = hashlib.sha256("\n".join(vocabulary).encode())
    for name in names:
        for kind in ("tokens", "offsets"):
            content.update(np.load(folder / f"{name}.{kind}.npy", mmap_mode="r").data)
    for path in [*folder.glob("*.provisional"), *folder.glob("words-*"), *folder.glob("shard-*")]:
        path.unlink()
    (folder / "final_ids.npy").unlink()
    total = f"{sum(documents.values()):,}", f"{sum(words.values()):,}"
    log.info("Encoded %s documents, %s tokens, in %.1f s.", *total, time.monotonic() - start)
    record = {
        "train_documents": documents["train"],
        "train_tokens": words["train"],
        "distinct_words": int((counts > 0).sum()),
        "vocab_size": len(vocabulary),
        "validation_documents": documents["validation"],
        "validation_tokens": words["validation"],
        "validation_duplicates_left_out": shards[-1]["duplicates"],
        "content": content.hexdigest()[:16],
    }
    return {"source": source.description, "counts": record, "shards": by_split}


# ------------------------------------------------------------------------------------------------ first pass


def _number_words(
    folder: Path, source: Source, validation_share: float, run: "_Run"
) -> tuple[dict[str, int], np.ndarray, list[dict[str, Any]]]:
    """Write the provisional ids. Returns the id of each word, its count in the training text, and the shards."""
    ids, counts, shards = _finished_shards(folder)
    skip = shards[-1]["documents"] if shards else 0
    encoded: Iterator[_Encoded] = iter(())
    if not (shards and shards[-1]["is_last"]):
        encoded = run(_encode_batch, _batches(source, validation_share, skip))
    if shards:
        log.info("Continuing a killed encoding after %s documents.", f"{skip:,}")
    start, start_size = time.monotonic(), 0
    while not (shards and shards[-1]["is_last"]):
        number, tokens, known = len(shards), 0, len(ids)
        paths = {split: folder / f"{split}-{number:05}.provisional" for split in SPLITS}
        with ExitStack() as stack:
            files = {split: stack.enter_context(path.open("wb")) for split, path in paths.items()}
            for batch in encoded:
                found = np.fromiter((ids.setdefault(word, len(ids)) for word in batch.words), np.uint32)
                if len(ids) > len(counts):
                    counts = np.concatenate([counts, np.zeros(len(ids), np.int64)])  # more than double
                counts[found] += batch.counts
                for split in SPLITS:
                    tokens += files[split].write(found[batch.tokens[split]].data) // found.itemsize
                start_size = start_size or batch.read.size
                if tokens >= SHARD_TOKENS:
                    break
        paths["words"] = folder / f"words-{number:05}"
        paths["words"].write_bytes("\n".join(islice(ids, known, None)).encode())
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
    """What a killed process has left: as `_number_words`. Removes all other files."""
    shards, words = [], [""]  # id 0 marks the end of a document; no word is empty
    kept = set()
    for number in count():
        path = folder / f"shard-{number:05}"
        if not path.exists():
            break
        shard = json.loads(path.read_text())
        if any(not (folder / n).exists() or (folder / n).stat().st_size != s for n, s in shard["sizes"].items()):
            break  # a power cut
        shards.append(shard)
        kept |= {path.name, *shard["sizes"]}
        if found := (folder / f"words-{number:05}").read_bytes():
            words += found.decode().split("\n")
    for path in folder.iterdir():
        if path.name not in kept:
            remove(path)
    counts = np.zeros(len(words), np.int64)
    for number in range(len(shards)):
        for piece in _read_pieces(folder / f"train-{number:05}.provisional"):
            counts += np.bincount(piece, minlength=len(counts))
    counts[0] = 0  # not a word
    return {word: id_ for id_, word in enumerate(words)}, counts, shards


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


def _encode_batch(batch: tuple[_Read, dict[str, list[str]]]) -> _Encoded:
    read, texts = batch
    ids, tokens = {"": 0}, {}
    for split, documents in texts.items():
        ids_of_split = array("I")
        for text in documents:
            if words := split_words(text):
                ids_of_split.extend([ids.setdefault(word, len(ids)) for word in words])
                ids_of_split.append(0)
        tokens[split] = np.array(ids_of_split, dtype=np.uint32)
    counts = np.bincount(tokens["train"], minlength=len(ids))
    counts[0] = 0  # not a word
    return _Encoded(read, list(ids), counts, tokens)


def content_hash(document: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(document, digest_size=8).digest())


def is_held_out(content: int, share: float) -> bool:
    """The content decides, so copies of a document are always in the same split."""
    return content / 2**64 < share


# ----------------------------------------------------------------------------------------------- second pass


def _most_frequent(ids: dict[str, int], counts: np.ndarray, vocab_size: int) -> list[str]:
    # Sort only words that can be among the most frequent ones.
    wanted = min(max(vocab_size - NUM_SPECIAL, 1), len(counts))
    lowest = max(np.partition(counts, -wanted)[-wanted], 1)
    frequent = (counts >= lowest).tolist()
    return build_vocabulary({word: int(counts[id_]) for word, id_ in ids.items() if frequent[id_]}, vocab_size)


def _renumber(shard: Path) -> tuple[int, int, int]:
    """Write the final ids of a shard. Returns its number of tokens, of documents, and of documents of one word."""
    provisional = shard.with_name(f"{shard.name}.provisional")
    final_ids = np.load(shard.with_name("final_ids.npy"), mmap_mode="r")
    size = provisional.stat().st_size // 4
    ids = (final_ids[piece] for piece in _read_pieces(provisional))
    _write_array(shard.with_name(f"{shard.name}.tokens.npy"), final_ids.dtype, size, ids)
    documents = sum(int((piece == 0).sum()) for piece in _read_pieces(provisional))
    offsets = shard.with_name(f"{shard.name}.offsets.npy")
    _write_array(offsets, np.dtype(np.int64), documents + 1, _offsets(provisional))
    lengths = np.diff(np.load(offsets, mmap_mode="r"))
    return size, documents, int((lengths == 2).sum())


def _read_pieces(provisional: Path) -> Iterator[np.ndarray]:
    with provisional.open("rb") as file:
        while (piece := np.fromfile(file, dtype=np.uint32, count=PIECE)).size:
            yield piece


def _offsets(provisional: Path) -> Iterator[np.ndarray]:
    """Yield the offsets of the documents in pieces."""
    yield np.zeros(1, dtype=np.int64)
    start = 0
    for piece in _read_pieces(provisional):
        yield np.flatnonzero(piece == 0) + (start + 1)
        start += len(piece)


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
