"""Repetition, diversity and cohesion of a text, from its token ids or words alone."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Loop(NamedTuple):
    """A stretch of a text that repeats itself."""

    onset: int  # position of its first word
    period: int  # words in the repeated phrase
    length: int  # words from the onset to the end, which may be inside a phrase


def distinct(ids: Sequence[object], n: int) -> float:
    """Distinct-n: the number of different n-grams divided by the number of n-grams.

    Range (0, 1]; 1 if no n-gram occurs twice. Higher is more diverse. The value falls with the length of a text, so
    compare texts of equal length. nan for fewer than n tokens. Source: Li et al., arXiv 1510.03055.
    """
    ngrams = list(zip(*(ids[i:] for i in range(n)), strict=False))
    return len(set(ngrams)) / len(ngrams) if ngrams else float("nan")


def repeated(ids: Sequence[object], n: int = 4) -> float:
    """seq-rep-n: the share of n-grams that already occurred in the text, 1 - `distinct`.

    Range [0, 1); 0 if no n-gram occurs twice. Lower is less repetitive. nan for fewer than n tokens.
    Source: Welleck et al., arXiv 1908.04319, equation 9.
    """
    return 1 - distinct(ids, n)


def recurring(context: Sequence[int], ids: Sequence[int], weights: np.ndarray) -> float:
    """Lexical cohesion: the weighted share of words in a text's second half that occurred before that half.

    Range [0, 1]. A high value means that the text stays with its people and things, or that it loops. nan if no word of
    the second half has a weight above 0. Names need no special treatment: they are rare, so they have a high weight.
    Source: reiteration in Halliday and Hasan, Cohesion in English, 1976. Barzilay and Lapata's entity grid
    (Computational Linguistics 34, 2008) follows nouns in the same way.

    Args:
        context: the prompt; its words count as words that occurred before.
        weights: (V,), at least 0; inverse document frequencies give rare words a higher weight.
    """
    half = len(ids) // 2
    before, second = {*context, *ids[:half]}, np.array(ids[half:], dtype=np.int64)
    total, returning = weights[second].sum(), weights[[id_ for id_ in second.tolist() if id_ in before]].sum()
    return float(returning / total) if total else float("nan")


def longest_loop(ids: Sequence[object]) -> Loop:
    """The longest stretch that repeats a phrase. The phrase must occur in full at least twice in a row.

    `a b a b a` has period 2 and length 5. The length is 0 if nothing repeats. Of equally long stretches, the shortest
    period wins, then the first. Source: the "runs" of Main, Discrete Applied Mathematics 25 (1989).

    Punctuation marks do not count: `a b , a b .` has period 2 and length 4. This needs words. All ids count.
    """
    positions = [i for i, word in enumerate(ids) if not isinstance(word, str) or any(map(str.isalnum, word))]
    words, best = [ids[i] for i in positions], Loop(0, 0, 0)
    for period in range(1, len(words) // 2 + 1):
        for start, length in equal_stretches(words, period):
            if length >= period and length + period > best.length:
                best = Loop(positions[start], period, length + period)
    return best


def equal_stretches(ids: Sequence[object], distance: int) -> list[tuple[int, int]]:
    """(start, length) of the stretches that occur again `distance` tokens later."""
    equal = np.array(ids[distance:]) == np.array(ids[: len(ids) - distance])
    edges = np.flatnonzero(np.diff(np.concatenate([[False], equal, [False]])))
    return [(int(start), int(end - start)) for start, end in edges.reshape(-1, 2)]


def self_bleu(texts: Sequence[Sequence[str]]) -> list[float]:
    """Self-BLEU: each text's BLEU-4 (sacrebleu's, exponential smoothing) with the other texts as references.

    Range [0, 100]; 100 if the other texts are the same. Lower is more diverse. nan for a single text.
    Source: Zhu et al. (Texygen), arXiv 1802.01886.
    """
    import sacrebleu

    if len(texts) < 2:
        return [float("nan")] * len(texts)
    joined = [" ".join(words) for words in texts]
    pairs = [(text, joined[:i] + joined[i + 1 :]) for i, text in enumerate(joined)]
    return [float(sacrebleu.sentence_bleu(text, others, tokenize="none").score) for text, others in pairs]
