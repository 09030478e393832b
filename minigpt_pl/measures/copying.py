"""How much of a text is copied: its longest run of words that stands in the training text."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SHORTEST = 4  # words; shorter runs stand in any large text
FILTER_BITS = 24
SPREAD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / the golden ratio: Knuth's multiplicative hashing


class Copy(NamedTuple):
    """A text's longest run that stands in the training text; of several the first.

    Attributes:
        start: its place in the text.
        length: in words; 0 where no run of `SHORTEST` words does.
        document: of the training text, where it stands; -1 for none.
        seen: the share of the text's runs of `SHORTEST` words that stand in the training text, in [0, 1]; nan for a
            shorter text. Real held-out text shows what is usual: much lower is odd phrasing, much higher is copying.
    """

    start: int
    length: int
    document: int
    seen: float


def longest_copies(
    texts: Sequence[Sequence[int]], tokens: np.ndarray, offsets: np.ndarray, never: Sequence[int] = ()
) -> list[Copy]:
    """The longest copied run of each text. 13 million tokens take some seconds, however many texts there are.

    All texts at once are held against the training text, for runs of 4, 5, 6 ... words; only places where the run
    before was found stay in play. After n-gram novelty, McCoy et al. (RAVEN), arXiv 2111.09509.

    Args:
        texts: ids.
        tokens: (T,) ids of the training text, documents end to end, each closed by an id that no text has.
        offsets: (N + 1,); document i is `tokens[offsets[i]:offsets[i + 1]]`.
        never: ids that match nothing, as `[UNK]`, which may stand for different words.
    """
    # Random 64-bit values for the ids make the hash of a run (they are multiplied up and added) one that no text is
    # likely to fool: 1e13 pairs at 2^-64.
    size = 1 + max(int(tokens.max()), *(max(text, default=0) for text in texts))
    values = np.random.default_rng(0).integers(2**63, size=size, dtype=np.uint64)
    sizes = [len(text) for text in texts]
    text_offsets = np.concatenate([[0], np.cumsum(sizes)])
    ours = np.concatenate([np.asarray(text, dtype=np.int64) for text in texts])
    ends = np.repeat(text_offsets[1:], sizes)
    lengths, found_at = np.zeros(len(ours), np.int64), np.full(len(ours), -1)

    our_places = np.flatnonzero(np.arange(len(ours)) + SHORTEST <= ends)
    for id_ in never:
        bad = np.flatnonzero(ours == id_)
        ends = np.minimum(ends, np.append(bad, len(ours))[np.searchsorted(bad, np.arange(len(ours)))])
    our_places = our_places[our_places + SHORTEST <= ends[our_places]]
    places = np.arange(len(tokens) - SHORTEST + 1)
    our_hash, hashes = _hash(values[ours], SHORTEST)[our_places], _hash(values[tokens], SHORTEST)
    length = SHORTEST
    while len(our_places):
        wanted, numbers = np.unique(our_hash, return_inverse=True)
        known = np.zeros(2**FILTER_BITS, bool)  # says at once of most that they are not wanted
        known[_short(wanted)] = True
        maybe = known[_short(hashes)]
        places, hashes = places[maybe], hashes[maybe]
        at = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
        hit = wanted[at] == hashes
        places, hashes, at = places[hit], hashes[hit], at[hit]
        first = np.full(len(wanted), -1)
        first[at[::-1]] = places[::-1]
        alive = first[numbers] >= 0
        our_places, our_hash, numbers = our_places[alive], our_hash[alive], numbers[alive]
        lengths[our_places], found_at[our_places] = length, first[numbers]
        # One word more.
        inside = our_places + length < ends[our_places]
        our_places, our_hash = our_places[inside], our_hash[inside]
        our_hash = our_hash * SPREAD + values[ours[our_places + length]]
        inside = places + length < len(tokens)
        places, hashes = places[inside], hashes[inside]
        hashes = hashes * SPREAD + values[tokens[places + length]]
        length += 1
    return [_copy(lengths[a:b], found_at[a:b], offsets) for a, b in zip(text_offsets, text_offsets[1:], strict=False)]


def _hash(values: np.ndarray, length: int) -> np.ndarray:
    """(T,) -> (T - length + 1,): of each run of this length; numbers wrap round at 2^64."""
    count = max(len(values) - length + 1, 0)
    hashes = values[:count].copy()
    for i in range(1, length):
        hashes = hashes * SPREAD + values[i : i + count]
    return hashes


def _short(hashes: np.ndarray) -> np.ndarray:
    return (hashes * SPREAD) >> np.uint64(64 - FILTER_BITS)


def _copy(lengths: np.ndarray, found_at: np.ndarray, offsets: np.ndarray) -> Copy:
    runs = len(lengths) - SHORTEST + 1
    seen = float(np.mean(lengths[:runs] >= SHORTEST)) if runs > 0 else float("nan")
    if not lengths.any():
        return Copy(0, 0, -1, seen)
    start = int(lengths.argmax())
    document = int(np.searchsorted(offsets, found_at[start], side="right")) - 1
    return Copy(start, int(lengths[start]), document, seen)
