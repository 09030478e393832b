"""How much of a text is copied: its longest run of words that also occurs in the training text."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

MIN_LENGTH = 4  # words; a large text contains most shorter runs
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / the golden ratio: Knuth's multiplicative hashing


class Copy(NamedTuple):
    """The longest run of a text that occurs in the training text; of several runs, the first.

    `seen_4grams` is the share of the text's runs of `MIN_LENGTH` words that occur in the training text; nan for a
    shorter text. Compare it with real held-out text: a much lower value means odd phrases, a much higher value means
    copying.
    """

    start: int  # position in the text
    length: int  # words; 0 if no run of MIN_LENGTH words occurs in the training text
    document: int  # number of the first training document that contains the run; -1: none
    seen_4grams: float


def longest_copies(
    texts: Sequence[Sequence[int]], tokens: np.ndarray, offsets: np.ndarray, ignored_ids: Sequence[int] = ()
) -> list[Copy]:
    """Find the longest copied run of each text. 13 million tokens take some seconds for any number of texts.

    The search compares runs of 4, 5, 6 ... words of all texts with the training text. A position is searched further
    only if its shorter run was found. After n-gram novelty, McCoy et al. (RAVEN), arXiv 2111.09509.

    Args:
        tokens, offsets: the training text as in `NGramModel.fit`. Each document ends with an id that no text contains.
        ignored_ids: ids that match nothing, such as `[UNK]`, which stands for different words.
    """
    text_offsets = np.cumsum([0, *map(len, texts)])
    ours = np.concatenate([np.zeros(0, np.int64), *(np.array(text, np.int64) for text in texts)])
    # Each id gets a random 64-bit value. The hash of a run combines them, so a false match is very unlikely: 1e13 pairs
    # with a probability of 2^-64 each.
    size = 1 + max(int(tokens.max()), int(ours.max(initial=0)))
    values = np.random.default_rng(0).integers(2**63, size=size, dtype=np.uint64)
    # A run ends before the next ignored id, or with its text.
    ignored = np.append(np.flatnonzero(np.isin(ours, ignored_ids)), len(ours))
    ends = np.repeat(text_offsets[1:], np.diff(text_offsets))
    ends = np.minimum(ends, ignored[np.searchsorted(ignored, np.arange(len(ours)))])

    lengths, found_at = np.zeros(len(ours), np.int64), np.full(len(ours), -1)
    our_starts = np.flatnonzero(np.arange(len(ours)) + MIN_LENGTH <= ends)
    starts = np.arange(len(tokens) - MIN_LENGTH + 1)
    our_hashes, hashes = _hash(values[ours], MIN_LENGTH)[our_starts], _hash(values[tokens], MIN_LENGTH)
    length = MIN_LENGTH
    while len(our_starts):
        wanted, numbers = np.unique(our_hashes, return_inverse=True)
        indices = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
        matches = wanted[indices] == hashes
        starts, hashes, indices = starts[matches], hashes[matches], indices[matches]
        first = np.full(len(wanted), -1)
        first[indices[::-1]] = starts[::-1]
        found = first[numbers] >= 0
        our_starts, our_hashes, numbers = our_starts[found], our_hashes[found], numbers[found]
        lengths[our_starts], found_at[our_starts] = length, first[numbers]
        # Extend every run that was found by one word.
        fits = our_starts + length < ends[our_starts]
        our_starts, our_hashes = our_starts[fits], our_hashes[fits]
        our_hashes = our_hashes * MULTIPLIER + values[ours[our_starts + length]]
        fits = starts + length < len(tokens)
        starts, hashes = starts[fits], hashes[fits]
        hashes = hashes * MULTIPLIER + values[tokens[starts + length]]
        length += 1
    copies = []
    for a, b in pairwise(text_offsets.tolist()):
        is_seen = lengths[a : max(b - MIN_LENGTH + 1, a)] >= MIN_LENGTH  # of each run of MIN_LENGTH words
        seen = float(is_seen.mean()) if len(is_seen) else math.nan
        if is_seen.any():
            start = a + int(lengths[a:b].argmax())
            document = int(np.searchsorted(offsets, found_at[start], side="right")) - 1
            copies.append(Copy(start - a, int(lengths[start]), document, seen))
        else:
            copies.append(Copy(0, 0, -1, seen))
    return copies


def _hash(values: np.ndarray, length: int) -> np.ndarray:
    """Hash each run of this length: (T,) -> (T - length + 1,). Overflow at 2^64 is intended."""
    count = max(len(values) - length + 1, 0)
    hashes = values[:count].copy()
    for i in range(1, length):
        hashes = hashes * MULTIPLIER + values[i : i + count]
    return hashes
