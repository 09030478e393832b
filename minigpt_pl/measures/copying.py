"""How much of a text is copied: its longest sequence of words that also occurs in the training text."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

MIN_LENGTH = 4  # words; a large text contains most shorter sequences
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / the golden ratio: Knuth's multiplicative hashing


class Copy(NamedTuple):
    """The longest sequence of words in a text that also occurs in the training text. Of several, the first.

    A sequence with the same word three times in a row never counts. So a row such as `* * * *` is no copy.

    `seen_4grams` is the share of the text's 4-word sequences that occur in the training text. It is nan for a text of
    fewer than 4 words. A much lower value than that of real held-out text means odd phrases. A much higher value means
    copying.
    """

    start: int  # position in the text
    length: int  # words; 0 if no sequence of MIN_LENGTH words occurs in the training text
    document: int  # number of the first training document that contains it; -1 if there is none
    seen_4grams: float


def longest_copies(
    texts: Sequence[Sequence[int]], tokens: np.ndarray, offsets: np.ndarray, ignored_ids: Sequence[int] = ()
) -> list[Copy]:
    """Find the longest copied sequence of each text. With 13 million tokens of training text, this takes some seconds.

    The search begins with the sequences of 4 words in all texts. A sequence of n + 1 words is searched only where a
    sequence of n words was found. After n-gram novelty, McCoy et al. (RAVEN), arXiv 2111.09509.

    Args:
        tokens, offsets: the training text as in `NGramModel.fit`. Each document ends with an id that no text contains.
        ignored_ids: ids that never match, such as `[UNK]`, which stands for different words.
    """
    text_offsets = np.cumsum([0, *map(len, texts)])
    text_ids = np.concatenate([np.zeros(0, np.int64), *(np.array(text, np.int64) for text in texts)])
    # Each id gets a random 64-bit value. The hash of a sequence combines them. A false match is very unlikely: there
    # are 1e13 pairs, and each matches with a probability of 2^-64.
    size = 1 + max(int(tokens.max()), int(text_ids.max(initial=0)))
    values = np.random.default_rng(0).integers(2**63, size=size, dtype=np.uint64)
    # A sequence ends at the end of its text, before the next ignored id, or before the third of three equal words.
    positions, ends = np.arange(len(text_ids)), np.repeat(text_offsets[1:], np.diff(text_offsets))
    ignored = np.append(np.flatnonzero(np.isin(text_ids, ignored_ids)), len(text_ids))
    equal = text_ids[1:] == text_ids[:-1]
    third = np.append(np.flatnonzero(equal[1:] & equal[:-1]) + 2, len(text_ids) + 1)
    ends = np.minimum(ends, ignored[np.searchsorted(ignored, positions)])
    ends = np.minimum(ends, third[np.searchsorted(third, positions + 1, side="right")])

    lengths, found_at = np.zeros(len(text_ids), np.int64), np.full(len(text_ids), -1)
    text_starts = np.flatnonzero(positions + MIN_LENGTH <= ends)
    starts = np.arange(len(tokens) - MIN_LENGTH + 1)
    text_hashes, hashes = _hash(values[text_ids], MIN_LENGTH)[text_starts], _hash(values[tokens], MIN_LENGTH)
    length = MIN_LENGTH
    while len(text_starts):
        wanted, numbers = np.unique(text_hashes, return_inverse=True)
        indices = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
        matches = wanted[indices] == hashes
        starts, hashes, indices = starts[matches], hashes[matches], indices[matches]
        first = np.full(len(wanted), -1)
        first[indices[::-1]] = starts[::-1]
        found = first[numbers] >= 0
        text_starts, text_hashes, numbers = text_starts[found], text_hashes[found], numbers[found]
        lengths[text_starts], found_at[text_starts] = length, first[numbers]
        # Add one word to every sequence that was found.
        fits = text_starts + length < ends[text_starts]
        text_starts, text_hashes = text_starts[fits], text_hashes[fits]
        text_hashes = text_hashes * MULTIPLIER + values[text_ids[text_starts + length]]
        fits = starts + length < len(tokens)
        starts, hashes = starts[fits], hashes[fits]
        hashes = hashes * MULTIPLIER + values[tokens[starts + length]]
        length += 1
    copies = []
    for a, b in pairwise(text_offsets.tolist()):
        is_seen = lengths[a : max(b - MIN_LENGTH + 1, a)] >= MIN_LENGTH  # for each sequence of MIN_LENGTH words
        seen = float(is_seen.mean()) if len(is_seen) else math.nan
        if is_seen.any():
            start = a + int(lengths[a:b].argmax())
            document = int(np.searchsorted(offsets, found_at[start], side="right")) - 1
            copies.append(Copy(start - a, int(lengths[start]), document, seen))
        else:
            copies.append(Copy(0, 0, -1, seen))
    return copies


def _hash(values: np.ndarray, length: int) -> np.ndarray:
    """Hash each sequence of this length: (T,) -> (T - length + 1,). Overflow at 2^64 is intended."""
    count = max(len(values) - length + 1, 0)
    hashes = values[:count].copy()
    for i in range(1, length):
        hashes = hashes * MULTIPLIER + values[i : i + count]
    return hashes
