"""Failure modes, found and marked on the words: what is out of the ordinary for real text of the same length.

| kind | what is marked | how |
|---|---|---|
| `loop` | words that say again what stands just before, or a long phrase again | the text alone |
| `bracket` | a bracket or quote that is closed and never opened, or opened and long not closed | the text alone |
| `grammar` | words in an order that real text hardly has, whatever they mean | n-grams of the skeleton |
| `nonsense` | words that real text hardly sets together | n-grams of the words |
| `drift` | a second half about something else than what stands before | latent semantic analysis, words that return |
| `sentiment` | praise and blame in one text | VADER |

The last four score stretches of words. One is marked where it scores higher than the worst one of 19 in 20 real
texts (`FALSE_ALARMS`), measured on held-out text that the n-grams have not seen. So about one real text in 20 is marked
too, by construction; what tells is how much oftener a generated one is.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np

from minigpt_pl.measures.repetition import equal_at, recurring
from minigpt_pl.tokenizer import UNKNOWN, UNKNOWN_ID

KINDS = ("loop", "bracket", "grammar", "nonsense", "drift", "sentiment")
FALSE_ALARMS = 0.05  # share of real texts that a calibrated kind marks
TURNS = 3  # a phrase so many times in a row is a loop, ...
PHRASE = 8  # ... as are so many words that stand earlier in the text, wherever
OPEN_WORDS = 40  # a bracket may stay open for so many words
SKELETON = 150  # words that the skeleton keeps: the commonest, which carry the grammar; one class for the others
WINDOW, LONG_WINDOW = 6, 20  # words, for the n-grams and for sentiment; a text of two long ones has a topic
RETURNING = 2.0  # what a word that comes back weighs beside the topic, in `drift`: chosen on spliced real reviews
TOPICS = 100  # dimensions of the semantic space: the usual 100 to 300 (Deerwester et al. 1990)
TOPIC_DOCUMENTS = 10_000  # it is made from at most so many


class Span(NamedTuple):
    """Marked words: `start` to `end` (exclusive), with what was found there."""

    kind: str
    start: int
    end: int
    note: str


class LanguageModel(Protocol):
    def log_probabilities(self, ids: np.ndarray) -> np.ndarray: ...


def loops(words: Sequence[str]) -> list[Span]:
    """Phrases of p words that come `TURNS` times in a row or more, and `PHRASE` words or more that come a second time.

    The marked words begin at the onset, the first word that is said again. A row of fewer than `PHRASE` dots or other
    marks is no loop, nor one of `[UNK]`, which stands for many words.
    """
    spans = []
    for period in range(1, len(words)):
        for start, length in equal_at(words, period):
            turn, onset = set(words[start : start + period]), start + period
            if turn == {UNKNOWN} or (length < PHRASE and not any(map(str.isalnum, "".join(turn - {UNKNOWN})))):
                continue
            if length >= (TURNS - 1) * period:
                note = f"{(length + period) / period:.3g} turns of {period} {'word' if period == 1 else 'words'}"
                spans.append(Span("loop", onset, onset + length, note))
            elif length >= PHRASE:
                spans.append(Span("loop", onset, onset + length, f"{length} words stood {period} words before"))
    return _widest(spans)


def brackets(words: Sequence[str]) -> list[Span]:
    """Brackets closed and not opened, and brackets and double quotes opened and not closed for `OPEN_WORDS` words.

    `:)` and `1)` are no brackets. A word under `[UNK]` may have hidden the other one (`(name` is one word), so nothing
    is marked where one could have.
    """
    pairs, spans, opened = {")": "(", "]": "[", "}": "{", '"': '"'}, [], []
    unknown = [i for i, word in enumerate(words) if word == UNKNOWN]
    for i, word in enumerate(words):
        mark = word[:1]
        matching = [entry for entry in opened if entry[0] == pairs.get(mark)]
        if word == UNKNOWN or (i and re.search(r"[:;=]-?$|^-$|^\d+$|^.$", words[i - 1]) and mark in "()[]"):
            continue
        if matching:
            opened.remove(matching[-1])
        elif mark and mark in '([{"':
            opened.append((mark, i))
        elif mark in pairs and not (unknown and unknown[0] < i):
            spans.append(Span("bracket", i, i + 1, "closed, never opened"))
    for _, i in opened:
        if len(words) - i > OPEN_WORDS and not (unknown and unknown[-1] > i):
            spans.append(Span("bracket", i, i + 1, "never closed"))
    return sorted(spans, key=lambda span: span.start)


@dataclass(frozen=True)
class Topics:
    """Words as places in a semantic space: latent semantic analysis (Deerwester et al. 1990), by scikit-learn.

    Attributes:
        places: (V, `TOPICS`), each word's place times its weight.
        weights: (V,), the inverse document frequency of each word; 0 for padding and `[UNK]`.
    """

    places: np.ndarray
    weights: np.ndarray

    @classmethod
    def fit(cls, tokens: np.ndarray, offsets: np.ndarray, vocab_size: int) -> "Topics":
        """From (T,) ids and (N + 1,) offsets: at most `TOPIC_DOCUMENTS` documents, spread evenly."""
        from scipy.sparse import csr_matrix
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfTransformer

        documents = np.arange(0, len(offsets) - 1, -(-(len(offsets) - 1) // TOPIC_DOCUMENTS))
        sizes = offsets[documents + 1] - offsets[documents]
        ids = np.concatenate([tokens[offsets[i] : offsets[i + 1]] for i in documents]).astype(np.int64)
        counts = csr_matrix((np.ones(len(ids), np.float32), ids, np.concatenate([[0], np.cumsum(sizes)])),
                            shape=(len(documents), vocab_size))  # fmt: skip
        counts.sum_duplicates()
        tfidf = TfidfTransformer(sublinear_tf=True)
        weighted = tfidf.fit_transform(counts)
        svd = TruncatedSVD(min(TOPICS, len(documents) - 1, vocab_size - 1), random_state=0).fit(weighted)
        weights = np.where(np.arange(vocab_size) > UNKNOWN_ID, tfidf.idf_, 0).astype(np.float32)
        return cls(svd.components_.T.astype(np.float32) * weights[:, None], weights)

    def similarity(self, first: Sequence[int], second: Sequence[int]) -> float:
        """The cosine between two texts, in [-1, 1]; higher: more of one topic. 0 where one has no known word."""
        a, b = self.places[list(first)].sum(axis=0), self.places[list(second)].sum(axis=0)
        norms = float(np.linalg.norm(a) * np.linalg.norm(b))
        return float(a @ b) / norms if norms else 0.0


class Sentiment:
    """How much a text praises or blames: VADER's compound (Hutto and Gilbert 2014), by the package vaderSentiment."""

    @cached_property
    def _analyzer(self):
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        return SentimentIntensityAnalyzer()

    def compound(self, text: str) -> float:
        """In [-1, 1]: -1 blames, 1 praises, 0 does neither."""
        return self._analyzer.polarity_scores(text)["compound"]


