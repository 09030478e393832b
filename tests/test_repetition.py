"""Distinct-n and seq-rep-n against values computed by hand."""

import math

import pytest

from minigpt_pl.measures.repetition import distinct, repeated


def test_distinct():
    words = ["a", "b", "a", "b", "c"]  # ab, ba, ab, bc; aba, bab, abc
    assert [distinct(words, n) for n in (1, 2, 3)] == pytest.approx([3 / 5, 3 / 4, 1])
    assert distinct("aaaa", 1) == 1 / 4 and distinct("a", 1) == 1 and math.isnan(distinct("a", 2))


def test_repeated():
    assert repeated([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)  # 1234, 2341, 3412, 4123, 1234
    assert repeated([1, 2, 3, 4, 5]) == 0 and repeated([7] * 10) == pytest.approx(6 / 7)
    assert math.isnan(repeated([1, 2, 3]))
