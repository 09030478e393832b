"""Atomic writes."""

import pytest

from minigpt_pl.files import atomic_write, write_text


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
