"""N-gram language models on token ids, a baseline for the network.

Interpolated modified Kneser-Ney smoothing (S. F. Chen and J. Goodman, "An Empirical Study of Smoothing Techniques for
Language Modeling", TR-10-98, Harvard 1998, section 3.3):

    p(w | h) = (a(hw) - D(a(hw))) / a(h.) + p(w | h') * sum over w of D(a(hw)) / a(h.)

- w is the predicted word, h the words before it, and h' the same words without the first one.
- a(g) is the count of the n-gram g. In the highest order, and if g begins a document, it is how often g occurs. In
  lower orders, it is the number of different words before g.
- a(h.) is the sum of a(hw) over all w. D is the discount, which depends on the count.

If no word follows h in the text, p(w | h) = p(w | h'). Unigrams back off to 1 / V, so each word's p is above 0. As in
KenLM (K. Heafield et al., ACL 2013), each document begins with a mark. The probabilities equal KenLM's.
"""

from dataclasses import dataclass

import numpy as np
from tqdm import trange  # comes with lightning

FALLBACK_DISCOUNTS = 0.5, 1.0, 1.5  # those of KenLM, if the counts are too few for an estimate


@dataclass(frozen=True)
class _Order:
    """The n-grams of one length k. The number of an n-gram is its index in `keys`."""

    keys: np.ndarray  # (G,) int64, sorted: the number of its first k - 1 words, times V + 1, plus its last word
    probabilities: np.ndarray  # (G,), the part of the probability that comes from the count of the n-gram
    backoffs: np.ndarray  # for each n-gram of length k - 1, the weight of the next lower order


@dataclass(frozen=True)
class NGramModel:
    """A language model that sees the last `order - 1` words. Create it with `fit`."""

    vocab_size: int
    orders: list[_Order]

    @classmethod
    def fit(
        cls, tokens: np.ndarray, offsets: np.ndarray, vocab_size: int, order: int, show_progress: bool = False
    ) -> "NGramModel":
        """Count the n-grams of a text. 13 million tokens take about 20 s and 2 GB at order 5.

        Args:
            tokens: (T,) ids in [0, vocab_size) of all documents.
            offsets: (N + 1,); document i is `tokens[offsets[i]:offsets[i + 1]]`. No n-gram crosses documents.
            order: words in the longest n-grams, at least 1.

        Raises:
            ValueError: an id outside [0, vocab_size), or an order below 1.
        """
        if order < 1:
            raise ValueError(f"order={order}: must be at least 1")
        _check_ids(tokens, vocab_size)
        words = np.insert(tokens.astype(np.int64), offsets[:-1], vocab_size)  # V marks the beginning of a document
        ending_here = words  # number of the n-gram that ends at each position; -1 if too few words come before
        keys = np.arange(vocab_size + 1)
        occurrences = np.bincount(words, minlength=vocab_size + 1)
        occurrences[vocab_size] = 0  # the mark is never predicted
        orders: list[_Order] = []
        disable = None if show_progress else True  # with None, tqdm draws no bar if the output is not a terminal
        for _ in trange(1, order, desc=f"Counting {order}-grams", unit=" orders", disable=disable, leave=False):
            before = np.concatenate([[-1], ending_here[:-1]])
            positions = np.flatnonzero((before >= 0) & (words < vocab_size))
            longer_keys, numbers, longer_occurrences = np.unique(
                before[positions] * (vocab_size + 1) + words[positions], return_inverse=True, return_counts=True
            )
            suffixes = np.empty(len(longer_keys), dtype=np.int64)
            suffixes[numbers] = ending_here[positions]
            different_before = np.bincount(suffixes, minlength=len(keys))
            # No word comes before an n-gram that begins a document, so it keeps its own count.
            counts = np.where(different_before == 0, occurrences, different_before)
            orders.append(_smooth(keys, counts, len(orders[-1].keys) if orders else 1, vocab_size))
            ending_here = np.full(len(words), -1)
            ending_here[positions] = numbers
            keys, occurrences = longer_keys, longer_occurrences
        orders.append(_smooth(keys, occurrences, len(orders[-1].keys) if orders else 1, vocab_size))
        return cls(vocab_size, orders)

    def log_probabilities(self, ids: np.ndarray) -> np.ndarray:
        """The log probability of each token of one document, given the tokens before it: (T,) -> (T,), in nats.

        Raises:
            ValueError: an id outside [0, vocab_size).
        """
        _check_ids(ids, self.vocab_size)
        words = np.concatenate([[self.vocab_size], ids]).astype(np.int64)
        unigrams, *longer = self.orders
        probabilities = unigrams.probabilities[words] + unigrams.backoffs[0] / self.vocab_size
        ending_here = words
        for order in longer:
            before = np.concatenate([[-1], ending_here[:-1]])
            positions = np.flatnonzero(before >= 0)
            wanted = before[positions] * (self.vocab_size + 1) + words[positions]
            numbers = np.searchsorted(order.keys, wanted)
            found = numbers < len(order.keys)
            found[found] = order.keys[numbers[found]] == wanted[found]
            probabilities[positions] *= order.backoffs[before[positions]]
            probabilities[positions[found]] += order.probabilities[numbers[found]]
            ending_here = np.full(len(words), -1)
            ending_here[positions[found]] = numbers[found]
        log_probabilities: np.ndarray = np.log(probabilities[1:])
        return log_probabilities


def _check_ids(ids: np.ndarray, vocab_size: int) -> None:
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ValueError(f"ids from {ids.min()} to {ids.max()}: must be from 0 to {vocab_size - 1}")


def _smooth(keys: np.ndarray, counts: np.ndarray, num_contexts: int, vocab_size: int) -> _Order:
    contexts = keys // (vocab_size + 1)
    discounts = _discounts(counts)[np.minimum(counts, 3)]
    totals = np.bincount(contexts, counts, num_contexts)
    backoffs = np.ones(num_contexts)
    np.divide(np.bincount(contexts, discounts, num_contexts), totals, out=backoffs, where=totals > 0)
    probabilities = np.divide(counts - discounts, totals[contexts], out=np.zeros(len(keys)), where=counts > 0)
    return _Order(keys, probabilities.astype(np.float32), backoffs.astype(np.float32))


def _discounts(counts: np.ndarray) -> np.ndarray:
    """Discounts of counts 0, 1, 2, and of 3 and more (Chen and Goodman, equation 26)."""
    _, *n = np.bincount(np.minimum(counts, 5), minlength=6)[:5]
    if all(n):
        y = n[0] / (n[0] + 2 * n[1])
        estimates = [count - (count + 1) * y * n[count] / n[count - 1] for count in (1, 2, 3)]
        if all(0 <= discount <= count for count, discount in enumerate(estimates, 1)):
            return np.array([0.0, *estimates])
    return np.array([0.0, *FALLBACK_DISCOUNTS])
