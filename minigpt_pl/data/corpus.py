"""The text as token ids. It is encoded once, kept in a cache, and memory-mapped."""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache as cache_results
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from minigpt_pl import runs
from minigpt_pl.config import TOKENIZERS, DataConfig, ImdbConfig, TextConfig
from minigpt_pl.data import cache, encoding
from minigpt_pl.data.encoding import content_hash, is_held_out
from minigpt_pl.data.parquet import Chunk
from minigpt_pl.data.sources import Source, Stream, open_source
from minigpt_pl.errors import InputError
from minigpt_pl.tokenizer import NOTEBOOK, Rules, content, load_tokenizer, rules_of

log = logging.getLogger(__name__)

FORMAT = 3  # version of the cache files; increase it when their meaning changes
HELD_OUT = "held_out.npy"
FEW_TOKENS = 1_000_000  # the notebook: "make sure your corpus has at least 1 million words"


class Shard(NamedTuple):
    """A part of a split: the token ids of its documents in one array, with [END] after each document.

    Attributes:
        tokens: (T,) uint16, or uint32 if the vocabulary has more than 65,536 entries.
        offsets: (N + 1,) int64; document i is `tokens[offsets[i]:offsets[i + 1]]`.
    """

    tokens: np.ndarray
    offsets: np.ndarray


class ShardSize(NamedTuple):
    """Number of tokens, of documents, and of documents of one word."""

    tokens: int
    documents: int
    one_word_documents: int


class Ids:
    """One split of the text, in shards that are opened when they are used. A small text is one shard.

    Args:
        sizes: size of each shard.
        open_shard: opens the shard with this number.
    """

    def __init__(self, sizes: Sequence[ShardSize], open_shard: Callable[[int], Shard]):
        self.sizes, self.shard = sizes, cache_results(open_shard)

    @cached_property
    def tokens(self) -> np.ndarray:
        """All shards as one array: `Shard.tokens`. Several shards are copied into memory."""
        shards = [self.shard(number).tokens for number in range(len(self.sizes))]
        return shards[0] if len(shards) == 1 else np.concatenate(shards)

    @cached_property
    def offsets(self) -> np.ndarray:
        """`Shard.offsets` for `tokens`."""
        first, *others = (self.shard(number).offsets for number in range(len(self.sizes)))
        starts = np.cumsum([size.tokens for size in self.sizes])
        parts = [offsets[1:] + start for offsets, start in zip(others, starts, strict=False)]
        return np.concatenate([first, *parts]) if parts else first


@dataclass(frozen=True)
class Corpus:
    """A text as token ids, and its tokenizer.

    Attributes:
        validation: the held-out text; None if nothing is held out.
        record: values for the run's record: source, fingerprint, counts.
        stream: with streaming, the whole training text. `train` then has its first documents only.
        held_out: with streaming, the hashes of the source's validation documents, if it has any.
    """

    tokenizer: Tokenizer
    train: Ids
    validation: Ids | None
    record: dict[str, Any]
    stream: Stream | None = None
    held_out: frozenset[int] | None = None


def open_corpus(config: DataConfig, vocab_size: int, tokenizer: Tokenizer | None = None) -> Corpus:
    """Encode the text if needed, then open it. Arguments and errors are those of `encode_text`."""
    return read_corpus(encode_text(config, vocab_size, tokenizer))


def encode_text(
    config: DataConfig,
    vocab_size: int,
    tokenizer: Tokenizer | None = None,
    processes: int = 1,
    check_all: bool = False,
) -> Path:
    """Encode the text that the settings name, unless the cache already has it. Returns the folder of the encoded text.

    Several processes may call this at the same time. One encodes, and the others wait. Each call checks the files of
    the encoded text (`cache.find_damage`). If one is damaged, a warning names it, and the text is encoded again.

    Args:
        config: the source, the held-out share and the folder of the cache.
        vocab_size: maximum size of the vocabulary, including the three special tokens.
        tokenizer: replaces `config.tokenizer`.
        processes: processes that encode. The result does not depend on it.
        check_all: check every byte of a large text too.

    Raises:
        InputError: the text cannot be found or read, it has no words, or it changes while it is read. Or the cache
            cannot be read or written.
    """
    source = open_source(config)
    log.info("Text: %s", source.description)
    if tokenizer is None and config.tokenizer not in TOKENIZERS:
        try:
            tokenizer = load_tokenizer(Path(config.tokenizer))
        except InputError as error:
            raise InputError(*(f"data.tokenizer={problem}" for problem in error.problems)) from error
    wanted = {
        "format": FORMAT,
        "source": source.identity,
        "vocab_size": vocab_size,
        "validation_share": None if source.validation else config.validation_share,
    }
    if tokenizer is not None:
        rules = rules_of(tokenizer)
        wanted["vocabulary"] = hashlib.sha256(content(tokenizer)).hexdigest()
    else:
        is_word = config.tokenizer == "word"
        rules = Rules(config.tokenizer, is_word if config.lowercase is None else config.lowercase)
        if rules != NOTEBOOK:
            wanted["rules"] = rules
    fingerprint = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(config.cache_dir) / fingerprint

    def write(temporary: Path) -> dict[str, Any]:
        values = encoding.encode(temporary, source, config.validation_share, vocab_size, rules, tokenizer, processes)
        if source.stream is not None:
            values["stream"] = source.stream()._asdict()
            needs_words = tokenizer is None and rules.kind == "word"
            _finish_sample(temporary, source, config, vocab_size if needs_words else None, values)
        return values

    cache.fill(folder, write, "data.cache_dir", check_all)
    return folder


