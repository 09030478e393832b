"""Failure detectors. They mark words that are unusual in real text of the same length.

| kind | marked words | method |
|---|---|---|
| `loop` | words that repeat the words just before, or a long phrase that occurs again | the text alone |
| `bracket` | a bracket that is closed but not opened, or a bracket or quote that stays open | the text alone |
| `grammar` | words in an order that is rare in real text, regardless of their meaning | n-grams of the skeleton |
| `nonsense` | words that are rare together in real text | n-grams of the words |
| `drift` | a second half with another topic than the text before | latent semantic analysis, recurring words |
| `sentiment` | praise and blame in one text | VADER |

The last four give each window of words a score. A window is marked if its score is above a threshold. In 19 of 20 real
texts, no window is above it (`FALSE_ALARMS`). The threshold comes from held-out text that the n-grams have not seen. By
definition of the threshold, the detectors mark about one real text in 20. The signal is the ratio of the rate in
generated text to the rate in real text.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from minigpt_pl.measures.ngrams import NGramModel
from minigpt_pl.measures.repetition import equal_stretches, recurring
from minigpt_pl.tokenizer import UNKNOWN, UNKNOWN_ID

KINDS = ("loop", "bracket", "grammar", "nonsense", "drift", "sentiment")
FALSE_ALARMS = 0.05  # share of real texts that each calibrated detector marks
MIN_TURNS = 3  # a phrase that occurs this many times in a row is a loop
PHRASE = 8  # words; a phrase of this length that occurs again anywhere is a loop
MAX_OPEN = 40  # words that may follow an open bracket or quote
SKELETON = 150  # the commonest words, which carry the grammar; all other words become one class
WINDOW, LONG_WINDOW = 6, 20  # words: for n-grams, and for topic and sentiment
RECURRING_WEIGHT = 2.0  # in `drift`; chosen with real reviews whose second half was replaced
NUM_TOPICS = 100  # dimensions of the semantic space; 100 to 300 are usual (Deerwester et al. 1990)
TOPIC_DOCUMENTS = 10_000  # at most this many documents build the semantic space

Text = tuple[Sequence[int], Sequence[int]]  # context ids, ids
Window = tuple[int, int, float]  # start, end (exclusive), score


class Span(NamedTuple):
    """Marked words from `start` to `end` (exclusive). The note tells the reader why they are marked."""

    kind: str
    start: int
    end: int
    note: str


def loops(words: Sequence[str]) -> list[Span]:
    """Phrases that occur `MIN_TURNS` times in a row, and phrases of at least `PHRASE` words that occur again.

    The marked words begin at the first repeated word. Two cases do not count: a row of fewer than `PHRASE` dots or
    other punctuation marks, and a row of `[UNK]`, which stands for different words.
    """
    spans = []
    for period in range(1, len(words)):
        for start, length in equal_stretches(words, period):
            turn, onset = set(words[start : start + period]), start + period
            if turn == {UNKNOWN} or (length < PHRASE and not any(map(str.isalnum, "".join(turn - {UNKNOWN})))):
                continue
            if length >= (MIN_TURNS - 1) * period:
                note = f"{(length + period) / period:.3g} turns of {period} {'word' if period == 1 else 'words'}"
                spans.append(Span("loop", onset, onset + length, note))
            elif length >= PHRASE:
                spans.append(Span("loop", onset, onset + length, f"{length} words repeated after {period} words"))
    return _merge_overlaps(spans)


def brackets(words: Sequence[str]) -> list[Span]:
    """Brackets that are closed but not opened, and brackets and quotes that stay open for more than `MAX_OPEN` words.

    `:)` and `1)` are not brackets. `(name` is one word. If it is unknown, `[UNK]` hides the bracket. So nothing is
    marked if an `[UNK]` could be the missing bracket.
    """
    pairs = {")": "(", "]": "[", "}": "{", '"': '"'}
    spans: list[Span] = []
    opened: list[tuple[str, int]] = []
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
        if len(words) - i > MAX_OPEN and not (unknown and unknown[-1] > i):
            spans.append(Span("bracket", i, i + 1, "never closed"))
    return sorted(spans, key=lambda span: span.start)


@dataclass(frozen=True)
class TopicModel:
    """Word vectors of latent semantic analysis (Deerwester et al. 1990), computed by scikit-learn."""

    vectors: np.ndarray  # (V, NUM_TOPICS), each word's vector times its weight
    weights: np.ndarray  # (V,), the inverse document frequency of each word; 0 for padding and [UNK]

    @classmethod
    def fit(cls, tokens: np.ndarray, offsets: np.ndarray, vocab_size: int) -> "TopicModel":
        """Fit at most `TOPIC_DOCUMENTS` documents, evenly spread over a text of (T,) ids and (N + 1,) offsets."""
        from scipy.sparse import csr_matrix
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfTransformer

        documents = np.arange(0, len(offsets) - 1, math.ceil((len(offsets) - 1) / TOPIC_DOCUMENTS))
        row_ends = np.concatenate([[0], np.cumsum(offsets[documents + 1] - offsets[documents])])
        ids = np.concatenate([tokens[offsets[i] : offsets[i + 1]] for i in documents]).astype(np.int64)
        counts = csr_matrix((np.ones(len(ids), np.float32), ids, row_ends), shape=(len(documents), vocab_size))
        counts.sum_duplicates()
        tfidf = TfidfTransformer(sublinear_tf=True)
        weighted = tfidf.fit_transform(counts)
        svd = TruncatedSVD(min(NUM_TOPICS, len(documents) - 1, vocab_size - 1), random_state=0).fit(weighted)
        weights = np.where(np.arange(vocab_size) > UNKNOWN_ID, tfidf.idf_, 0).astype(np.float32)
        return cls(svd.components_.T.astype(np.float32) * weights[:, None], weights)

    def similarity(self, first: Sequence[int], second: Sequence[int]) -> float:
        """Cosine similarity of two texts, in [-1, 1]; high for similar topics. 0 if a text has no known word."""
        a, b = self.vectors[list(first)].sum(axis=0), self.vectors[list(second)].sum(axis=0)
        norms = float(np.linalg.norm(a) * np.linalg.norm(b))
        return float(a @ b) / norms if norms else 0.0


def skeleton(ids: np.ndarray) -> np.ndarray:
    """Replace all but the `SKELETON` commonest ids by one id. This keeps the grammar and removes the content."""
    return np.where(ids < SKELETON, ids, SKELETON)


@dataclass
class FailureDetector:
    """Detects all kinds of failure. The last four are calibrated on real text.

    For each of these four kinds, `thresholds` contains the score that 19 in 20 real texts do not exceed. Real texts
    shorter than a window do not count.
    """

    words: NGramModel  # of the training text
    skeletons: NGramModel  # of its `skeleton`
    topics: TopicModel
    tokenizer: Tokenizer
    real_texts: InitVar[Sequence[Text]]  # held-out texts, as long as the texts to check

    def __post_init__(self, real_texts: Sequence[Text]) -> None:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        self.vader = SentimentIntensityAnalyzer()
        # kind -> (function that scores the windows of (context ids, ids), note with the score)
        self.scorers: dict[str, tuple[Callable[[Sequence[int], Sequence[int]], list[Window]], str]] = {
            "grammar": (partial(_surprise, self.skeletons, skeleton), "{:.1f} nats per word of the skeleton"),
            "nonsense": (partial(_surprise, self.words, np.asarray), "{:.1f} nats per word"),
            "drift": (self._drift, "{:.2f} from the text before"),
            "sentiment": (self._sentiment_change, "{:.2f} from an earlier window"),
        }
        self.thresholds: dict[str, float] = {}
        for kind, (score, _) in self.scorers.items():
            highest = [max(value for *_, value in windows) for text in real_texts if (windows := score(*text))]
            self.thresholds[kind] = float(np.quantile(highest, 1 - FALSE_ALARMS)) if highest else float("inf")

    def detect(self, context: Sequence[int], ids: Sequence[int]) -> tuple[list[Span], dict[str, float]]:
        """The marked spans of a text that continues a context, and the highest window score of each calibrated kind.

        The spans are in text order. Positions count from the start of `ids`. The score of a short text is nan.
        """
        words, skip = [str(self.tokenizer.id_to_token(id_)) for id_ in (*context, *ids)], len(context)
        spans = loops(words[skip:])
        spans += [Span(kind, a - skip, b - skip, note) for kind, a, b, note in brackets(words) if a >= skip]
        highest = {}
        for kind, (score, note) in self.scorers.items():
            windows = score(context, ids)
            highest[kind] = max((value for *_, value in windows), default=float("nan"))
            marked = [Span(kind, a, b, note.format(value)) for a, b, value in windows if value > self.thresholds[kind]]
            spans += _merge_overlaps(marked)
        return sorted(spans, key=lambda span: (span.start, span.end)), highest

    def _drift(self, context: Sequence[int], ids: Sequence[int]) -> list[Window]:
        half = len(ids) // 2
        if half < LONG_WINDOW:
            return []
        distance = 1 - self.topics.similarity([*context, *ids[:half]], ids[half:])
        cohesion = float(np.nan_to_num(recurring(context, ids, self.topics.weights)))
        return [(half, len(ids), distance - RECURRING_WEIGHT * cohesion)]

    def _sentiment_change(self, context: Sequence[int], ids: Sequence[int]) -> list[Window]:
        """Score each window by its largest difference from an earlier one in VADER's score (Hutto and Gilbert 2014)."""
        windows: list[Window] = []
        compounds: list[float] = []
        for start in range(0, len(ids) - LONG_WINDOW + 1, LONG_WINDOW):
            text = self.tokenizer.decode(ids[start : start + LONG_WINDOW])
            compound = self.vader.polarity_scores(text)["compound"]
            change = max((abs(compound - before) for before in compounds), default=0.0)
            windows.append((start, start + LONG_WINDOW, change))
            compounds.append(compound)
        return windows


def _surprise(
    model: NGramModel, transform: Callable[[np.ndarray], np.ndarray], context: Sequence[int], ids: Sequence[int]
) -> list[Window]:
    """Score each window of the text by its mean -log p, in nats per word."""
    nats = -model.log_probabilities(transform(np.array([*context, *ids])))[len(context) :]
    means = np.convolve(nats, np.full(WINDOW, 1 / WINDOW), "valid").tolist() if len(nats) >= WINDOW else []
    return [(start, start + WINDOW, mean) for start, mean in enumerate(means)]


def _merge_overlaps(spans: list[Span]) -> list[Span]:
    """Merge overlapping spans, and keep the note of the longest one."""
    merged: list[Span] = []
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        if merged and span.start < merged[-1].end:
            last = merged.pop()
            note = span.note if span.end - span.start > last.end - last.start else last.note
            span = Span(last.kind, last.start, max(last.end, span.end), note)
        merged.append(span)
    return merged
