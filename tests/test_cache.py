"""The cache of encoded text: damage, kills, races, full disks."""

import errno
import json
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import filelock
import pytest
from conftest import TINY_RUN, run_main, text_config

from minigpt_pl.data import cache, encoding
from minigpt_pl.data.corpus import open_corpus
from minigpt_pl.errors import InputError

FILES = [f"{split}-00000.{name}.npy" for split in ("train", "validation") for name in ("tokens", "offsets")]
FILES += ["tokenizer.json", "manifest.json"]


@pytest.fixture
def config(story, tmp_path):
    return text_config(story, cache_dir=str(tmp_path / "cache"), validation_share=0.2)


@pytest.fixture
def encoded(config):
    """The folder with the encoded story."""
    return Path(config.cache_dir, open_corpus(config, 200).record["fingerprint"])


def content(config) -> str:
    """The hash of the encoded text."""
    return open_corpus(config, 200).record["content"]


def entries(config) -> set[str]:
    """What the cache contains, apart from lock files."""
    return {path.name for path in Path(config.cache_dir).iterdir() if path.suffix != ".lock"}


def assert_noticed(config, folder, caplog, named: Path, before: str) -> None:
    caplog.clear()
    assert content(config) == before
    warnings = [message for message in caplog.messages if "damaged" in message]
    assert len(warnings) == 1 and warnings[0].startswith(f"{named}: ") and warnings[0].count("\n") == 0
    caplog.clear()
    assert content(config) == before and "damaged" not in caplog.text and entries(config) == {folder.name}


def flip_one_bit(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    contents[len(contents) * 2 // 3] ^= 1
    path.write_bytes(contents)


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink,
        make_folder,
        flip_one_bit,
        lambda path: os.truncate(path, 0),
        lambda path: os.truncate(path, path.stat().st_size // 2),
        lambda path: path.write_bytes(bytes(path.stat().st_size)),
        lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    ],
    ids=["missing", "a folder", "one bit", "empty", "half", "zeros", "longer"],
)
def test_a_damaged_file_is_named_and_made_again(config, encoded, caplog, name, damage):
    before = content(config)
    damage(encoded / name)
    assert_noticed(config, encoded, caplog, encoded / name, before)


def test_a_wrong_length_is_told(config, encoded, caplog):
    size = (encoded / "train-00000.tokens.npy").stat().st_size
    os.truncate(encoded / "train-00000.tokens.npy", 1000)
    content(config)
    assert f"train-00000.tokens.npy: has 1,000 bytes instead of {size:,}. This file" in caplog.text


def test_other_ids_in_range_are_noticed(config, encoded, caplog):
    before = content(config)
    path = encoded / "train-00000.tokens.npy"
    contents = path.read_bytes()
    assert contents[-4:-2] != contents[-6:-4]
    path.write_bytes(contents[:-6] + contents[-4:-2] + contents[-6:-4] + contents[-2:])
    assert_noticed(config, encoded, caplog, path, before)


@pytest.mark.parametrize(
    "manifest", ["[1]", "null", "{}", '{"files": 5, "crc32": 1}', '{"files": {}, "crc32": "1"}', "[" * 100_000]
)
def test_a_manifest_of_other_types_is_noticed(config, encoded, caplog, manifest):
    before = content(config)
    (encoded / cache.MANIFEST).write_text(manifest)
    assert_noticed(config, encoded, caplog, encoded / cache.MANIFEST, before)


@pytest.mark.parametrize("name", ["train_tokens", "size of train-00000.tokens.npy"])
def test_another_number_in_the_manifest_is_noticed(config, encoded, caplog, name):
    before = content(config)
    manifest = json.loads((encoded / cache.MANIFEST).read_text())
    if name == "train_tokens":
        manifest["counts"]["train_tokens"] += 1
    else:
        manifest["files"]["train-00000.tokens.npy"][0] += 1
    (encoded / cache.MANIFEST).write_text(json.dumps(manifest))
    assert_noticed(config, encoded, caplog, encoded / cache.MANIFEST, before)


@pytest.mark.parametrize("put", [Path.mkdir, Path.touch, lambda path: path.symlink_to("elsewhere")])
def test_something_else_under_the_name_of_the_folder(config, encoded, caplog, put):
    before = content(config)
    shutil.rmtree(encoded)
    put(encoded)
    assert_noticed(config, encoded, caplog, encoded / cache.MANIFEST, before)


def test_the_manifest_says_which_text_it_is(encoded):
    assert json.loads((encoded / "manifest.json").read_text())["source"] == "story.txt"


class TestLargeText:
    """A start checks only the lengths. Each shard is checked before its first use."""

    @pytest.fixture(autouse=True)
    def everything_is_large(self, monkeypatch):
        monkeypatch.setattr(cache, "CHECKED_AT_START", 0)

    @pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".npy")])
    def test_a_damaged_shard_is_named_before_its_use(self, config, encoded, name):
        flip_one_bit(encoded / name)
        corpus = open_corpus(config, 200)
        ids = corpus.train if name.startswith("train") else corpus.validation
        problem = rf"data.cache_dir=.*: {encoded / name} does not have its checksum; run python -m minigpt_pl.prepare"
        with pytest.raises(InputError, match=problem):
            ids.shard(0)

    @pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 300)], ids=["missing", "shorter"])
    def test_a_shard_that_vanishes_later_is_named(self, config, encoded, damage):
        corpus = open_corpus(config, 200)
        damage(encoded / "train-00000.tokens.npy")
        with pytest.raises(InputError, match=r"train-00000.tokens.npy (cannot be read \(No such|has not [\d,]+ bytes)"):
            corpus.train.shard(0)

    def test_prepare_makes_a_damaged_text_again(self, config, encoded, tmp_path, caplog):
        before = content(config)
        flip_one_bit(encoded / "train-00000.tokens.npy")
        arguments = ["data=text", f"data.path={config.path}", "data.validation_share=0.2", "model.vocab_size=200"]
        arguments += [f"data.cache_dir={config.cache_dir}", "processes=1"]
        done = run_main("prepare", *arguments, cwd=tmp_path)
        assert done.returncode == 0 and done.stdout == f"{encoded}: 3,150 training tokens, 26 words in the vocabulary\n"
        assert "train-00000.tokens.npy: does not have its checksum" in caplog.text
        assert open_corpus(config, 200).train.shard(0) and content(config) == before


