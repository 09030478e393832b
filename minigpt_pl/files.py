"""Files that a crash cannot damage: atomic writes, and files that only grow."""

import logging
import os
import platform
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from minigpt_pl.errors import InputError

log = logging.getLogger(__name__)

MAX_TEXT_LENGTH = 10_000_000  # of prompts and vocabularies, in characters


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Write a file or a folder atomically.

    Yields a temporary path in the same folder, for the caller to write. Afterwards this file is flushed to disk and
    renamed to `path`. After an exception it is removed, and `path` is unchanged. A killed process leaves it behind, for
    `remove_temporaries`.

    Example:
        >>> with atomic_write(Path("model.pt")) as temporary:
        ...     torch.save(weights, temporary)
    """
    temporary = temporary_path(path)
    remove(temporary)  # left by a killed process with the same process id
    try:
        yield temporary
        for written in (*temporary.rglob("*"), temporary):
            flush(written)
        temporary.replace(path)
    except BaseException:
        remove(temporary)
        raise
    flush(path.parent)


def temporary_path(path: Path) -> Path:
    """A hidden name in the same folder. `remove_temporaries` removes it after the end of this process."""
    # Two machines that share the folder can have the same process id.
    return path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")


def remove_temporaries(folder: Path, of_all_machines: bool = False) -> None:
    """Remove what killed processes have left of their atomic writes into this folder.

    Args:
        of_all_machines: also remove temporary files of other machines and of running processes. The caller must know
            that no other process writes into the folder.
    """
    for temporary in folder.glob(".*.tmp"):
        *_, process_id, _ = temporary.name.split(".")
        is_ours = f".{platform.node()}.{process_id}." in temporary.name and process_id.isdecimal()
        if of_all_machines or (is_ours and not is_running(int(process_id))):
            remove(temporary)


def is_running(process_id: int) -> bool:
    """Whether another process of this machine has this id."""
    if process_id == os.getpid() or os.name != "posix":  # on Windows, `os.kill` would end the process
        return False
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it belongs to another user
        return True
    return True


def flush(path: Path) -> None:
    """Wait until a file, or the list of the files in a folder, is on the disk."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def file_crc32(path: Path) -> int:
    """CRC-32 of the contents of a file. Half a second per gigabyte if the file is in memory."""
    crc32, buffer = 0, memoryview(bytearray(2**20))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            crc32 = zlib.crc32(buffer[:size], crc32)
    return crc32


def remove(path: Path) -> None:
    """Remove a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_figure(path: Path, figure: Any, dpi: int = 120) -> None:
    """Write a matplotlib figure as PNG, atomically."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)


def make_folder(path: Path, setting: str) -> None:
    """Create a folder and its parents, if they are missing.

    Raises:
        InputError: the folder cannot be created. The message names `setting`.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{setting}={path}: cannot be created ({error.strerror}); give another folder") from error


class GrowingFile:
    """A UTF-8 text file that only grows. Checkpoints hold its state, and a resumed run cuts it there.

    Nothing is lost if the disk is full: the text waits in memory, and the next write tries again.

    Args:
        state: `state()` of an earlier process; None for a new file.
        header: the first line of the file.
    """

    def __init__(self, path: Path, state: dict[str, Any] | None = None, header: str = ""):
        self.path, self.header = path, header
        state = state or {"size": 0, "waiting": ""}
        kept = path.read_bytes()[: state["size"]] if path.exists() else b""
        self.size = kept.rfind(b"\n") + 1
        if self.size != state["size"]:  # after a power cut, or if somebody has changed the file
            self._warn(state["size"])
        self._waiting = b""
        self.append(state["waiting"])

    def append(self, text: str) -> None:
        """Write the text at the end of the file.

        Raises:
            InputError: its folder does not exist any more.
        """
        if not self.path.parent.is_dir():
            raise InputError(f"{self.path.parent}: the folder was removed during the training; start a new run")
        self._waiting += text.encode()
        try:
            with self.path.open("r+b" if self.path.exists() else "xb") as file:
                if (size := file.seek(0, os.SEEK_END)) < self.size:  # somebody has changed the file
                    self.size, expected = size, self.size
                    self._warn(expected)
                new = self._waiting if self.size else self.header.encode() + self._waiting
                file.truncate(self.size)  # removes what an earlier process or a failed write has left
                file.seek(self.size)
                file.write(new)
        except OSError as error:
            log.warning("%s: cannot be written (%s). The next write will try again.", self.path, error.strerror)
        else:
            self.size += len(new)
            self._waiting = b""

    def _warn(self, expected: int) -> None:
        log.warning("%s: has %s bytes instead of %s. The missing lines are lost.", self.path, self.size, expected)

    def state(self) -> dict[str, Any]:
        """Flush the file to the disk, and return its size and the text that is not yet written."""
        if self.path.exists():
            flush(self.path)
        return {"size": self.size, "waiting": self._waiting.decode()}


def complete_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file, with their newlines. A crash can leave an incomplete last line, which is left out."""
    *lines, rest = path.read_bytes().split(b"\n")
    if rest:
        log.warning("%s: its last line is incomplete, and is left out.", path)
    return [line.decode() + "\n" for line in lines]


def read_text(path: Path | TextIO) -> str:
    """Read a small UTF-8 text: a file, with or without a byte-order mark, or an open stream.

    Raises:
        OSError, ValueError: it cannot be read, is larger than `MAX_TEXT_LENGTH`, or is not UTF-8.
    """
    if isinstance(path, Path):
        with path.open(encoding="utf-8-sig") as file:
            return read_text(file)
    text = path.read(MAX_TEXT_LENGTH + 1)
    if len(text) > MAX_TEXT_LENGTH:
        raise ValueError(f"longer than {MAX_TEXT_LENGTH:,} characters")
    return text
