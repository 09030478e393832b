"""Documents to ids, once: the encoded text is kept in a cache and memory-mapped from then on."""

import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import time
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from minigpt_pl import runs
from minigpt_pl.config import DataConfig, TextConfig
from minigpt_pl.data.sources import Source, open_source
from minigpt_pl.errors import InputError
from minigpt_pl.files import make_folder
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

FORMAT = 1  # change it when the files below mean something else
FEW_WORDS = 1_000_000  # "make sure it has at least 1 million words": the seed


@dataclass(frozen=True)
class Ids:
    """One split: the ids of all documents end to end, each document closed by the end token.

    Attributes:
        tokens: (T,) uint16, or uint32 for a vocabulary over 65,536.
        offsets: (N + 1,) int64; document i is `tokens[offsets[i]:offsets[i + 1]]`.
    """

    tokens: np.ndarray
    offsets: np.ndarray


@dataclass(frozen=True)
class Corpus:
    """A text as ids, with the words they stand for.

    Attributes:
        record: what the run's record holds of it: source, counts, fingerprint.
        validation: None where nothing is held out.
    """

    tokenizer: Tokenizer
    train: Ids
    validation: Ids | None
    record: dict[str, Any]


def open_corpus(config: DataConfig, vocab_size: int, tokenizer: Tokenizer | None = None) -> Corpus:
    """The encoded text of the settings' source: from the cache, or encoded now and then from the cache.

    Any number of processes may call it at once; one encodes while the others wait.

    Args:
        config: names the source, the share held out and the folder of the cache.
        vocab_size: at most this many entries of vocabulary, the three special ones included.
        tokenizer: take its words; None: the commonest of the training text.
    """
    from filelock import FileLock  # comes with torch

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
    make_folder(folder.parent, "data.cache_dir")
    with FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            _encode_into(folder, source, config.validation_share, vocab_size, vocabulary)
    counts = json.loads((folder / "counts.json").read_text())
    if counts["train_tokens"] < FEW_WORDS:
        log.warning("Only %s words to learn from: expect poor text under 1,000,000.", f"{counts['train_tokens']:,}")
    return Corpus(
        load_tokenizer(folder / "tokenizer.json"),
        _open_ids(folder, "train"),
        _open_ids(folder, "validation") if counts["validation_documents"] else None,
        {"source": source.description, "fingerprint": fingerprint, **counts},
    )


def open_run_corpus(folder: Path, tokenizer: Tokenizer, source: str | None) -> tuple[DataConfig, Corpus]:
    """The text that a run learned from, and the settings that lead to it.

    Args:
        folder: the run's.
        tokenizer: the run's words.
        source: where the text lies now, in place of `data.source` or `data.path`; None: where it was.

    Raises:
        InputError: it is not there, or another text is.
    """
    data, vocab_size = runs.read_data_settings(folder)
    if source is not None:
        data = dataclasses.replace(data, **{"path" if isinstance(data, TextConfig) else "source": source})
    record = runs.read_record(folder)
    try:
        corpus = open_corpus(data, vocab_size, tokenizer if runs.IMPORTED_FROM in record else None)
    except InputError as error:
        if source is None:
            raise InputError(*(f"{line}; or give source=, where run={folder.name}'s text lies now"
                               for line in error.problems)) from error  # fmt: skip
        raise InputError(*(re.sub(r"^data\.(source|path)=", "source=", line) for line in error.problems)) from error
    trained_on, found = record.get("text"), corpus.record
    # Not by the fingerprint: it may be made in another way by then.
    if trained_on and any(trained_on.get(name) != found[name] for name in found.keys() - {"source", "fingerprint"}):
        raise InputError(
            f"run={folder.name}: learned from {trained_on['source']}, {trained_on['train_tokens']:,} tokens; its"
            f" settings now lead to {found['source']}, {found['train_tokens']:,} tokens; give its place as source="
        )
    return data, corpus


def held_out_texts(config: DataConfig) -> Iterator[str]:
    """The documents that `open_corpus` holds out, in its order, as they were written.

    Where a share of the text is held out this reads all of it.
    """
    source = open_source(config)
    if source.validation is not None:
        texts = source.validation()
    else:
        texts = (text for text in source.train() if _falls_to_validation(_content_hash(text), config.validation_share))
    return (text for text in texts if split_words(text))


def _open_ids(folder: Path, split: str) -> Ids:
    # "c": as "r", but PyTorch warns of arrays that cannot be written.
    return Ids(*(np.load(folder / f"{split}.{name}.npy", mmap_mode="c") for name in ("tokens", "offsets")))