def test_a_complete_cache_is_only_read(config, encoded, monkeypatch):
    """So a cluster can share a read-only cache."""
    monkeypatch.setattr(filelock, "FileLock", lambda path: pytest.fail("a lock file was written"))
    before = {path: path.stat().st_mtime_ns for path in (encoded.parent, encoded, *encoded.iterdir())}
    content(config)
    assert before == {path: path.stat().st_mtime_ns for path in (encoded.parent, encoded, *encoded.iterdir())}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can mount a file system")
def test_a_read_only_file_system(config, encoded):
    """The text of the cache is opened, and another text is refused in one line."""
    program = (
        "from conftest import text_config\n"
        "from minigpt_pl.data.corpus import open_corpus\n"
        "for share in (0.2, 0.3):\n"
        f"    config = text_config({config.path!r}, cache_dir={config.cache_dir!r}, validation_share=share)\n"
        "    print(open_corpus(config, 200).record['content'])\n"
    )
    mount = f"mount --bind {config.cache_dir} {config.cache_dir} && mount -o remount,ro,bind {config.cache_dir}"
    command = ["unshare", "--mount", "sh", "-c", f'{mount} || exit 77; "$0" -c "$1"', sys.executable, program]
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip("this machine does not allow to mount")
    assert done.stdout.split() == [content(config)]
    assert f"InputError: data.cache_dir={config.cache_dir}: cannot be used (Read-only file system)" in done.stderr


