"""Every measure of every sample, and of real held-out texts of the same length."""

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minigpt_pl.data.corpus import Corpus, Ids
from minigpt_pl.exploration.samples import Sample, write_samples
from minigpt_pl.measures import repetition
from minigpt_pl.measures.copying import longest_copies
from minigpt_pl.measures.failures import KINDS, PHRASE, SKELETON, Detectors, Topics, skeleton
from minigpt_pl.measures.ngrams import NGramModel
from minigpt_pl.measures.probes import score_texts
from minigpt_pl.text_model import TextModel
from minigpt_pl.tokenizer import UNKNOWN_ID, list_vocabulary

log = logging.getLogger(__name__)

WORDS_ORDER, SKELETON_ORDER = 4, 4  # of the n-grams
CONTEXT = 5  # words of a real text that stand for its prompt
CALIBRATING, JUDGED = 500, 2_000  # real texts: to set the thresholds, and to be measured like the samples
PLANTED = 200  # real texts into which each failure is put

Text = tuple[Sequence[int], Sequence[int]]  # context ids, ids


@dataclass(frozen=True)
class Judge:
    """What stays the same for all texts.

    Attributes:
        real: held-out texts to be measured, by document number; none of them set a threshold.
        calibrating: how many did.
    """

    model: TextModel
    train: Ids
    ngrams: NGramModel
    detectors: Detectors
    real: dict[int, Text]
    calibrating: int

    @classmethod
    def prepare(cls, model: TextModel, corpus: Corpus, num_tokens: int) -> "Judge":
        """Count the n-grams of the training text, and set the detectors' thresholds on held-out text."""
        train, vocabulary = corpus.train, list_vocabulary(model.tokenizer)
        tokens, offsets = np.asarray(train.tokens), np.asarray(train.offsets)
        log.info("Counting the n-grams of %s words.", f"{len(tokens):,}")
        with ThreadPoolExecutor(2) as pool:
            words = pool.submit(NGramModel.fit, tokens, offsets, len(vocabulary), WORDS_ORDER)
            skeletons = pool.submit(NGramModel.fit, skeleton(tokens), offsets, SKELETON + 1, SKELETON_ORDER)
            topics = Topics.fit(tokens, offsets, len(vocabulary))
        texts = _real_texts(corpus.validation, num_tokens)
        order = np.random.default_rng(0).permutation(sorted(texts)).tolist()
        calibrating = min(CALIBRATING, len(order) // 2)
        detectors = Detectors(
            words.result(), skeletons.result(), topics, model.tokenizer.decode, vocabulary,
            [texts[i] for i in order[:calibrating]],
        )  # fmt: skip
        judged = sorted(order[calibrating : calibrating + JUDGED])
        return cls(model, train, words.result(), detectors, {i: texts[i] for i in judged}, calibrating)

    def samples(self, samples: Sequence[Sample]) -> None:
        """Add `metrics`, `failures` and `copied` to each sample."""
        for sample, judged in zip(
            samples, self._judge([(sample["prompt_ids"], sample["ids"]) for sample in samples]), strict=True
        ):
            sample |= judged
        groups = defaultdict(list)
        for sample in samples:
            groups[sample["prompt"], *sample["settings"].values()].append(sample)
        for group in groups.values():
            for sample, bleu in zip(group, repetition.self_bleu([s["words"] for s in group]), strict=True):
                sample["metrics"]["self_bleu"] = bleu

    def real_texts(self, path: Path) -> list[dict[str, Any]]:
        """The same of the real texts, by document number and without their words; also written to a file."""
        judged = self._judge(list(self.real.values()))
        records = [{"document": i} | record for i, record in zip(self.real, judged, strict=True)]
        write_samples(path, records)
        return records

    def planted(self) -> dict[str, dict[str, float]]:
        """What the detectors find when it is there: real texts into which a failure was put, at most `PLANTED` each.

        Returns:
            What was planted -> kind of failure -> share of texts with it. "nothing" is the real texts as they are.
        """
        rng = np.random.default_rng(0)
        texts = [text for text in self.real.values() if len(text[1]) >= 4 * PHRASE][:PLANTED]
        others = [texts[i][1] for i in rng.permutation(len(texts))]

        def change(plant: Callable[[list[int], list[int]], list[int]]) -> list[Text]:
            return [(text[0], plant(list(text[1]), list(other))) for text, other in zip(texts, others, strict=True)]

        middle, pool = slice(2 * PHRASE, 4 * PHRASE), [id_ for _, ids in texts for id_ in ids]
        plants = {
            "nothing": change(lambda ids, other: ids),
            f"{PHRASE} words said three times": change(lambda ids, other: [*ids[:PHRASE], *ids[:PHRASE] * 2, *ids]),
            f"{2 * PHRASE} words in another order": change(
                lambda ids, other: [*ids[: middle.start], *rng.permutation(ids[middle]).tolist(), *ids[middle.stop :]]
            ),
            f"{2 * PHRASE} words drawn at random from other texts": change(
                lambda ids, other: [*ids[: middle.start], *rng.choice(pool, 2 * PHRASE).tolist(), *ids[middle.stop :]]
            ),
            "the second half of another text": change(
                lambda ids, other: [*ids[: len(ids) // 2], *other[len(other) // 2 :]]
            ),
        }  # fmt: skip
        shares = {}
        for name, changed in plants.items():
            found = [{span.kind for span in self.detectors.find(*text)[0]} for text in changed]
            shares[name] = {kind: float(np.mean([kind in kinds for kinds in found])) for kind in KINDS} if found else {}
        return shares

    def _judge(self, texts: Sequence[Text]) -> list[dict[str, Any]]:
        copies = longest_copies([ids for _, ids in texts], self.train.tokens, self.train.offsets, [UNKNOWN_ID])
        scores = score_texts(self.model.network, texts)
        return [self._record(*judged) for judged in zip(texts, scores, copies, strict=True)]

    def _record(self, text: Text, score: Any, copy: Any) -> dict[str, Any]:
        context, ids = text
        spans, worst = self.detectors.find(context, ids)
        nats = -self.ngrams.log_probabilities(np.array([*context, *ids]))[len(context) :]
        loop = repetition.longest_loop(ids)
        metrics = {
            "tokens": len(ids),
            "loss": score.loss,
            "ngram_loss": float(nats.mean()) if len(ids) else float("nan"),
            "seen_4grams": copy.seen,
            "entropy": score.entropy,
            "unknown": score.unknown,
            "repeated_4grams": repetition.repeated(ids, 4),
            "loop": loop.length,
            **{f"distinct_{n}": repetition.distinct(ids, n) for n in (1, 2, 3)},
            "recurring": repetition.recurring(context, ids, self.detectors.topics.weights),
            "copied": copy.length,
            **worst,
        }
        failures = [span._asdict() for span in spans]
        copied = {"start": copy.start, "length": copy.length, "document": copy.document}
        return {"metrics": metrics, "failures": failures, "copied": copied}


def _real_texts(held_out: Ids, num_tokens: int) -> dict[int, Text]:
    """Document number -> its first words as (context, text); documents of one word beyond the context at least."""
    texts = {}
    for i, (start, end) in enumerate(zip(held_out.offsets, held_out.offsets[1:], strict=False)):
        words = held_out.tokens[start : min(end - 1, start + CONTEXT + num_tokens)].tolist()  # without its end token
        if len(words) > CONTEXT:
            texts[i] = (words[:CONTEXT], words[CONTEXT:])
    return texts
