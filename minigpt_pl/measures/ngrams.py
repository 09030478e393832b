"""N-gram language models on token ids: what a network has to be better than.

Interpolated modified Kneser-Ney (S. F. Chen and J. Goodman, "An Empirical Study of Smoothing Techniques for Language
Modeling", TR-10-98, Harvard 1998, section 3.3), with the mark for a text's beginning as in KenLM (K. Heafield et al.,
ACL 2013), to which it is equal. With a as count, D as discount and h' as h without its first word:

    p(w | h) = (a(hw) - D(a(hw))) / a(h.) + p(w | h') * sum over w of D(a(hw)) / a(h.)

and p(w | h') alone where h was never followed by a word. Below the unigrams stands 1 / V, so no word of the vocabulary
has probability 0. In the highest order, and of what begins a document, a(g) is how often g occurs; below it is how many
different words come before g. Order 1 is thereby a smoothed unigram model, order 2 a smoothed bigram model.
"""

from dataclasses import dataclass

import numpy as np

FALLBACK_DISCOUNTS = 0.5, 1.0, 1.5  # KenLM's, where counts of 1 to 4 are too few to estimate them


@dataclass(frozen=True)
class _Order:
    """The n-grams of one length k. Each has a number: its place in `keys`.

    Attributes:
        keys: (G,) int64, sorted: the number of its first k - 1 words, times V + 1, plus its last word.
        shares: (G,) what its own count gives it of the probability.
        left_over: for each n-gram of length k - 1, what the discounts leave to the order below.
    """

    keys: np.ndarray
    shares: np.ndarray
    left_over: np.ndarray


@dataclass(frozen=True)
class NGramModel:
    """A language model of the last `order - 1` words. Made by `fit`."""

    vocab_size: int
    orders: list[_Order]

    @classmethod
    def fit(cls, tokens: np.ndarray, offsets: np.ndarray, vocab_size: int, order: int) -> "NGramModel":
        """Count a text. 13 million tokens take some 20 s and 2 GB at order 5.

        Args:
            tokens: (T,) ids in [0, vocab_size), all documents end to end.
            offsets: (N + 1,); document i is `tokens[offsets[i]:offsets[i + 1]]`. No n-gram crosses its ends.
            vocab_size: V; all its ids get a probability, seen or not.
            order: words in the longest n-grams, at least 1.

        Raises:
            ValueError: an id outside [0, vocab_size), or an order below 1.
        """
        if order < 1:
            raise ValueError(f"order={order}: must be at least 1")
        _check_ids(tokens, vocab_size)
        words = np.insert(tokens.astype(np.int64), offsets[:-1], vocab_size)  # V: a document begins
        ends_here = words  # of each place: the number of the n-gram that ends there; -1: the document is too short
        keys = np.arange(vocab_size + 1)
        occurrences = np.bincount(words, minlength=vocab_size + 1)
        occurrences[vocab_size] = 0  # the mark is never predicted
        orders = []
        for _ in range(order - 1):
            before = np.concatenate([[-1], ends_here[:-1]])
            places = np.flatnonzero((before >= 0) & (words < vocab_size))
            longer_keys, numbers, longer_occurrences = np.unique(
                before[places] * (vocab_size + 1) + words[places], return_inverse=True, return_counts=True
            )
            suffixes = np.empty(len(longer_keys), dtype=np.int64)
            suffixes[numbers] = ends_here[places]
            different_before = np.bincount(suffixes, minlength=len(keys))
            # What begins a document has nothing before it, so it keeps its own count.
            counts = np.where(different_before == 0, occurrences, different_before)
            orders.append(_smooth(keys, counts, len(orders[-1].keys) if orders else 1, vocab_size))
            ends_here = np.full(len(words), -1)
            ends_here[places] = numbers
            keys, occurrences = longer_keys, longer_occurrences
        orders.append(_smooth(keys, occurrences, len(orders[-1].keys) if orders else 1, vocab_size))
        return cls(vocab_size, orders)

    def log_probabilities(self, ids: np.ndarray) -> np.ndarray:
        """Each id's log probability given those before it: ids (L,) of one whole document -> (L,), in nats.

        Raises:
            ValueError: an id outside [0, vocab_size).
        """
        _check_ids(ids, self.vocab_size)
        words = np.concatenate([[self.vocab_size], ids]).astype(np.int64)
        unigrams, *longer = self.orders
        probabilities = unigrams.shares[words] + unigrams.left_over[0] / self.vocab_size
        ends_here = words
        for order in longer:
            before = np.concatenate([[-1], ends_here[:-1]])
            places = np.flatnonzero(before >= 0)
            wanted = before[places] * (self.vocab_size + 1) + words[places]
            numbers = np.searchsorted(order.keys, wanted)
            seen = numbers < len(order.keys)
            seen[seen] = order.keys[numbers[seen]] == wanted[seen]
            probabilities[places] *= order.left_over[before[places]]
            probabilities[places[seen]] += order.shares[numbers[seen]]
            ends_here = np.full(len(words), -1)
            ends_here[places[seen]] = numbers[seen]
        return np.log(probabilities[1:])


def _check_ids(ids: np.ndarray, vocab_size: int) -> None:
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ValueError(f"ids from {ids.min()} to {ids.max()}: the vocabulary has 0 to {vocab_size - 1}")


def _smooth(keys: np.ndarray, counts: np.ndarray, num_contexts: int, vocab_size: int) -> _Order:
    contexts = keys // (vocab_size + 1)
    discounts = _discounts(counts)[np.minimum(counts, 3)]
    totals = np.bincount(contexts, counts, num_contexts)
    left_over = np.ones(num_contexts)
    np.divide(np.bincount(contexts, discounts, num_contexts), totals, out=left_over, where=totals > 0)
    shares = np.divide(counts - discounts, totals[contexts], out=np.zeros(len(keys)), where=counts > 0)
    return _Order(keys, shares.astype(np.float32), left_over.astype(np.float32))


def _discounts(counts: np.ndarray) -> np.ndarray:
    """What is taken from counts of 0, 1, 2 and from 3 on (equation 26 of the report)."""
    _, *n = np.bincount(np.minimum(counts, 5), minlength=6)[:5]
    if all(n):
        y = n[0] / (n[0] + 2 * n[1])
        estimates = [count - (count + 1) * y * n[count] / n[count - 1] for count in (1, 2, 3)]
        if all(0 <= discount <= count for count, discount in enumerate(estimates, 1)):
            return np.array([0.0, *estimates])
    return np.array([0.0, *FALLBACK_DISCOUNTS])