def test_a_cache_of_another_user(config, encoded, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(cache, "_file_crc32", refuse)
    with pytest.raises(InputError, match=r"data.cache_dir=.*: cannot be used \(Permission denied\); give another"):
        content(config)
    assert set(FILES) == {path.name for path in encoded.iterdir()}, "it has been removed"


def test_a_full_disk_while_encoding(config, story, tmp_path, monkeypatch):
    def write(path, *_):
        path.write_bytes(b"half of the file")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(encoding, "_write_array", write)
    done = run_main("train", *TINY_RUN, f"data.path={story}", f"data.cache_dir={config.cache_dir}", cwd=tmp_path)
    assert done.returncode == 2
    remedy = "cannot be used (No space left on device); free some space"
    assert done.stderr.splitlines()[-1] == f"error: data.cache_dir={config.cache_dir}: {remedy}"
    assert "Traceback" not in done.stderr and not entries(config)


def test_folders_of_killed_processes_are_removed(config):
    fingerprint = Path(config.cache_dir, content(config))  # a name of the same form
    name = Path(config.cache_dir, open_corpus(config, 200).record["fingerprint"]).name
    ended = subprocess.Popen(["true"])
    ended.wait()
    here = platform.node()
    removed = [
        f".{name}.{here}.{ended.pid}",
        f".{name}.{here}.{os.getpid()}",  # of an ended process with the same id
        f".{name}.other-machine.1.old",
        f".{fingerprint.name}.{here}.1.old",
        f".{fingerprint.name}.1.old",  # of version 0.1.0
    ]
    kept = [
        f".{name}.{here}.{os.getppid()}",
        f".{name}.other.machine.1",
        f".{fingerprint.name}.{here}.{ended.pid}",
        ".mine",
        ".mine.1.old",
    ]
    shutil.rmtree(config.cache_dir)
    for given in removed + kept:
        folder = Path(config.cache_dir, given.removesuffix(".old"))
        folder.mkdir(parents=True)
        (folder / "train.provisional").touch()
        if given.endswith(".old"):
            for path in (folder / "train.provisional", folder):
                os.utime(path, (0, path.stat().st_mtime - cache.DAY - 60))
    content(config)
    assert entries(config) == {name, *(given.removesuffix(".old") for given in kept)}


def _die(config, moment: str) -> None:
    """Encodes the text, and kills this process on the way."""
    write = encoding._write_array

    def write_a_part(path, dtype, size, pieces):
        def pieces_until_the_end():
            yield next(pieces)
            yield next(pieces)
            os.kill(os.getpid(), signal.SIGKILL)

        write(path, dtype, size, pieces_until_the_end())

    if moment == "in the tokens":
        encoding.PIECE = 100
        encoding._write_array = write_a_part
    else:
        Path.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    open_corpus(config, 200)


@pytest.mark.parametrize("moment", ["in the tokens", "before the rename"])
def test_a_killed_encoding_leaves_only_a_temporary_folder(config, moment):
    process = multiprocessing.get_context("spawn").Process(target=_die, args=(config, moment))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (leftover,) = entries(config)
    assert leftover.startswith(".") and leftover.endswith(f".{process.pid}")
    files = {path.name for path in Path(config.cache_dir, leftover).iterdir()}
    assert (files == set(FILES)) == (moment == "before the rename") and "train-00000.tokens.npy" in files
    corpus = open_corpus(config, 200)
    assert corpus.record["content"] == "b9d7111c8a356d6b" and entries(config) == {corpus.record["fingerprint"]}


class _NoLock(filelock.FileLock):
    """Does nothing, as on some network file systems."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_a_process_that_has_waited_does_not_encode(config, encoded, tmp_path, monkeypatch, caplog):
    class Wait(_NoLock):
        def __enter__(self):
            (tmp_path / "aside").rename(encoded)

    encoded.rename(tmp_path / "aside")
    monkeypatch.setattr(filelock, "FileLock", Wait)
    monkeypatch.setattr(encoding, "encode", lambda *_: pytest.fail("encoded again"))
    assert content(config) == "b9d7111c8a356d6b" and "damaged" not in caplog.text


def test_a_failed_rename(config, monkeypatch):
    def rename(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(InputError, match=r"data.cache_dir=.*: cannot be used \(Input/output error\)"):
        content(config)
    assert not entries(config)


def _without_locks(barrier) -> None:
    """Locks do nothing in this process. Its encoding is ready at the same time as that of the other process."""
    filelock.FileLock = _NoLock
    encode = encoding.encode

    def encode_and_wait(*arguments):
        record = encode(*arguments)
        barrier.wait(timeout=300)
        return record

    encoding.encode = encode_and_wait


def test_without_file_locks_the_slower_process_takes_the_others_files(config):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    with ProcessPoolExecutor(2, mp_context=context, initializer=_without_locks, initargs=(barrier,)) as pool:
        assert list(pool.map(content, [config] * 2)) == ["b9d7111c8a356d6b"] * 2
    assert len(entries(config)) == 1
