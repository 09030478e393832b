"""All metrics and failures of each sample, and of real held-out texts of the same length."""

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm  # comes with lightning

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


class Measure(NamedTuple):
    """What the reports print about a metric."""

    label: str
    meaning: str
    direction: str  # what a low or a high value means
    source: str = ""  # link to a definition
    table: str = ""  # title of its table in the report of one run


USUAL, REPETITION, TOPIC = "Usual or unusual words", "Repetition and variety", "Topic and mood"
ACL, ARXIV, WIKIPEDIA = "https://aclanthology.org", "https://arxiv.org/abs", "https://en.wikipedia.org/wiki"

METRICS = {
    "ngram_loss": Measure(
        "n-gram loss",
        "-log p of each new word under counts of up to 4 words in the training text, nats",
        "lower: more usual",
        f"{ACL}/P96-1041/",
        USUAL,
    ),
    "loss": Measure(
        "own loss",
        "-log p of each new word under the network itself, nats",
        "lower: less surprising to the network",
        f"{WIKIPEDIA}/Cross-entropy",
        USUAL,
    ),
    "entropy": Measure(
        "uncertainty",
        "entropy of the network's probabilities before each word, bits",
        "lower: the network is surer",
        f"{WIKIPEDIA}/Entropy_(information_theory)",
        USUAL,
    ),
    "seen_4grams": Measure(
        "known phrases",
        "share of 4-word sequences that occur in the training text",
        "lower: odder; higher: more copied",
        f"{ARXIV}/2111.09509",
        USUAL,
    ),
    "copied": Measure(
        "longest copy",
        "words in the longest sequence that also occurs in the training text",
        "higher: more copied",
        f"{ARXIV}/2111.09509",
        USUAL,
    ),
    "unknown": Measure(
        "missing words",
        "probability that the network gives to [UNK], which is never written",
        "higher: the network lacks more words",
        "",
        USUAL,
    ),
    "repeated_4grams": Measure(
        "repeated phrases",
        "share of 4-word sequences that already occurred in the text",
        "lower: less repetition",
        f"{ARXIV}/1908.04319",
        REPETITION,
    ),
    "loop": Measure(
        "repeated in a row",
        "words in the longest part that repeats one phrase at least twice in a row; punctuation does not count",
        "lower: less repetition",
        "https://doi.org/10.1016/0166-218X(89)90051-6",
        REPETITION,
    ),
    "distinct_2": Measure(
        "different pairs",
        "number of different pairs of neighbouring words, divided by the number of all pairs",
        "higher: more varied",
        f"{ARXIV}/1510.03055",
        REPETITION,
    ),
    "self_bleu": Measure(
        "self-BLEU",
        "similarity to the texts of the other random seeds, 0 to 100",
        "lower: more varied",
        f"{ARXIV}/1802.01886",
        REPETITION,
    ),
    "tokens": Measure("length", "words and marks in the text", "lower: the network ended it earlier", "", REPETITION),
    "recurring": Measure(
        "returning words",
        "share of the second half's words that occurred before; rare words count more",
        "higher: stays with its people and things, or repeats itself",
        f"{ACL}/J08-1001/",
        TOPIC,
    ),
    "drift": Measure(
        "change of topic",
        "how far the second half is from the topic of the text before; returning words lower it",
        "lower, also below 0: stays with its topic",
        f"{WIKIPEDIA}/Latent_semantic_analysis",
        TOPIC,
    ),
    "sentiment": Measure(
        "change of mood",
        "largest change of VADER's score (-1 to 1) between windows of 20 words",
        "lower: praises or blames throughout",
        "https://ojs.aaai.org/index.php/ICWSM/article/view/14550",
        TOPIC,
    ),
    "distinct_1": Measure("different words", "share of words that are different", "higher: more varied"),
    "distinct_3": Measure("different triples", "share of triples of words that are different", "higher: more varied"),
    "grammar": Measure(
        "oddest word order", "highest n-gram loss of common words in 6 words, nats", "lower: more usual"
    ),
    "nonsense": Measure("oddest words", "highest n-gram loss of 6 words, nats", "lower: more usual"),
}
FAILURES = [*(f"failure: {kind}" for kind in KINDS), "failure: any"]
PAIRS = "pair_loss"  # key in the records of real texts: the loss of a 2-gram model, which counts pairs of words
NGRAM_ORDER = 4
REAL_CONTEXT = 5  # words; the beginning of a real text serves as its prompt
NUM_CALIBRATION = 500  # real texts that set the thresholds
NUM_PLANTED = 200  # real texts into which each failure is planted


