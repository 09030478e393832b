import math
from collections import defaultdict

import numpy as np
import pytest

from minigpt_pl.measures.ngrams import NGramModel


def fit(documents, vocab_size, order):
    offsets = np.cumsum([0, *map(len, documents)])
    return NGramModel.fit(np.array([id_ for document in documents for id_ in document]), offsets, vocab_size, order)


def distribution(model, context):
    """The probabilities of all words after a context that begins a document."""
    ends = [model.log_probabilities(np.array([*context, word]))[-1] for word in range(model.vocab_size)]
    return np.exp(ends)


def some_documents(seed, count, vocab_size):
    """Documents with words of very different frequency; some words depend on the word before."""
    rng = np.random.default_rng(seed)
    documents = []
    for _ in range(count):
        words = [int(rng.integers(3))]
        for _ in range(int(rng.integers(0, 30))):
            words.append((words[-1] + 1) % 5 if rng.random() < 0.5 else int(vocab_size * 0.9 * rng.random() ** 3))
        documents.append(words)
    return [*documents, []]


def test_bigrams_computed_by_hand():
    # Documents "0 1 0 1", "0 2" and "1 0", each after the mark <s>. No word and no bigram has a count of 4, so the
    # discounts are the fallback 0.5, 1 and 1.5.
    model = fit([[0, 1, 0, 1], [0, 2], [1, 0]], vocab_size=4, order=2)
    # Words before 0: <s>, 1; before 1: 0, <s>; before 2: 0. Counts 2, 2, 1, 0 of 5, discounts 1, 1, 0.5.
    uniform = 2.5 / 5 / 4
    unigram = [1 / 5 + uniform, 1 / 5 + uniform, 0.5 / 5 + uniform, uniform]
    # After 0: 1 twice, 2 once; discounts 1 and 0.5 of 3. After <s>: 0 twice, 1 once.
    after_0 = [1.5 / 3 * unigram[0], 1 / 3 + 1.5 / 3 * unigram[1], 0.5 / 3 + 1.5 / 3 * unigram[2], 0.5 * unigram[3]]
    first = [1 / 3 + 0.5 * unigram[0], 0.5 / 3 + 0.5 * unigram[1], 0.5 * unigram[2], 0.5 * unigram[3]]
    np.testing.assert_allclose(distribution(model, [0]), after_0, rtol=1e-6)
    np.testing.assert_allclose(distribution(model, []), first, rtol=1e-6)
    np.testing.assert_allclose(distribution(model, [2]), unigram, rtol=1e-6)  # no word occurs after 2


def test_unigrams_count_occurrences():
    # Words 0 to 4 have the counts 5, 3, 2, 1, 0: discounts 1.5, 1.5, 1, 0.5, 0.
    model = fit([[0, 0, 0, 1, 1], [0, 0, 1, 2, 2, 3]], vocab_size=5, order=1)
    uniform = 4.5 / 11 / 5
    expected = [3.5 / 11 + uniform, 1.5 / 11 + uniform, 1 / 11 + uniform, 0.5 / 11 + uniform, uniform]
    np.testing.assert_allclose(distribution(model, [1, 3]), expected, rtol=1e-6)


def test_discounts_are_estimated_from_the_counts_of_counts():
    # 8 words once, 4 twice, 2 three times, 1 four times, 1 nine times.
    counts = [1] * 8 + [2] * 4 + [3] * 2 + [4, 9]
    document = [word for word, count in enumerate(counts) for _ in range(count)]
    model = fit([document], vocab_size=len(counts), order=1)
    y = 8 / (8 + 2 * 4)
    discounts = {1: 1 - 2 * y * 4 / 8, 2: 2 - 3 * y * 2 / 4, 3: 3 - 4 * y * 1 / 2}
    taken = [discounts[min(count, 3)] for count in counts]
    expected = (np.array(counts) - taken) / sum(counts) + sum(taken) / sum(counts) / len(counts)
    np.testing.assert_allclose(distribution(model, []), expected, rtol=1e-6)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_sum_to_1_in_seen_and_unseen_contexts(order):
    documents = some_documents(0, 200, vocab_size=40)
    model = fit(documents, 40, order)
    for context in ([], documents[0][:1], documents[3][:7], [39], [0, 39, 38, 0, 1], [39] * 6):
        probabilities = distribution(model, context)
        assert probabilities.min() > 0
        assert probabilities.sum() == pytest.approx(1, abs=1e-6)


