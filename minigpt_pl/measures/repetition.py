"""What can be measured on a text alone: plain functions on its token ids, or its words."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Loop(NamedTuple):
    """A stretch of a text that goes round in circles.

    Attributes:
        onset: place of its first token.
        period: tokens in one turn.
        length: tokens from the onset to the end of the last turn, which may be cut short.
    """

    onset: int
    period: int
    length: int


def distinct(ids: Sequence[int], n: int) -> float:
    """Distinct-n: different n-grams / n-grams.

    Range (0, 1]; 1: none comes twice. Higher is more diverse. Falls with the length of a text, so compare texts of one
    length. nan for fewer than n tokens. Source: Li et al., arXiv 1510.03055.
    """
    ngrams = list(zip(*(ids[i:] for i in range(n)), strict=False))
    return len(set(ngrams)) / len(ngrams) if ngrams else float("nan")


def repeated(ids: Sequence[int], n: int = 4) -> float:
    """seq-rep-n: 1 - different n-grams / n-grams, the share of n-grams that stand earlier in the text.

    Range [0, 1); 0: none comes twice. Lower is less repetitive. nan for fewer than n tokens.
    Source: Welleck et al., arXiv 1908.04319, equation 9.
    """
    return 1 - distinct(ids, n)


def recurring(context: Sequence[int], ids: Sequence[int], weights: np.ndarray) -> float:
    """Lexical cohesion: of the words in a text's second half, the share that stand before that half too, by weight.

    Range [0, 1]; higher: the text holds to the people and things that it spoke of, or goes round in circles. nan where
    the second half weighs nothing. Names count as the rare words they are: lower-cased text does not tell them apart.
    Source: reiteration in Halliday and Hasan, Cohesion in English, 1976; Barzilay and Lapata's entity grid
    (Computational Linguistics 34, 2008) follows nouns in the same way.

    Args:
        context: what the text continues; it counts as what stands before.
        weights: (V,), 0 or above; inverse document frequencies let rare words count.
    """
    half = len(ids) // 2
    before, second = {*context, *ids[:half]}, np.asarray(ids[half:], dtype=np.int64)
    total, returning = weights[second].sum(), weights[[id_ for id_ in second.tolist() if id_ in before]].sum()
    return float(returning / total) if total else float("nan")


def longest_loop(ids: Sequence[int]) -> Loop:
    """The longest stretch that repeats itself with one period for at least two whole turns.

    `ids[i] == ids[i + period]` throughout. Its length is 0 where there is none; shorter is less repetitive. Of equal
    ones the shortest period counts, then the earliest. Such stretches are the "runs" of Main, Discrete Applied
    Mathematics 25 (1989).
    """
    best = Loop(0, 0, 0)
    for period in range(1, len(ids) // 2 + 1):
        for start, length in equal_at(ids, period):
            if length >= period and length + period > best.length:
                best = Loop(start, period, length + period)
    return best


def equal_at(ids: Sequence[int], distance: int) -> list[tuple[int, int]]:
    """(start, length) of the stretches that come again this many tokens later."""
    same = np.asarray(ids[distance:]) == np.asarray(ids[: len(ids) - distance])
    edges = np.flatnonzero(np.diff(np.concatenate([[False], same, [False]])))
    return [(int(start), int(end - start)) for start, end in edges.reshape(-1, 2)]


def self_bleu(texts: Sequence[Sequence[str]]) -> list[float]:
    """Self-BLEU: each text's BLEU-4 (sacrebleu's, exponential smoothing) with the others as its references.

    Range [0, 100]; 100: the others say the same. Lower is more diverse. nan for a text that is alone.
    Source: Zhu et al. (Texygen), arXiv 1802.01886.
    """
    import sacrebleu

    joined = [" ".join(words) for words in texts]
    return [
        sacrebleu.sentence_bleu(text, others, tokenize="none").score if others else float("nan")
        for i, text in enumerate(joined)
        for others in [joined[:i] + joined[i + 1 :]]
    ]
