"""All metrics and failures of each sample, and of real held-out texts of the same length."""

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from minigpt_pl.data.corpus import Ids
from minigpt_pl.exploration.samples import Sample, write_samples
from minigpt_pl.measures.copying import longest_copies
from minigpt_pl.measures.failures import KINDS, PHRASE, SKELETON, FailureDetector, Text, TopicModel, skeleton
from minigpt_pl.measures.ngrams import NGramModel
from minigpt_pl.measures.probes import score_texts
from minigpt_pl.measures.repetition import distinct, longest_loop, recurring, repeated, self_bleu
from minigpt_pl.text_model import TextModel
from minigpt_pl.tokenizer import UNKNOWN_ID

log = logging.getLogger(__name__)

METRICS = {
    "ngram_loss": "n-gram loss: -log p of the new words under a 4-gram model of the training text, nats",
    "loss": "own loss: -log p of the new words under the model itself, nats",
    "seen_4grams": "share of 4-word sequences that occur in the training text",
    "entropy": "mean entropy of the probabilities that the model gives to all words, bits",
    "repeated_4grams": "share of 4-word sequences that already occurred in the text",
    "loop": "longest loop, words",
    "distinct_2": "different pairs of words / pairs",
    "self_bleu": "BLEU of a text with the texts of the other random seeds as references",
    "unknown": "probability that the model gives [UNK], which is never generated",
    "tokens": "length, words",
    "copied": "longest sequence of words that occurs in the training text",
    "recurring": "share of the second half's words that occurred before, weighted by rarity",
    "drift": "1 - cosine similarity of the second half with the text before (latent semantic analysis) - 2 recurring",
    "sentiment": "largest change of VADER's compound score between windows of 20 words",
    "distinct_1": "different words / words",
    "distinct_3": "different triples of words / triples",
    "grammar": "highest n-gram loss of the skeleton of common words in a window of 6 words",
    "nonsense": "highest n-gram loss of the words in a window of 6 words",
}
FAILURES = [*(f"failure: {kind}" for kind in KINDS), "failure: any"]
NGRAM_ORDER = 4
REAL_CONTEXT = 5  # words; the beginning of a real text serves as its prompt
NUM_CALIBRATION, NUM_REAL = 500, 2_000  # real texts that set the thresholds, and other real texts
NUM_PLANTED = 200  # real texts into which each failure is planted


