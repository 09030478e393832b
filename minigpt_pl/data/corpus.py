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

FORMAT = 1  # version of the cache files; increase it when their meaning changes
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

    Several processes may call this at the same time. One encodes, and the others wait.

    Args:
        config: the source, the held-out share and the folder of the cache.
        vocab_size: maximum size of the vocabulary, including the three special tokens.
        tokenizer: its vocabulary is used. If None, the vocabulary is the most frequent words of the training text.

    Returns:
        The folder with the encoded text, and a description of the source.

    Raises:
        InputError: the text cannot be found or read, or it has no words.
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
    """Memory-map an encoded text. The arguments are the two values that `encode_text` returns."""
    counts = json.loads((folder / "counts.json").read_text())
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
) -> None:
    """Encode in one pass: number the words in order of appearance, then replace these numbers by the final ids."""
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
    if not train.tokens and validation.tokens and source.validation is None:
        raise InputError(
            f"data.validation_share={validation_share}: holds out all {len(validation.lengths)} documents; give more"
            " text, or cut it into more documents (data.document)"
        )
    if not train.tokens:
        raise InputError(f"{source.description}: no text to train on; give documents that contain words")

    # The vocabulary comes from the training text only.
    counts = np.bincount(np.frombuffer(train.tokens, dtype=np.uint32), minlength=len(provisional_ids))
    if vocabulary is None:
        word_counts = {word: int(counts[id_]) for word, id_ in provisional_ids.items() if counts[id_]}
        vocabulary = build_vocabulary(word_counts, vocab_size)
    final_ids = np.full(len(provisional_ids), UNKNOWN_ID, dtype=np.uint16 if len(vocabulary) <= 2**16 else np.uint32)
    for id_, word in enumerate(vocabulary[NUM_SPECIAL - 1 : -1], start=NUM_SPECIAL - 1):
        if word in provisional_ids:  # a given vocabulary can have words that are not in this text
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
    """Encodes one split with provisional ids. It needs 4 bytes of memory per token."""

    def __init__(self, provisional_ids: dict[str, int]):
        self.ids, self.tokens, self.lengths = provisional_ids, array("I"), array("q")

    def add(self, text: str) -> None:
        if words := split_words(text):
            self.tokens.extend([self.ids.setdefault(word, len(self.ids)) for word in words])
            self.lengths.append(len(words))

    def finish(self, final_ids: np.ndarray, end_id: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens and offsets of `Ids`: with the final ids, and with [END] after each document."""
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
    """The content decides, so copies of a document are always in the same split."""
    return content / 2**64 < share