class Plain:
    """A plain implementation: the equations of the report's section 3.3 with KenLM's mark, word by word."""

    def __init__(self, documents, vocab_size, order):
        self.vocab_size, self.order = vocab_size, order
        occurrences, before = defaultdict(int), defaultdict(set)
        for document in documents:
            words = ["<s>", *document]
            for end in range(1, len(words) + 1):
                for k in range(1, min(order, end) + 1):
                    gram = tuple(words[end - k : end])
                    occurrences[gram] += 1
                    if end > k:
                        before[gram].add(words[end - k - 1])
        del occurrences["<s>",]
        self.counts = {
            gram: count if len(gram) == order or gram[0] == "<s>" else len(before[gram])
            for gram, count in occurrences.items()
        }
        self.followers = defaultdict(list)
        for gram in self.counts:
            self.followers[gram[:-1]].append(gram)
        self.discounts = [self.estimate(k) for k in range(1, order + 1)]

    def estimate(self, k):
        n = [sum(len(gram) == k and count == c for gram, count in self.counts.items()) for c in range(5)]
        try:
            y = n[1] / (n[1] + 2 * n[2])
            found = [0, 1 - 2 * y * n[2] / n[1], 2 - 3 * y * n[3] / n[2], 3 - 4 * y * n[4] / n[3]]
        except ZeroDivisionError:
            found = None
        good = found and all(n[1:]) and all(0 <= d <= i for i, d in enumerate(found))
        return found if good else [0, 0.5, 1, 1.5]

    def probability(self, word, context):
        context = context[len(context) - self.order + 1 :] if len(context) >= self.order else context
        total = sum(self.counts[gram] for gram in self.followers.get(context, []))
        lower = self.probability(word, context[1:]) if context else 1 / self.vocab_size
        if not total:
            return lower
        taken = [self.discounts[len(context)][min(self.counts[gram], 3)] for gram in self.followers[context]]
        count = self.counts.get((*context, word), 0)
        own = count - self.discounts[len(context)][min(count, 3)]
        return own / total + sum(taken) / total * lower


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_equals_a_plain_implementation(order):
    documents = some_documents(1, 300, vocab_size=60)
    model, plain = fit(documents, 60, order), Plain(documents, 60, order)
    if order > 1:
        assert plain.discounts[-1] != [0, 0.5, 1, 1.5], "the case must estimate its discounts"
    for document in [*some_documents(2, 30, vocab_size=66), *documents[:5]]:
        document = [min(word, 59) for word in document]
        expected = [
            math.log(plain.probability(word, ("<s>", *document[:place]))) for place, word in enumerate(document)
        ]
        np.testing.assert_allclose(model.log_probabilities(np.array(document, dtype=np.uint16)), expected, rtol=1e-5)


def test_equals_kenlm():
    # Results of KenLM 0.3.0: lmplz -o 3 --discount_fallback on documents of words 0 to 13, then query -v word on these
    # three documents. KenLM ends a document with </s>, here 14, and replaces an unknown word by <unk>, here 15.
    documents = [[i * (i + j) * j % (7 + i % 9) for j in range(1, i % 11 + 2)] + [14] for i in range(1, 120)]
    expected = {
        (0, 2, 6, 9, 14): [-0.6454116, -1.4290395, -0.9090352, -1.7519338, -0.86088276],
        (5, 15, 15, 3, 0, 14): [-1.9461273, -2.8025448, -2.0419433, -1.0967724, -1.1589463, -0.2853018],
        (1, 14): [-1.9461273, -1.3548913],
    }
    model = fit(documents, vocab_size=16, order=3)
    for document, log10_probabilities in expected.items():
        ours = model.log_probabilities(np.array(document)) / math.log(10)
        np.testing.assert_allclose(ours, log10_probabilities, rtol=1e-6)


def test_documents_shorter_than_the_order():
    short, fitting = fit([[0, 1], [2], []], vocab_size=3, order=5), fit([[0, 1], [2], []], vocab_size=3, order=3)
    document = np.array([0, 1, 0, 1, 2, 2, 1])
    np.testing.assert_array_equal(short.log_probabilities(document), fitting.log_probabilities(document))


def test_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match="must be from 0 to 3"):
        fit([[0, 4]], vocab_size=4, order=2)
    model = fit([[0, 1]], vocab_size=4, order=2)
    with pytest.raises(ValueError, match="must be from 0 to 3"):
        model.log_probabilities(np.array([4]))
    with pytest.raises(ValueError, match="must be from 0 to 3"):
        model.log_probabilities(np.array([0, -1]))
    with pytest.raises(ValueError, match="order=0"):
        fit([[0, 1]], vocab_size=4, order=0)