@dataclass(frozen=True)
class TextMetrics:
    """Measures generated and real texts in the same way."""

    model: TextModel
    train: Ids
    ngrams: NGramModel
    detector: FailureDetector
    real_texts: dict[int, Text]  # held-out texts by document number, without the calibration texts
    num_calibration: int  # held-out texts that set the thresholds of the detector

    @classmethod
    def fit(cls, model: TextModel, train: Ids, held_out: Ids, num_tokens: int) -> "TextMetrics":
        """Count the n-grams of the training text, and calibrate the detector on held-out text, cut to `num_tokens`."""
        vocab_size, tokens, offsets = model.network.vocab_size, train.tokens, train.offsets
        log.info("Counting the n-grams of %s words.", f"{len(tokens):,}")
        with ThreadPoolExecutor(2) as pool:
            words = pool.submit(NGramModel.fit, tokens, offsets, vocab_size, NGRAM_ORDER, show_progress=True)
            skeletons = pool.submit(NGramModel.fit, skeleton(tokens), offsets, SKELETON + 1, NGRAM_ORDER)
            topics = TopicModel.fit(tokens, offsets, vocab_size)
        texts: dict[int, Text] = {}
        for i, (start, end) in enumerate(pairwise(held_out.offsets)):  # the last token is the end token, not a word
            ids = held_out.tokens[start : min(end - 1, start + REAL_CONTEXT + num_tokens)].tolist()
            if len(ids) > REAL_CONTEXT:
                texts[i] = (ids[:REAL_CONTEXT], ids[REAL_CONTEXT:])
        order = np.random.default_rng(0).permutation(sorted(texts)).tolist()
        num_calibration = min(NUM_CALIBRATION, len(order) // 2)
        calibration, chosen = order[:num_calibration], sorted(order[num_calibration : num_calibration + NUM_REAL])
        ngrams, calibration_texts = words.result(), [texts[i] for i in calibration]
        detector = FailureDetector(ngrams, skeletons.result(), topics, model.tokenizer, calibration_texts)
        return cls(model, train, ngrams, detector, {i: texts[i] for i in chosen}, num_calibration)

    def add_to(self, samples: Sequence[Sample]) -> None:
        """Add `metrics`, `failures` and `copied` to each sample."""
        records = self._measure([(sample["prompt_ids"], sample["ids"]) for sample in samples])
        groups = defaultdict(list)
        for sample, record in zip(samples, records, strict=True):
            sample |= record
            groups[sample["prompt"], *sample["settings"].values()].append(sample)
        for group in groups.values():
            for sample, bleu in zip(group, self_bleu([s["words"] for s in group]), strict=True):
                sample["metrics"]["self_bleu"] = bleu

    def of_real_texts(self, path: Path) -> list[dict[str, Any]]:
        """Measure the real texts, and write the records to a file. They have document numbers instead of words."""
        measured = self._measure(list(self.real_texts.values()))
        records = [{"document": i} | record for i, record in zip(self.real_texts, measured, strict=True)]
        write_samples(path, records)
        return records

    def detection_rates(self) -> dict[str, dict[str, float]]:
        """Plant failures in real texts. Returns planted failure -> kind -> share of texts where this kind is found."""
        rng = np.random.default_rng(0)
        texts = [text for text in self.real_texts.values() if len(text[1]) >= 4 * PHRASE][:NUM_PLANTED]
        others = [list(texts[i][1]) for i in rng.permutation(len(texts))]
        pool = [id_ for _, ids in texts for id_ in ids]
        start, end = 2 * PHRASE, 4 * PHRASE

        def replace(ids: list[int], new: np.ndarray) -> list[int]:
            return [*ids[:start], *new.tolist(), *ids[end:]]

        plants: dict[str, Callable[[list[int], list[int]], list[int]]] = {
            "nothing": lambda ids, _: ids,
            f"{PHRASE} words repeated three times": lambda ids, _: [*ids[:PHRASE] * 3, *ids],
            f"{end - start} words in another order": lambda ids, _: replace(ids, rng.permutation(ids[start:end])),
            f"{end - start} random words of other texts": lambda ids, _: replace(ids, rng.choice(pool, end - start)),
            "the second half of another text": lambda ids, other: [*ids[: len(ids) // 2], *other[len(other) // 2 :]],
        }
        rates: dict[str, dict[str, float]] = {}
        for name, plant in plants.items():
            changed = [(text[0], plant(list(text[1]), other)) for text, other in zip(texts, others, strict=True)]
            found = [{span.kind for span in self.detector.detect(*text)[0]} for text in changed]
            rates[name] = {kind: float(np.mean([kind in kinds for kinds in found])) for kind in KINDS} if found else {}
        return rates

    def _measure(self, texts: Sequence[Text]) -> list[dict[str, Any]]:
        copies = longest_copies([ids for _, ids in texts], self.train.tokens, self.train.offsets, [UNKNOWN_ID])
        records = []
        for (context, ids), scores, copy in zip(texts, score_texts(self.model.network, texts), copies, strict=True):
            spans, highest = self.detector.detect(context, ids)
            metrics = {
                "tokens": len(ids),
                "loss": scores.loss,
                "ngram_loss": self.ngram_loss((context, ids)),
                "seen_4grams": copy.seen_4grams,
                "entropy": scores.entropy,
                "unknown": scores.unknown,
                "repeated_4grams": repeated(ids, 4),
                "loop": longest_loop(ids).length,
                **{f"distinct_{n}": distinct(ids, n) for n in (1, 2, 3)},
                "recurring": recurring(context, ids, self.detector.topics.weights),
                "copied": copy.length,
                **highest,
            }
            copied = {"start": copy.start, "length": copy.length, "document": copy.document}
            records.append({"metrics": metrics, "failures": [span._asdict() for span in spans], "copied": copied})
        return records

    def ngram_loss(self, text: Text) -> float:
        """Mean -log p of the words under the n-gram model, nats per word; nan for an empty text."""
        context, ids = text
        nats = -self.ngrams.log_probabilities(np.array([*context, *ids]))[len(context) :]
        return float(nats.mean()) if ids else float("nan")
