"""Atomic writes."""

import platform
import signal
import subprocess
import sys

import pytest

from minigpt_pl.files import GrowingFile, atomic_write, complete_lines, remove_temporaries, write_text


def test_a_new_file_replaces_the_old_one(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    with atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
        assert temporary.parent == tmp_path, "a rename between file systems is a copy"
        assert (tmp_path / "a.txt").read_text() == "old"
    assert [path.read_text() for path in tmp_path.iterdir()] == ["new"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("ha")
        raise KeyboardInterrupt
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_folder(tmp_path):
    for _ in range(2):
        with atomic_write(tmp_path / "made") as temporary:
            temporary.mkdir()
            (temporary / "inside.txt").write_text("text")
        assert (tmp_path / "made" / "inside.txt").read_text() == "text"
        (tmp_path / "made").rename(temporary)  # as if this process had been killed before its rename


class TestGrowingFile:
    def test_a_resumed_run_cuts_it_where_its_checkpoint_was(self, tmp_path):
        file = GrowingFile(tmp_path / "a.csv")
        file.append("one\n")
        state = file.state()
        file.append("two\ntorn")
        assert (tmp_path / "a.csv").read_text() == "one\ntwo\ntorn"
        GrowingFile(tmp_path / "a.csv", state).append("2\n")
        assert (tmp_path / "a.csv").read_text() == "one\n2\n"

    def test_a_new_run_removes_what_a_killed_run_has_left(self, tmp_path):
        (tmp_path / "a.csv").write_text("old\n")
        GrowingFile(tmp_path / "a.csv").append("new\n")
        assert (tmp_path / "a.csv").read_text() == "new\n"

    def test_what_cannot_be_written_waits(self, tmp_path, caplog):
        """In memory, and in the checkpoint."""
        resource = pytest.importorskip("resource")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        file = GrowingFile(tmp_path / "a.csv")
        file.append("one\n")
        resource.setrlimit(resource.RLIMIT_FSIZE, (6, limits[1]))
        try:
            file.append("two, which is too long\n")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
        assert "a.csv: cannot be written (File too large)" in caplog.text
        state = file.state()
        assert state == {"size": 4, "waiting": "two, which is too long\n"}
        file.append("3\n")
        assert (tmp_path / "a.csv").read_text() == "one\ntwo, which is too long\n3\n"
        GrowingFile(tmp_path / "a.csv", state)
        assert (tmp_path / "a.csv").read_text() == "one\ntwo, which is too long\n"

    def test_a_file_that_has_lost_lines_is_named(self, tmp_path, caplog):
        """After a power cut, or when somebody has edited it."""
        file = GrowingFile(tmp_path / "a.csv")
        file.append("one\ntwo\nthree\n")
        state = file.state()
        (tmp_path / "a.csv").write_text("one\ntw")
        GrowingFile(tmp_path / "a.csv", state).append("4\n")
        assert "a.csv: has 4 bytes instead of 14. The missing lines are lost." in caplog.text
        assert (tmp_path / "a.csv").read_text() == "one\n4\n"

    def test_the_header_is_written_once_after_a_failed_write(self, tmp_path):
        resource = pytest.importorskip("resource")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
        try:
            file = GrowingFile(tmp_path / "a.csv", header="x\n")
            file.append("1\n")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
        assert file.state() == {"size": 0, "waiting": "1\n"}
        file.append("2\n")
        assert (tmp_path / "a.csv").read_text() == "x\n1\n2\n"

    def test_a_file_that_is_removed_meanwhile_gets_its_header_again(self, tmp_path, caplog):
        file = GrowingFile(tmp_path / "a.csv", header="x\n")
        file.append("1\n")
        assert (tmp_path / "a.csv").read_text() == "x\n1\n"
        (tmp_path / "a.csv").unlink()
        file.append("2\n")
        assert (tmp_path / "a.csv").read_text() == "x\n2\n"
        assert "a.csv: has 0 bytes instead of 4. The missing lines are lost." in caplog.text


def test_an_incomplete_last_line_is_left_out(tmp_path, caplog):
    (tmp_path / "a.csv").write_text("one\ntwo\n0.12")
    assert complete_lines(tmp_path / "a.csv") == ["one\n", "two\n"]
    assert "a.csv: its last line is incomplete" in caplog.text


def test_temporaries_of_killed_processes_are_removed(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    here, process_id = platform.node(), process.pid
    (tmp_path / f".last.ckpt.{here}.{process_id}.tmp").write_text("half")
    (tmp_path / f".made.other.{process_id}.tmp").mkdir()
    (tmp_path / ".lock").touch()
    remove_temporaries(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3, "the process is running"
    process.communicate(b"\n")
    remove_temporaries(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".lock", f".made.other.{process_id}.tmp"}
    remove_temporaries(tmp_path, of_all_machines=True)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
