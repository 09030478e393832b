"""The folders of the cache. A folder is complete or missing, and damage is noticed before the damaged file is used.

Each folder has a manifest with the length and the CRC-32 of every file, and of the manifest itself. CRC-32 finds every
damage by chance but one in four billion. It takes half the time of SHA-256.

All files of a folder of at most `CHECKED_AT_START` bytes are checked at each start. In a larger folder, a start checks
only their lengths, and `check_file` checks each file before its first use.
"""

import errno
import json
import logging
import os
import platform
import re
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from minigpt_pl.errors import InputError
from minigpt_pl.files import file_crc32 as _file_crc32
from minigpt_pl.files import flush, is_running, make_folder, remove

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
CHECKED_AT_START = 2**30  # bytes; half a second
DAY = 24 * 3600.0


def fill(folder: Path, write: Callable[[Path], dict[str, Any]], setting: str, check_all: bool = False) -> None:
    """Make a folder of the cache, unless it is complete. A complete one is not written to, so it may be read-only.

    Args:
        write: writes the files into the folder that it gets. Returns values for the manifest. After a kill, `write` of
            the next call gets the same folder. After an error too, if the folder contains a file `shard-*`.
        setting: name of the setting of the cache's folder, for error messages.
        check_all: read every byte of a large folder too.

    Raises:
        InputError: the cache cannot be read or written.
    """
    from filelock import FileLock

    try:
        if find_damage(folder, check_all) is None:
            return
        make_folder(folder.parent, setting)
        with FileLock(folder.with_suffix(".lock")):
            damage = find_damage(folder, check_all)
            if damage is None:  # another process has made it meanwhile
                return
            if os.path.lexists(folder):
                log.warning("%s. This file of the cache is damaged, so the text is encoded again.", damage)
                remove(folder)
            with _write_folder(folder) as temporary:
                _seal(temporary, write(temporary))
    except OSError as error:
        remedy = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "give another folder"
        raise InputError(f"{setting}={folder.parent}: cannot be used ({error.strerror or error}); {remedy}") from error


def find_damage(folder: Path, check_all: bool = False) -> str | None:
    """Compare the files with the manifest. Returns the first problem in one line, or None.

    If the folder is small, or with `check_all`, this reads every byte: half a second per gigabyte if the files are in
    memory, else as fast as the disk.

    Raises:
        PermissionError: a file belongs to another user.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        if not isinstance(manifest, dict) or manifest.pop("crc32", None) != _manifest_crc32(manifest):
            return f"{path}: does not have its checksum"
        check_all |= sum(size for size, _ in manifest["files"].values()) <= CHECKED_AT_START
        for name, (size, crc32) in manifest["files"].items():
            path = folder / name
            if (found := path.stat().st_size) != size:
                return f"{path}: has {found:,} bytes instead of {size:,}"
            if check_all and _file_crc32(path) != crc32:
                return f"{path}: does not have its checksum"
    except PermissionError:
        raise
    except OSError as error:
        return f"{path}: {error.strerror}"
    except (ValueError, RecursionError):
        return f"{path}: is not JSON"
    return None


def check_file(path: Path, manifest: dict[str, Any]) -> None:
    """Check a file of a large folder before its first use.

    Raises:
        InputError: it is missing or damaged.
    """
    sizes = manifest["files"]
    try:
        if path.stat().st_size != sizes[path.name][0]:
            problem = f"has not {sizes[path.name][0]:,} bytes"
        elif sum(size for size, _ in sizes.values()) > CHECKED_AT_START and _file_crc32(path) != sizes[path.name][1]:
            problem = "does not have its checksum"
        else:
            return
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    raise InputError(
        f"data.cache_dir={path.parents[1]}: {path} {problem}; run python -m minigpt_pl.prepare with the same data and"
        " model.vocab_size, which makes it again, and resume"
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The values that `write` returned in `fill`. Call `find_damage` first."""
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
    return manifest


def _seal(folder: Path, values: dict[str, Any]) -> None:
    """Write the manifest of a complete folder."""
    files = {path.name: (path.stat().st_size, _file_crc32(path)) for path in sorted(folder.iterdir())}
    manifest = values | {"files": files}
    manifest["crc32"] = _manifest_crc32(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _manifest_crc32(manifest: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


@contextmanager
def _write_folder(folder: Path) -> Iterator[Path]:
    """Write a folder atomically.

    Yields a temporary folder, for the caller to fill. Afterwards it is flushed to disk and renamed. If another process
    has been faster, its folder stays: on some network file systems, file locks do nothing.
    """
    # Two machines that share the cache can have the same process id.
    temporary = folder.with_name(f".{folder.name}.{platform.node()}.{os.getpid()}")
    _take_leftovers(folder, temporary)
    temporary.mkdir(exist_ok=True)
    try:
        yield temporary
        for written in (*temporary.iterdir(), temporary):
            flush(written)
        try:
            temporary.rename(folder)
        except OSError:
            if find_damage(folder) is not None:
                raise
            remove(temporary)
        flush(folder.parent)
    except Exception:
        if not any(temporary.glob("shard-*")):
            remove(temporary)
        raise


def _take_leftovers(folder: Path, temporary: Path) -> None:
    """Rename what a killed process has left of this folder to `temporary`. Remove its other leftovers.

    The caller holds the lock of `folder`. Processes of other machines and containers cannot be seen from here. So all
    other temporary folders in the cache count as left after a day without a change.
    """
    for leftover in folder.parent.iterdir():
        found = re.fullmatch(r"\.([0-9a-f]{16})\.(?:(.+)\.)?(\d{1,9})", leftover.name)
        if found is None:
            continue
        with suppress(FileNotFoundError, PermissionError):  # another process removes it too, or it has another owner
            if (found[1], found[2]) == (folder.name, platform.node()):
                ended = not is_running(int(found[3]))
            else:
                ended = time.time() - max(path.stat().st_mtime for path in (leftover, *leftover.iterdir())) > DAY
            if not ended or leftover == temporary:
                continue
            if found[1] == folder.name and not temporary.exists():
                leftover.rename(temporary)
            else:
                log.info("Removing %s, which a killed process has left.", leftover)
                remove(leftover)
