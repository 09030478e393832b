"""The text as token ids. It is encoded once, kept in a cache, and memory-mapped."""

import hashlib
import json
import logging
import re
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from minigpt_pl import runs
from minigpt_pl.config import DataConfig, ImdbConfig, TextConfig
from minigpt_pl.data import cache
from minigpt_pl.data.sources import Source, open_source
from minigpt_pl.errors import InputError
from minigpt_pl.tokenizer import (
    NUM_SPECIAL,
    UNKNOWN_ID,
    build_tokenizer,
    build_vocabulary,
    list_vocabulary,
    load_tokenizer,
    split_words,
)

log = logging.getLogger(__name__)

FORMAT = 2  # version of the cache files; increase it when their meaning changes
PIECE = 2**20  # token ids in memory at a time
FEW_TOKENS = 1_000_000  # the notebook: "make sure your corpus has at least 1 million words"


@dataclass(frozen=True)
class Ids:
    """One split of the text: the token ids of all documents in one array, with [END] after each document.

    Attributes:
        tokens: (T,) uint16, or uint32 if the vocabulary has more than 65,536 entries.
        offsets: (N + 1,) int64; document i is `tokens[offsets[i]:offsets[i + 1]]`.
    """

    tokens: np.ndarray
    offsets: np.ndarray


@dataclass(frozen=True)
class Corpus:
    """A text as token ids, and its tokenizer.

    Attributes:
        validation: the held-out text; None if nothing is held out.
        record: values for the run's record: source, fingerprint, counts.
    """

    tokenizer: Tokenizer
    train: Ids
    validation: Ids | None
    record: dict[str, Any]


def open_corpus(config: DataConfig, vocab_size: int, tokenizer: Tokenizer | None = None) -> Corpus:
    """Encode the text if needed, then open it. Arguments and errors are those of `encode_text`."""
    return read_corpus(*encode_text(config, vocab_size, tokenizer))


def encode_text(config: DataConfig, vocab_size: int, tokenizer: Tokenizer | None = None) -> tuple[Path, str]:
    """Encode the text that the settings name, unless the cache already has it.

    Several processes may call this at the same time. One encodes, and the others wait. Each call checks all files of
    the encoded text (`cache.find_damage`). If one is damaged, a warning names it, and the text is encoded again.

    Args:
        config: the source, the held-out share and the folder of the cache.
        vocab_size: maximum size of the vocabulary, including the three special tokens.
        tokenizer: its vocabulary is used. If None, the vocabulary is the most frequent words of the training text.

    Returns:
        The folder with the encoded text, and a description of the source.

    Raises:
        InputError: the text cannot be found or read, it has no words, or it changes while it is read. Or the cache
            cannot be read or written.
    """
    source = open_source(config)
    log.info("Text: %s", source.description)
    wanted = {
        "format": FORMAT,
        "source": source.identity,
        "vocab_size": vocab_size,
        "validation_share": None if source.validation else config.validation_share,
    }
    vocabulary = None if tokenizer is None else list_vocabulary(tokenizer)
    if vocabulary is not None:
        wanted["vocabulary"] = hashlib.sha256("\n".join(vocabulary).encode()).hexdigest()
    fingerprint = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(config.cache_dir) / fingerprint

    def encode(temporary: Path) -> dict[str, Any]:
        return _encode_into(temporary, source, config.validation_share, vocab_size, vocabulary)

    cache.fill(folder, encode, "data.cache_dir")
    return folder, source.description


def read_corpus(folder: Path, description: str) -> Corpus:
    """Memory-map an encoded text. The arguments are the two values that `encode_text` returns."""
    counts = cache.read_manifest(folder)["counts"]
    if counts["train_tokens"] < FEW_TOKENS:
        tokens = f"{counts['train_tokens']:,}"
        log.warning("The training text has only %s tokens. With fewer than 1,000,000, expect poor results.", tokens)
    return Corpus(
        load_tokenizer(folder / "tokenizer.json"),
        _open_ids(folder, "train"),
        _open_ids(folder, "validation") if counts["validation_documents"] else None,
        {"source": description, "fingerprint": folder.name, **counts},
    )