def _encode_into(
    folder: Path, source: Source, validation_share: float, vocab_size: int, vocabulary: list[str] | None
) -> None:
    """One pass over the text. Ids are given in order of appearance and exchanged for the final ones at the end."""
    start = time.monotonic()
    first_ids: dict[str, int] = {}
    splits = {"train": _Encoded(), "validation": _Encoded()}
    held_out_hashes = set()
    if source.validation is not None:
        for text in source.validation():
            held_out_hashes.add(_content_hash(text))
            splits["validation"].add(text, first_ids)
    left_out = 0
    for text in _with_progress(source.train()):
        content = _content_hash(text)
        if content in held_out_hashes:
            left_out += 1  # an exact duplicate of a validation text
        elif source.validation is None and _falls_to_validation(content, validation_share):
            splits["validation"].add(text, first_ids)
        else:
            splits["train"].add(text, first_ids)
    if not splits["train"].tokens:
        raise InputError(f"{source.description}: no text to learn from; give documents with words in them")

    # Words of the training text only: what is held out must not shape the vocabulary.
    counts = np.bincount(np.frombuffer(splits["train"].tokens, dtype=np.uint32), minlength=len(first_ids))
    if vocabulary is None:
        vocabulary = build_vocabulary(
            {word: int(counts[id_]) for word, id_ in first_ids.items() if counts[id_]}, vocab_size
        )
    final_ids = np.full(len(first_ids), UNKNOWN_ID, dtype=np.uint16 if len(vocabulary) <= 2**16 else np.uint32)
    for id_, word in enumerate(vocabulary[NUM_SPECIAL - 1 : -1], start=NUM_SPECIAL - 1):
        if word in first_ids:  # a vocabulary from elsewhere may have words that this text lacks
            final_ids[first_ids[word]] = id_

    aside = folder.with_name(f"{folder.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)  # of a process of this number that was killed
    aside.mkdir()
    try:
        build_tokenizer(vocabulary).save(str(aside / "tokenizer.json"))
        for split, encoded in splits.items():
            tokens, offsets = encoded.finish(final_ids, end_id=len(vocabulary) - 1)
            np.save(aside / f"{split}.tokens.npy", tokens)
            np.save(aside / f"{split}.offsets.npy", offsets)
        record = {
            "train_documents": len(splits["train"].lengths),
            "train_tokens": len(splits["train"].tokens),
            "distinct_words": int((counts > 0).sum()),
            "vocab_size": len(vocabulary),
            "validation_documents": len(splits["validation"].lengths),
            "validation_tokens": len(splits["validation"].tokens),
            "validation_duplicates_left_out": left_out,
        }
        (aside / "counts.json").write_text(json.dumps(record, indent=2) + "\n")
        aside.rename(folder)
    except BaseException:
        shutil.rmtree(aside)
        raise
    log.info(
        "Encoded %s documents, %s tokens, in %.1f s.",
        f"{record['train_documents'] + record['validation_documents']:,}",
        f"{record['train_tokens'] + record['validation_tokens']:,}",
        time.monotonic() - start,
    )


class _Encoded:
    """A split in the making: 4 bytes a token."""

    def __init__(self):
        self.tokens, self.lengths = array("I"), array("q")

    def add(self, text: str, first_ids: dict[str, int]) -> None:
        words = split_words(text)
        if not words:
            return
        self.tokens.extend([first_ids.setdefault(word, len(first_ids)) for word in words])
        self.lengths.append(len(words))

    def finish(self, final_ids: np.ndarray, end_id: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and offsets as in `Ids`."""
        lengths = np.frombuffer(self.lengths, dtype=np.int64) if self.lengths else np.zeros(0, np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths + 1)])
        tokens = np.full(offsets[-1], end_id, dtype=final_ids.dtype)
        is_word = np.ones(len(tokens), dtype=bool)
        is_word[offsets[1:] - 1] = False
        if self.tokens:
            tokens[is_word] = final_ids[np.frombuffer(self.tokens, dtype=np.uint32)]
        return tokens, offsets


def _content_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _falls_to_validation(content: int, share: float) -> bool:
    """By content, so that duplicates never straddle."""
    return content / 2**64 < share


def _with_progress(documents: Iterable[str]) -> Iterable[str]:
    from tqdm import tqdm  # comes with lightning

    return tqdm(documents, desc="Encoding", unit=" documents", disable=None, leave=False)
