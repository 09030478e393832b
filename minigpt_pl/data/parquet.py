"""Reads Parquet files in chunks of some thousand rows: from a disk, a network share or the hub, with retries."""

import hashlib
import logging
import time
from collections.abc import Iterator
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
    import pyarrow

    chunks, footers = [], []
    for file in files:
        try:
            with _open(root, file) as stream:
                parquet = _parquet_file(stream)
                stream.seek(-8, 2)
                stream.seek(-8 - int.from_bytes(stream.read(4), "little"), 2)
                footers.append(hashlib.sha256(stream.read()).hexdigest())
        except (OSError, ValueError) as error:
            raise InputError(f"{setting}={file or root}: is not a complete Parquet file ({error})") from error
        names = parquet.schema_arrow.names
        if column not in names:
            raise InputError(f"data.text_column={column}: {file} has no such column; it has {', '.join(names)}")
        if (kind := parquet.schema_arrow.field(column).type) not in (pyarrow.string(), pyarrow.large_string()):
            raise InputError(f"data.text_column={column}: contains {kind}, not text; give another column")
        first, rows = 0, 0
        for group in range(parquet.num_row_groups):
            rows += parquet.metadata.row_group(group).num_rows
            if rows >= CHUNK_ROWS or group + 1 == parquet.num_row_groups:
                chunks.append(Chunk(file, first, group + 1, rows))
                first, rows = group + 1, 0
    return chunks, footers


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
