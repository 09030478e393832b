"""Text as token ids: encoded once into a cache, then memory-mapped."""

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
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from minigpt_pl import runs
from minigpt_pl.config import DataConfig, ImdbConfig, TextConfig
from minigpt_pl.data.sources import Source, open_source
from minigpt_pl.errors import InputError
from minigpt_pl.files import atomic_write, make_folder
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

FORMAT = 1  # of the files in the cache; increase it when their meaning changes
FEW_WORDS = 1_000_000  # the notebook: "make sure your corpus has at least 1 million words"


@dataclass(frozen=True)
class Ids:
    """One split: the ids of all documents in one array, with the end token after each document.

    Attributes:
        tokens: (T,) uint16, or uint32 for a vocabulary over 65,536.
        offsets: (N + 1,) int64; document i is `tokens[offsets[i]:offsets[i + 1]]`.
    """

    tokens: np.ndarray
    offsets: np.ndarray


@dataclass(frozen=True)
class Corpus:
    """A text as ids, and its tokenizer.

    Attributes:
        validation: None if nothing is held out.
        record: facts for the run's record: source, fingerprint, counts.
    """

    tokenizer: Tokenizer
    train: Ids
    validation: Ids | None
    record: dict[str, Any]


def open_corpus(config: DataConfig, vocab_size: int, tokenizer: Tokenizer | None = None) -> Corpus:
    """The encoded text of the settings: `encode_text`, then `read_corpus`."""
    return read_corpus(*encode_text(config, vocab_size, tokenizer))


def encode_text(config: DataConfig, vocab_size: int, tokenizer: Tokenizer | None = None) -> tuple[Path, str]:
    """Encode the text of the settings into the cache, unless it is there.

    Several processes may call this at the same time: one encodes, the others wait.

    Args:
        config: source, share held out, folder of the cache.
        vocab_size: most entries of the vocabulary, including the three special ones.
        tokenizer: use its vocabulary; None: the most frequent words of the training text.

    Returns:
        The folder with the encoded text, and a description of the source.

    Raises:
        InputError: the text cannot be found or read, or has no words.
    """
    from filelock import FileLock

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
            with atomic_write(folder) as temporary:
                temporary.mkdir()
                _encode_into(temporary, source, config.validation_share, vocab_size, vocabulary)
    return folder, source.description


def read_corpus(folder: Path, description: str) -> Corpus:
    """Open an encoded text, memory-mapped. The arguments are the values of `encode_text`."""
    counts = json.loads((folder / "counts.json").read_text())
    if counts["train_tokens"] < FEW_WORDS:
        log.warning("The text has only %s words. Under 1,000,000 expect poor results.", f"{counts['train_tokens']:,}")
    return Corpus(
        load_tokenizer(folder / "tokenizer.json"),
        _open_ids(folder, "train"),
        _open_ids(folder, "validation") if counts["validation_documents"] else None,
        {"source": description, "fingerprint": folder.name, **counts},
    )


def open_run_corpus(folder: Path, tokenizer: Tokenizer, source: str | None) -> tuple[DataConfig, Corpus]:
    """The text of a run, and the settings of its data.

    Args:
        folder: the run folder.
        tokenizer: the run's tokenizer.
        source: new place of the text, instead of `data.source` or `data.path`; None: the old place.

    Raises:
        InputError: the text is not there, or it is another text.
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
            remedy = f"or give the new place of the text of run={folder.name} as source="
            problems = [f"{problem}; {remedy}" for problem in error.problems]
        else:
            problems = [re.sub(r"^data\.(source|path)=", "source=", problem) for problem in error.problems]
        raise InputError(*problems) from error
    before, now = record.get("text"), corpus.record
    if before and not is_same_text(before, now):
        raise InputError(
            f"run={folder.name}: was trained on {before['source']} ({before['train_tokens']:,} tokens), but its"
            f" settings lead to {now['source']} ({now['train_tokens']:,} tokens); give the place of its text as source="
        )
    return data, corpus


def is_same_text(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether two records describe the same ids, wherever the text lies. The arguments are values of `Corpus.record`.

    Records of older versions have no `content`. Then the counts decide.
    """
    return bool(before) and all(
        before[name] == now[name] for name in before.keys() & now.keys() - {"source", "fingerprint"}
    )