@dataclass(frozen=True)
class TextMetrics:
    """Measures generated and real texts in the same way."""

    model: TextModel
    train: Ids
    ngrams: NGramModel
    pairs: NGramModel  # of order 2
    detector: FailureDetector
    real_texts: dict[int, Text]  # held-out texts by document number, without the calibration texts
    num_calibration: int  # held-out texts that set the thresholds of the detector

    @classmethod
    def fit(cls, model: TextModel, train: Ids, held_out: Ids, num_tokens: int, num_real: int) -> "TextMetrics":
        """Count the n-grams of the training text, and calibrate the detector on held-out text, cut to `num_tokens`.

        Args:
            num_real: at most this many other held-out texts are kept, to compare with.
        """
        vocab_size, tokens, offsets = model.network.vocab_size, train.tokens, train.offsets
        log.info("Counting the n-grams of %s words.", f"{len(tokens):,}")
        with ThreadPoolExecutor(2) as pool:
            words = pool.submit(NGramModel.fit, tokens, offsets, vocab_size, NGRAM_ORDER, show_progress=True)
            skeletons = pool.submit(NGramModel.fit, skeleton(tokens), offsets, SKELETON + 1, NGRAM_ORDER)
            pairs = pool.submit(NGramModel.fit, tokens, offsets, vocab_size, 2)
            topics = TopicModel.fit(tokens, offsets, vocab_size)
        texts: dict[int, Text] = {}
        for i, (start, end) in enumerate(pairwise(held_out.offsets)):  # the last token is the end token, not a word
            ids = held_out.tokens[start : min(end - 1, start + REAL_CONTEXT + num_tokens)].tolist()
            if len(ids) > REAL_CONTEXT:
                texts[i] = (ids[:REAL_CONTEXT], ids[REAL_CONTEXT:])
        order = np.random.default_rng(0).permutation(sorted(texts)).tolist()
        num_calibration = min(NUM_CALIBRATION, len(order) // 2)
        calibration, chosen = order[:num_calibration], sorted(order[num_calibration : num_calibration + num_real])
        ngrams, calibration_texts = words.result(), [texts[i] for i in calibration]
        detector = FailureDetector(ngrams, skeletons.result(), topics, model.tokenizer, calibration_texts)
        return cls(model, train, ngrams, pairs.result(), detector, {i: texts[i] for i in chosen}, num_calibration)

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
        texts = list(self.real_texts.values())
        records = [{"document": i} | record for i, record in zip(self.real_texts, self._measure(texts), strict=True)]
        for record, text in zip(records, texts, strict=True):
            record["metrics"][PAIRS] = ngram_loss(self.pairs, text)
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
        for name, plant in tqdm(plants.items(), desc="Testing the detectors", disable=None, leave=False):
            changed = [(text[0], plant(list(text[1]), other)) for text, other in zip(texts, others, strict=True)]
            found = [{span.kind for span in self.detector.detect(*text)[0]} for text in changed]
            rates[name] = {kind: float(np.mean([kind in kinds for kinds in found])) for kind in KINDS} if found else {}
        return rates

    def _measure(self, texts: Sequence[Text]) -> list[dict[str, Any]]:
        copies = longest_copies([ids for _, ids in texts], self.train.tokens, self.train.offsets, [UNKNOWN_ID])
        all_scores, to_word = (
            score_texts(self.model.network, texts, show_progress=True),
            self.model.tokenizer.id_to_token,
        )
        progress = tqdm(texts, desc="Measuring", unit=" texts", disable=None, leave=False)
        records = []
        for (context, ids), scores, copy in zip(progress, all_scores, copies, strict=True):
            spans, highest = self.detector.detect(context, ids)
            metrics = {
                "tokens": len(ids),
                "loss": scores.loss,
                "ngram_loss": ngram_loss(self.ngrams, (context, ids)),
                "seen_4grams": copy.seen_4grams,
                "entropy": scores.entropy,
                "unknown": scores.unknown,
                "repeated_4grams": repeated(ids, 4),
                "loop": longest_loop([to_word(id_) for id_ in ids]).length,
                **{f"distinct_{n}": distinct(ids, n) for n in (1, 2, 3)},
                "recurring": recurring(context, ids, self.detector.topics.weights),
                "copied": copy.length,
                **highest,
            }
            copied = {"start": copy.start, "length": copy.length, "document": copy.document}
            records.append({"metrics": metrics, "failures": [span._asdict() for span in spans], "copied": copied})
        return records


def ngram_loss(model: NGramModel, text: Text) -> float:
    """Mean -log p of the words under an n-gram model, nats per word; nan for an empty text."""
    context, ids = text
    nats = -model.log_probabilities(np.array([*context, *ids]))[len(context) :]
    return float(nats.mean()) if ids else float("nan")