def skeleton(ids: np.ndarray) -> np.ndarray:
    """The commonest words as they are, `SKELETON` for all others: what is left of a sentence without its content."""
    return np.minimum(ids, SKELETON)


class Scorer(NamedTuple):
    """Gives stretches of a text their scores.

    Attributes:
        scores: (context ids, ids) -> (S,).
        stretches: number of ids -> the S starts and ends (exclusive) among them.
        note: of a score, for people.
    """

    kind: str
    scores: Callable[[Sequence[int], Sequence[int]], np.ndarray]
    stretches: Callable[[int], list[tuple[int, int]]]
    note: str


def _windows(width: int, stride: int) -> Callable[[int], list[tuple[int, int]]]:
    return lambda length: [(start, start + width) for start in range(0, length - width + 1, stride)]


def _second_half(length: int) -> list[tuple[int, int]]:
    return [(length // 2, length)] if length >= 2 * LONG_WINDOW else []


class Detectors:
    """All kinds of failure, the last four calibrated on real text.

    Args:
        words: n-grams of the training text.
        skeletons: n-grams of its `skeleton`.
        topics: from the same text.
        decode: ids -> text, for VADER.
        vocabulary: the words by id.
        real: texts as (context ids, ids), as long as those to be judged; not of the training text.

    Attributes:
        topics: as given.
        thresholds: kind -> the score that 19 of 20 real texts stay below; of those long enough to have one.
    """

    def __init__(self, words: LanguageModel, skeletons: LanguageModel, topics: Topics,
                 decode: Callable[[Sequence[int]], str], vocabulary: Sequence[str],
                 real: Sequence[tuple[Sequence[int], Sequence[int]]]):  # fmt: skip
        self.vocabulary, self.topics, sentiment = vocabulary, topics, Sentiment()
        of_ngrams, of_sentiment = _windows(WINDOW, 1), _windows(LONG_WINDOW, LONG_WINDOW)

        def surprise(model: LanguageModel, change: Callable[[np.ndarray], np.ndarray]):
            def scores(context: Sequence[int], ids: Sequence[int]) -> np.ndarray:
                nats = -model.log_probabilities(change(np.array([*context, *ids])))[len(context) :]
                return np.convolve(nats, np.full(WINDOW, 1 / WINDOW), "valid") if len(nats) >= WINDOW else np.zeros(0)

            return scores

        def drift(context: Sequence[int], ids: Sequence[int]) -> np.ndarray:
            halves = [([*context, *ids[:start]], ids[start:end]) for start, end in _second_half(len(ids))]
            returning = recurring(context, ids, topics.weights)
            return np.array([1 - topics.similarity(*half) - RETURNING * np.nan_to_num(returning) for half in halves])

        def flip(context: Sequence[int], ids: Sequence[int]) -> np.ndarray:
            compounds = np.array([sentiment.compound(decode(ids[start:end])) for start, end in of_sentiment(len(ids))])
            return np.array([np.abs(compounds[i] - compounds[:i]).max(initial=0) for i in range(len(compounds))])

        self.scorers = [
            Scorer("grammar", surprise(skeletons, skeleton), of_ngrams, "{:.1f} nats a word of the skeleton"),
            Scorer("nonsense", surprise(words, lambda ids: ids), of_ngrams, "{:.1f} nats a word"),
            Scorer("drift", drift, _second_half, "{:.2f} from what stands before"),
            Scorer("sentiment", flip, of_sentiment, "{:.2f} from a window before"),
        ]
        self.thresholds = {}
        for scorer in self.scorers:
            worst = [scores.max() for text in real if len(scores := scorer.scores(*text))]
            self.thresholds[scorer.kind] = float(np.quantile(worst, 1 - FALSE_ALARMS)) if worst else float("inf")

    def find(self, context: Sequence[int], ids: Sequence[int]) -> tuple[list[Span], dict[str, float]]:
        """Judge a text that continues a context.

        Returns:
            What is marked, in the order of the words; places count from the text's own start. And the score of the
            worst window by kind, nan for a text shorter than one.
        """
        words, asked = [self.vocabulary[id_] for id_ in ids], [self.vocabulary[id_] for id_ in context]
        spans = loops(words)
        for span in brackets(asked + words):
            if span.start >= len(asked):
                spans.append(span._replace(start=span.start - len(asked), end=span.end - len(asked)))
        worst = {}
        for kind, scores, stretches, note in self.scorers:
            values = scores(context, ids)
            worst[kind] = float(values.max()) if len(values) else float("nan")
            spans += _widest([
                Span(kind, *stretch, note.format(value))
                for stretch, value in zip(stretches(len(ids)), values.tolist(), strict=True)
                if value > self.thresholds[kind]
            ])  # fmt: skip
        return sorted(spans, key=lambda span: (span.start, span.end)), worst


def _widest(spans: list[Span]) -> list[Span]:
    """Overlapping spans as one, with the note of the longest, else of the first."""
    merged: list[Span] = []
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        if merged and span.start < merged[-1].end:
            last = merged[-1]
            note = span.note if span.end - span.start > last.end - last.start else last.note
            merged[-1] = Span(last.kind, last.start, max(last.end, span.end), note)
        else:
            merged.append(span)
    return merged