def _finish_sample(
    folder: Path, source: Source, config: DataConfig, vocab_size: int | None, values: dict[str, Any]
) -> None:
    """Add what the stream needs to the encoded sample of a streamed text: its number of rows, and held-out hashes."""
    counts, rows = values["counts"], sum(chunk.rows for chunk in values["stream"]["chunks"])
    counts["streamed_rows"] = rows
    if vocab_size is not None and counts["vocab_size"] < vocab_size and config.sample_documents < rows:
        raise InputError(
            f"data.sample_documents={config.sample_documents}: they have only {counts['vocab_size']:,} different words;"
            " raise it, lower model.vocab_size, or give data.tokenizer"
        )
    if source.validation is not None:
        hashes = {content_hash(text.encode()) for text in source.validation()}
        np.save(folder / HELD_OUT, np.array(sorted(hashes), dtype=np.uint64))


def read_corpus(folder: Path) -> Corpus:
    """Open a text that `encode_text` has encoded. This reads only its manifest and its tokenizer."""
    manifest = cache.read_manifest(folder)
    counts = manifest["counts"]
    if counts["train_tokens"] < FEW_TOKENS:
        tokens = f"{counts['train_tokens']:,}"
        log.warning("The training text has only %s tokens. With fewer than 1,000,000, expect poor results.", tokens)

    def open_shard(split: str, number: int) -> Shard:
        arrays = []
        for name in Shard._fields:
            path = folder / f"{split}-{number:05}.{name}.npy"
            cache.check_file(path, manifest)
            # With mode "r", PyTorch warns that the array is not writable. With mode "c", changes stay in memory.
            arrays.append(np.load(path, mmap_mode="c"))
        return Shard(*arrays)

    splits = {
        split: Ids([ShardSize(*size) for size in sizes], partial(open_shard, split))
        for split, sizes in manifest["shards"].items()
    }
    stream = manifest.get("stream")
    if stream is not None:
        stream = Stream(**stream | {"chunks": [Chunk(*chunk) for chunk in stream["chunks"]]})
    held_out = frozenset(np.load(folder / HELD_OUT).tolist()) if HELD_OUT in manifest["files"] else None
    return Corpus(
        load_tokenizer(folder / "tokenizer.json"),
        splits["train"],
        splits["validation"] if counts["validation_documents"] else None,
        {"source": manifest["source"], "fingerprint": folder.name, **counts},
        stream,
        held_out,
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
    record = runs.read_record(folder)
    if source is None:
        data = same_source(data, record)
    elif isinstance(data, TextConfig):
        data.path = source
    elif isinstance(data, ImdbConfig):
        data.source = source
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


def same_source(data: DataConfig, record: dict[str, Any]) -> DataConfig:
    """Settings with the source that the run of this record took, if they say `data.source=auto`.

    Now `auto` could take another source: the hub may answer now although it did not then.
    """
    if isinstance(data, ImdbConfig) and data.source == "auto" and record.get("text"):
        return replace(data, source="packaged" if "packaged" in record["text"]["source"] else "hub")
    return data


def is_same_text(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether two values of `Corpus.record` describe the same token ids. The text may have moved to another path.

    Records of older versions have no `content`. For them, only the counts are compared.
    """
    names = before.keys() & now.keys() - {"source", "fingerprint"}
    return bool(before) and all(before[name] == now[name] for name in names)


def held_out_texts(config: DataConfig, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the held-out documents as plain text, in the order of `Corpus.validation`.

    If the source has no validation split, this reads the whole text to find them.
    """
    source = open_source(config)
    if source.validation is not None:
        texts = source.validation()
    else:
        share = config.validation_share
        texts = (text for text in source.train() if is_held_out(content_hash(text.encode()), share))
    return filter(rules_of(tokenizer).split, texts)
