"""What can be measured on a text alone: plain functions on its token ids, or its words."""

from collections.abc import Sequence


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