def open_run_corpus(folder: Path, tokenizer: Tokenizer, source: str | None) -> tuple[DataConfig, Corpus]:
    """Open the text that a run was trained on. Also returns the data settings of the run.

    Args:
        folder: the run folder.
        tokenizer: the run's tokenizer.
        source: path of the text if it has moved; replaces `data.source` or `data.path`.

    Raises:
        InputError: the text cannot be found, or it is a different text.
    """
    data, vocab_size = runs.read_data_settings(folder)
    if source is not None and isinstance(data, TextConfig):
        data.path = source
    elif source is not None and isinstance(data, ImdbConfig):
        data.source = source
    record = runs.read_record(folder)
    try:
        corpus = open_corpus(data, vocab_size, tokenizer if runs.IMPORTED_FROM in record else None)
    except InputError as error:
        if source is None:
            remedy = f"if the text of run={folder.name} has moved, give its new path: source=PATH"
            problems = [f"{problem}; {remedy}" for problem in error.problems]
        else:
            problems = [re.sub(r"^data\.(source|path)=", "source=", problem) for problem in error.problems]
        raise InputError(*problems) from error
    before, now = record.get("text"), corpus.record
    if before and not is_same_text(before, now):
        raise InputError(
            f"run={folder.name}: was trained on {before['source']} ({before['train_tokens']:,} tokens), but its"
            f" settings now give {now['source']} ({now['train_tokens']:,} tokens); give the path of the old text:"
            " source=PATH"
        )
    return data, corpus


