"""Samples to figures: means with bootstrap intervals by setting, what a control changes, the rule that picks the best.

Everything here is computed from the records of `samples.jsonl` and of the held-out texts, and from nothing else.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from minigpt_pl.exploration.samples import Sample, Setting, is_greedy
from minigpt_pl.measures.failures import KINDS

RESAMPLES = 1_000
CONFIDENCE = 0.95

MEASURES = {
    "loss": "own loss: -log p of the written words under the model itself, nats",
    "ngram_loss": "n-gram loss: -log p of the written words under a 4-gram model of the training text, nats",
    "seen_4grams": "share of runs of 4 words that stand in the training text",
    "entropy": "entropy of the model's own distribution along the text, bits",
    "unknown": "probability that the model gives [UNK], which is never written",
    "repeated_4grams": "share of runs of 4 words that came before in the text",
    "loop": "longest loop, words",
    "distinct_1": "different words / words",
    "distinct_2": "different pairs / pairs",
    "distinct_3": "different triples / triples",
    "self_bleu": "BLEU of a text with the other seeds' texts of its prompt as references",
    "recurring": "share of the second half's words, rare ones weighing more, that stood before: people and things",
    "copied": "longest run of words that stands in the training text",
    "tokens": "length, words",
    "grammar": "worst window of 6: n-gram loss of the skeleton of common words",
    "nonsense": "worst window of 6: n-gram loss of the words",
    "drift": "1 - cosine of the second half to what stands before, by latent semantic analysis, - 2 recurring",
    "sentiment": "largest change of VADER's compound between windows of 20",
}
RULE = (
    "Best are the settings whose share of texts with a failure (any kind) is as low as the lowest: their 95 % intervals"
    " reach down to its mean. Of these the most coherent (lowest n-gram loss) is first."
)


class Estimate(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


def bootstrap(values: np.ndarray, seed: int = 0) -> Estimate:
    """The mean over prompts of the means over seeds, and its percentile interval: prompts are drawn with replacement,
    and within each its texts (Davison and Hinkley, Bootstrap Methods, 1997, section 3.8).

    Args:
        values: (P, S), prompts by texts; nan: there is none.

    Returns:
        All nan where there is no value.
    """
    values = values[~np.isnan(values).all(axis=1)]
    if not values.size:
        return Estimate(float("nan"), float("nan"), float("nan"))
    rng, (prompts, texts) = np.random.default_rng(seed), values.shape
    rows = rng.integers(prompts, size=(RESAMPLES, prompts))
    columns = rng.integers(texts, size=(RESAMPLES, prompts, texts))
    means = _mean(values[rows[:, :, None], columns])
    tail = (1 - CONFIDENCE) / 2
    return Estimate(float(_mean(values)), *map(float, np.nanquantile(means, [tail, 1 - tail])))


def _mean(values: np.ndarray) -> np.ndarray:
    """(..., P, S) -> (...): of the prompts' means; a prompt of which only nan was drawn is left out."""
    counts = (~np.isnan(values)).sum(axis=-1)
    sums = np.nansum(values, axis=-1)
    means = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
    there = ~np.isnan(means)
    return np.nansum(means, axis=-1) / np.maximum(there.sum(axis=-1), 1)


def value_of(name: str) -> Callable[[dict], float]:
    """What a record has of a measure; of "failure: KIND" or "failure: any" 1 where one is marked, else 0."""
    if name.startswith("failure: "):
        kind = name.removeprefix("failure: ")
        return lambda record: float(any(kind in ("any", span["kind"]) for span in record["failures"]))
    return lambda record: float("nan") if (value := record["metrics"].get(name)) is None else float(value)


FAILURES = [*(f"failure: {kind}" for kind in KINDS), "failure: any"]


def by_prompt(samples: Iterable[Sample], name: str) -> np.ndarray:
    """(P, S): a measure of the samples, prompts in order of appearance, filled up with nan."""
    groups: dict[str, list[float]] = {}
    value = value_of(name)
    for sample in samples:
        groups.setdefault(sample["prompt"], []).append(value(sample))
    table = np.full((len(groups), max(map(len, groups.values()))), np.nan)
    for row, values in zip(table, groups.values(), strict=True):
        row[: len(values)] = values
    return table


def summarize(samples: Sequence[Sample], grid: Sequence[Setting]) -> list[dict[str, Estimate]]:
    """For each setting of the grid the estimate of each measure and failure; {} for one without samples."""
    chosen = [[sample for sample in samples if sample["settings"] == setting] for setting in grid]
    return [
        {name: bootstrap(by_prompt(group, name)) for name in [*MEASURES, *FAILURES]} if group else {}
        for group in chosen
    ]


def summarize_real(records: Sequence[dict]) -> dict[str, Estimate]:
    """The same of the real texts, each its own prompt."""
    return {
        name: bootstrap(np.array([[value_of(name)(record)] for record in records]))
        for name in [*MEASURES, *FAILURES]
    }  # fmt: skip


def effect(samples: Sequence[Sample], control: str, name: str) -> tuple[float | None, float | None, Estimate]:
    """What a control does to a measure: its mean at the highest value less that at the lowest, over all else.

    The difference is taken for each prompt, and prompts and texts are drawn again; greedy settings are left out.

    Returns:
        Lowest value, highest value (None counts as the highest: no limit), the difference.
    """
    open_samples = [sample for sample in samples if not is_greedy(sample["settings"])]
    values = sorted({sample["settings"][control] for sample in open_samples}, key=lambda v: (v is None, v))
    low, high = values[0], values[-1]
    tables = [
        by_prompt([sample for sample in open_samples if sample["settings"][control] == value], name)
        for value in (low, high)
    ]
    rng = np.random.default_rng(0)
    prompts = len(tables[0])
    rows = rng.integers(prompts, size=(RESAMPLES, prompts))
    drawn = [_mean(t[rows[:, :, None], rng.integers(t.shape[1], size=(*rows.shape, t.shape[1]))]) for t in tables]
    tail = (1 - CONFIDENCE) / 2
    difference = float(_mean(tables[1]) - _mean(tables[0]))
    return low, high, Estimate(difference, *map(float, np.nanquantile(drawn[1] - drawn[0], [tail, 1 - tail])))


def best_settings(summary: Sequence[dict[str, Estimate]]) -> list[int]:
    """The settings that `RULE` picks, the best first."""
    there = [i for i, estimates in enumerate(summary) if estimates]
    lowest = min(summary[i]["failure: any"].mean for i in there)
    as_low = [i for i in there if summary[i]["failure: any"].low <= lowest]
    return sorted(as_low, key=lambda i: summary[i]["ngram_loss"].mean)


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Of points to be low in both, those that no other is below or level in both; by the first."""
    order = sorted((i for i, point in enumerate(points) if not np.isnan(point).any()), key=lambda i: points[i])
    best, kept = np.inf, []
    for i in order:
        if points[i][1] < best:
            best = points[i][1]
            kept.append(i)
    return kept