def held_out_texts(config: DataConfig) -> Iterator[str]:
    """The documents that `encode_text` holds out, in the same order, as plain text.

    If the source has no validation split, this reads the whole text.
    """
    source = open_source(config)
    if source.validation is not None:
        texts = source.validation()
    else:
        texts = (text for text in source.train() if _is_held_out(_content_hash(text), config.validation_share))
    return (text for text in texts if split_words(text))


def _open_ids(folder: Path, split: str) -> Ids:
    # Mode "c" reads like "r", but PyTorch warns about arrays that are not writable.
    return Ids(*(np.load(folder / f"{split}.{name}.npy", mmap_mode="c") for name in ("tokens", "offsets")))


def _encode_into(
    folder: Path, source: Source, validation_share: float, vocab_size: int, vocabulary: list[str] | None
) -> None:
    """Encode in one pass: words get provisional ids in order of appearance, and the final ids at the end."""
    start = time.monotonic()
    provisional_ids: dict[str, int] = {}
    train, validation = _Encoder(provisional_ids), _Encoder(provisional_ids)
    held_out_hashes, duplicates = set(), 0
    progress = partial(tqdm, desc="Encoding", unit=" documents", disable=None, leave=False)
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
    if not train.tokens:
        raise InputError(f"{source.description}: no text to learn from; give documents with words in them")

    # Only the training text decides about the vocabulary, not the held-out text.
    counts = np.bincount(np.frombuffer(train.tokens, dtype=np.uint32), minlength=len(provisional_ids))
    if vocabulary is None:
        word_counts = {word: int(counts[id_]) for word, id_ in provisional_ids.items() if counts[id_]}
        vocabulary = build_vocabulary(word_counts, vocab_size)
    final_ids = np.full(len(provisional_ids), UNKNOWN_ID, dtype=np.uint16 if len(vocabulary) <= 2**16 else np.uint32)
    for id_, word in enumerate(vocabulary[NUM_SPECIAL - 1 : -1], start=NUM_SPECIAL - 1):
        if word in provisional_ids:  # a given vocabulary may have words that this text lacks
            final_ids[provisional_ids[word]] = id_

    build_tokenizer(vocabulary).save(str(folder / "tokenizer.json"))
    content_hash = hashlib.sha256("\n".join(vocabulary).encode())
    for split, encoder in (("train", train), ("validation", validation)):
        tokens, offsets = encoder.finish(final_ids, end_id=len(vocabulary) - 1)
        np.save(folder / f"{split}.tokens.npy", tokens)
        np.save(folder / f"{split}.offsets.npy", offsets)
        content_hash.update(tokens.tobytes() + offsets.tobytes())
    record = {
        "train_documents": len(train.lengths),
        "train_tokens": len(train.tokens),
        "distinct_words": int((counts > 0).sum()),
        "vocab_size": len(vocabulary),
        "validation_documents": len(validation.lengths),
        "validation_tokens": len(validation.tokens),
        "validation_duplicates_left_out": duplicates,
        "content": content_hash.hexdigest()[:16],
    }
    (folder / "counts.json").write_text(json.dumps(record, indent=2) + "\n")
    documents, words = len(train.lengths + validation.lengths), len(train.tokens) + len(validation.tokens)
    log.info("Encoded %s documents, %s tokens, in %.1f s.", f"{documents:,}", f"{words:,}", time.monotonic() - start)


class _Encoder:
    """Encodes one split with provisional ids. Needs 4 bytes per token."""

    def __init__(self, provisional_ids: dict[str, int]):
        self.ids, self.tokens, self.lengths = provisional_ids, array("I"), array("q")

    def add(self, text: str) -> None:
        if words := split_words(text):
            self.tokens.extend([self.ids.setdefault(word, len(self.ids)) for word in words])
            self.lengths.append(len(words))

    def finish(self, final_ids: np.ndarray, end_id: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and offsets as in `Ids`, with the final ids and an end token after each document."""
        lengths = np.asarray(self.lengths)
        offsets = np.concatenate([[0], np.cumsum(lengths + 1)])
        tokens = np.full(offsets[-1], end_id, dtype=final_ids.dtype)
        is_word = np.ones(len(tokens), dtype=bool)
        is_word[offsets[1:] - 1] = False
        tokens[is_word] = final_ids[np.asarray(self.tokens)]
        return tokens, offsets


def _content_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _is_held_out(content: int, share: float) -> bool:
    """Decided by content, so that duplicates are always in the same split."""
    return content / 2**64 < share