def is_same_text(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether two values of `Corpus.record` describe the same token ids. The text may have moved to another path.

    Records of older versions have no `content`. For them, only the counts are compared.
    """
    names = before.keys() & now.keys() - {"source", "fingerprint"}
    return bool(before) and all(before[name] == now[name] for name in names)


def held_out_texts(config: DataConfig) -> Iterator[str]:
    """Yield the held-out documents as plain text, in the order of `Corpus.validation`.

    If the source has no validation split, this reads the whole text to find them.
    """
    source = open_source(config)
    if source.validation is not None:
        texts = source.validation()
    else:
        texts = (text for text in source.train() if _is_held_out(_content_hash(text), config.validation_share))
    return (text for text in texts if split_words(text))


def _open_ids(folder: Path, split: str) -> Ids:
    # With mode "r", PyTorch warns that the array is not writable. With mode "c", changes stay in memory.
    return Ids(*(np.load(folder / f"{split}.{name}.npy", mmap_mode="c") for name in ("tokens", "offsets")))


def _encode_into(
    folder: Path, source: Source, validation_share: float, vocab_size: int, vocabulary: list[str] | None
) -> dict[str, Any]:
    """Write the files of an encoded text. Returns the values for its manifest.

    This reads the text once and numbers the words in order of appearance. These provisional ids go to a file, and are
    then replaced by the final ids, piece by piece. So the memory does not depend on the length of the text. It grows
    with the different words, the longest document, and the validation documents of the source (8-byte hashes). The disk
    needs 6 bytes per token meanwhile, and 2 afterwards.
    """
    start = time.monotonic()
    provisional_ids = {"": 0}  # 0 marks the end of a document; no word is empty
    paths = {split: folder / f"{split}.provisional" for split in ("train", "validation")}
    held_out_hashes, duplicates = set(), 0
    progress = partial(tqdm, desc="Encoding", unit=" documents", disable=None, leave=False)
    with paths["train"].open("wb") as train_file, paths["validation"].open("wb") as validation_file:
        train, validation = _Encoder(provisional_ids, train_file), _Encoder(provisional_ids, validation_file)
        for text in progress(source.validation()) if source.validation else ():
            held_out_hashes.add(_content_hash(text))
            validation.add(text)
        for text in progress(source.train()):
            content = _content_hash(text)
            if content in held_out_hashes:
                duplicates += 1
            elif source.validation is None and _is_held_out(content, validation_share):
                validation.add(text)
            else:
                train.add(text)
        train.flush()
        validation.flush()
    if not train.documents and validation.documents and source.validation is None:
        raise InputError(
            f"data.validation_share={validation_share}: holds out all {validation.documents} documents; give more text,"
            " or cut it into more documents (data.document)"
        )
    if not train.documents:
        raise InputError(f"{source.description}: no text to train on; give documents that contain words")

    # The vocabulary comes from the training text only.
    counts = np.zeros(len(provisional_ids), dtype=np.int64)
    for piece in _read_pieces(paths["train"]):
        counts += np.bincount(piece, minlength=len(counts))
    counts[0] = 0  # not a word
    if vocabulary is None:
        word_counts = {word: int(counts[id_]) for word, id_ in provisional_ids.items() if counts[id_]}
        vocabulary = build_vocabulary(word_counts, vocab_size)
    final_ids = np.full(len(provisional_ids), UNKNOWN_ID, dtype=np.uint16 if len(vocabulary) <= 2**16 else np.uint32)
    for id_, word in enumerate(vocabulary[NUM_SPECIAL - 1 : -1], start=NUM_SPECIAL - 1):
        if word in provisional_ids:  # a given vocabulary can have words that are not in this text
            final_ids[provisional_ids[word]] = id_
    final_ids[0] = len(vocabulary) - 1

    build_tokenizer(vocabulary).save(str(folder / "tokenizer.json"))
    content_hash = hashlib.sha256("\n".join(vocabulary).encode())
    for split, encoder in (("train", train), ("validation", validation)):
        path, size = paths[split], encoder.words + encoder.documents
        ids = (final_ids[piece] for piece in _read_pieces(path))
        _write_array(folder / f"{split}.tokens.npy", final_ids.dtype, size, ids, content_hash)
        ends = _offsets(path)
        _write_array(folder / f"{split}.offsets.npy", np.dtype(np.int64), encoder.documents + 1, ends, content_hash)
        path.unlink()
    documents, words = train.documents + validation.documents, train.words + validation.words
    log.info("Encoded %s documents, %s tokens, in %.1f s.", f"{documents:,}", f"{words:,}", time.monotonic() - start)
    record = {
        "train_documents": train.documents,
        "train_tokens": train.words,
        "distinct_words": int((counts > 0).sum()),
        "vocab_size": len(vocabulary),
        "validation_documents": validation.documents,
        "validation_tokens": validation.words,
        "validation_duplicates_left_out": duplicates,
        "content": content_hash.hexdigest()[:16],
    }
    return {"source": source.description, "counts": record}


class _Encoder:
    """Writes the provisional ids of one split to a file, as uint32, with a 0 after each document."""

    def __init__(self, provisional_ids: dict[str, int], file: BinaryIO):
        self.ids, self.file, self.tokens = provisional_ids, file, array("I")
        self.documents, self.words = 0, 0

    def add(self, text: str) -> None:
        if words := split_words(text):
            self.tokens.extend([self.ids.setdefault(word, len(self.ids)) for word in words])
            self.tokens.append(0)
            self.documents += 1
            self.words += len(words)
            if len(self.tokens) > PIECE:
                self.flush()

    def flush(self) -> None:
        self.file.write(self.tokens)
        self.tokens = array("I")


def _read_pieces(provisional: Path) -> Iterator[np.ndarray]:
    with provisional.open("rb") as file:
        while (piece := np.fromfile(file, dtype=np.uint32, count=PIECE)).size:
            yield piece


def _offsets(provisional: Path) -> Iterator[np.ndarray]:
    """Yield `Ids.offsets` in pieces."""
    yield np.zeros(1, dtype=np.int64)
    start = 0
    for piece in _read_pieces(provisional):
        yield np.flatnonzero(piece == 0) + (start + 1)
        start += len(piece)


def _write_array(path: Path, dtype: np.dtype, size: int, pieces: Iterator[np.ndarray], content_hash: Any) -> None:
    """Write the file that `np.save` would write for the concatenated pieces, and add their bytes to the hash."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (size,)}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for piece in pieces:
            file.write(piece.data)
            content_hash.update(piece.data)


def _content_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _is_held_out(content: int, share: float) -> bool:
    """The content decides, so copies of a document are always in the same split."""
    return content / 2**64 < share
