"""Reads Parquet files in chunks of some thousand rows: from a disk, a network share or the hub, with retries."""

import hashlib
import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from minigpt_pl.errors import InputError, TextLostError

log = logging.getLogger(__name__)

CHUNK_ROWS = 4096
WAITS = (5, 15, 45, 120)  # seconds before each new try; `huggingface_hub` tries five times each time
LONGEST_WAIT = 600  # seconds, if the server names a time


class Chunk(NamedTuple):
    """Consecutive row groups of a file.

    Attributes:
        file: an address `hf://...`, or a path inside the folder of the text; "" if the text is one file.
        rows: number of rows in these row groups.
    """

    file: str
    first_group: int
    end_group: int
    rows: int


def list_chunks(root: str, files: list[str], column: str, setting: str) -> tuple[list[Chunk], list[str]]:
    """Read the footers of the files. Returns the chunks of all files, and a hash of each footer.

    Raises:
        InputError: a file is not a Parquet file with this column of text.
    """
    chunks, footers = [], []
    with ThreadPoolExecutor(16) as pool:  # on the hub, each file takes several requests
        found = pool.map(partial(_read_footer, root, column, setting), files)
        for file, (group_rows, footer) in zip(files, found, strict=True):
            footers.append(footer)
            first, rows = 0, 0
            for group, more in enumerate(group_rows, start=1):
                rows += more
                if rows >= CHUNK_ROWS or group == len(group_rows):
                    chunks.append(Chunk(file, first, group, rows))
                    first, rows = group, 0
    return chunks, footers


def _read_footer(root: str, column: str, setting: str, file: str) -> tuple[list[int], str]:
    """Return the number of rows of each row group, and a hash of the footer."""
    import pyarrow

    try:
        with _open(root, file) as stream:
            parquet = _parquet_file(stream)
            stream.seek(-8, 2)
            stream.seek(-8 - int.from_bytes(stream.read(4), "little"), 2)
            footer = hashlib.sha256(stream.read()).hexdigest()
    except (OSError, ValueError) as error:
        raise InputError(f"{setting}={file or root}: cannot be read ({error}); give complete Parquet files") from error
    names = parquet.schema_arrow.names
    if column not in names:
        raise InputError(f"data.text_column={column}: {file or root} has no such column; it has {', '.join(names)}")
    if (kind := parquet.schema_arrow.field(column).type) not in (pyarrow.string(), pyarrow.large_string()):
        raise InputError(f"data.text_column={column}: contains {kind}, not text; give another column")
    return [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)], footer


def read_chunk(root: str, chunk: Chunk, column: str, setting: str) -> Iterator[str]:
    """Yield the documents of a chunk, without those that contain only white space. Tries again after an error.

    Raises:
        TextLostError: all tries have failed.
    """
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # we report its errors ourselves
    done = 0
    for wait in (*WAITS, None):
        try:
            for text in islice(_rows(root, chunk, column), done, None):
                done += 1
                if text and not text.isspace():
                    yield text
            return
        except Exception as error:  # several libraries raise errors here
            response = getattr(error, "response", None)
            status, headers = getattr(response, "status_code", 0), getattr(response, "headers", {})
            name = chunk.file or root
            if wait is None or isinstance(error, FileNotFoundError) or (400 <= status < 500 and status != 429):
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                raise TextLostError(
                    f"{setting}={name}: cannot be read any more ({reason}); mend the connection or the disk, and start"
                    " again with resume=auto"
                ) from error
            if (named := headers.get("Retry-After", "")).isdecimal():
                wait = min(max(wait, int(named)), LONGEST_WAIT)
            log.warning("%s: cannot be read (%s). Trying again in %s s.", name, type(error).__name__, wait)
            time.sleep(wait)


def _rows(root: str, chunk: Chunk, column: str) -> Iterator[str | None]:
    with _open(root, chunk.file) as stream:
        groups = list(range(chunk.first_group, chunk.end_group))
        for batch in _parquet_file(stream).iter_batches(1024, row_groups=groups, columns=[column]):
            yield from batch.column(0).to_pylist()


def _open(root: str, file: str) -> BinaryIO:
    if not file.startswith("hf://"):
        return Path(root, file).open("rb")
    from huggingface_hub import HfFileSystem

    stream: BinaryIO = HfFileSystem().open(file, block_size=2**22)
    return stream


def _parquet_file(stream: BinaryIO) -> Any:
    from pyarrow import parquet

    return parquet.ParquetFile(stream)
