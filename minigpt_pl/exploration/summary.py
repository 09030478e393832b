"""Means of the metrics with bootstrap intervals, the effect of a control, and the rule that ranks the settings.

The input is only the records of `samples.jsonl` and `held_out.jsonl`.
"""

import math
import warnings
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np

from minigpt_pl.exploration.metrics import FAILURES, METRICS
from minigpt_pl.exploration.samples import Sample, Setting, is_greedy

RESAMPLES = 1_000
CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


Summary = dict[str, Estimate]  # metric or failure -> estimate


def estimate_text(
    estimate: Estimate | None, sign: bool = False, digits: int | None = None, percent: bool = False
) -> str:
    """An estimate with its interval. If `digits` is None, the number of decimals depends on the size."""
    if estimate is None or math.isnan(estimate.mean):
        return "–"
    if percent and estimate.low == estimate.high:  # no text, or all texts: a bootstrap cannot give an interval
        return f"{estimate.mean:.1%}"
    if percent:
        return f"{estimate.mean:.1%} [{estimate.low:.0%}, {estimate.high:.0%}]"
    if digits is None:
        size = max(map(abs, estimate))
        digits = 4 if size < 0.01 else 3 if size < 1 else 2 if size < 10 else 1
    return "{} [{}, {}]".format(*(f"{number:{'+' if sign else ''}.{digits}f}" for number in estimate))


def interval(mean: float, resampled: np.ndarray) -> Estimate:
    """A mean with the percentile interval of resampled means. If the mean is nan, the interval is nan too."""
    tail = (1 - CONFIDENCE) / 2
    low, high = (math.nan, math.nan) if math.isnan(mean) else np.nanquantile(resampled, [tail, 1 - tail])
    return Estimate(float(mean), float(low), float(high))


def bootstrap(values: np.ndarray) -> Estimate:
    """Average the texts of each prompt, then the prompts, and estimate the interval. Without values, all is nan.

    First the prompts are resampled with replacement, then the texts of each prompt (Davison and Hinkley, Bootstrap
    Methods, 1997, section 3.8). `values` is (P, S), prompts x texts. A nan in it means that a value is missing.
    """
    values = values[~np.isnan(values).all(axis=1)]
    if not values.size:
        return Estimate(*[math.nan] * 3)
    rng, (num_prompts, num_texts) = np.random.default_rng(0), values.shape
    prompts = rng.integers(num_prompts, size=(RESAMPLES, num_prompts))
    texts = rng.integers(num_texts, size=(RESAMPLES, num_prompts, num_texts))
    return interval(_mean(values), _mean(values[prompts[:, :, None], texts]))


def _mean(values: np.ndarray) -> Any:
    """Mean of the means of the prompts: (..., P, S) -> (...). A prompt with only nan is left out."""
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # nanmean warns where it returns nan
        return np.nanmean(np.nanmean(values, axis=-1), axis=-1)


def by_prompt(samples: Iterable[Sample], name: str) -> np.ndarray:
    """A metric or failure as a table (P, S). Prompts are in order of appearance. Short rows end with nan."""
    groups: dict[str, list[float]] = {}
    for sample in samples:
        groups.setdefault(sample["prompt"], []).append(_value(sample, name))
    return np.array(list(zip_longest(*groups.values(), fillvalue=math.nan))).T


def _value(record: dict[str, Any], name: str) -> float:
    """A metric of a text. For "failure: KIND" or "failure: any": 1 if one is marked, else 0."""
    if name.startswith("failure: "):
        return float(any(name in ("failure: any", f"failure: {span['kind']}") for span in record["failures"]))
    value = record["metrics"].get(name)
    return math.nan if value is None else float(value)


def summarize(samples: Sequence[Sample], grid: Sequence[Setting]) -> list[Summary]:
    """The estimates of all metrics and failures for each setting of the grid."""
    groups = [[sample for sample in samples if sample["settings"] == setting] for setting in grid]
    return [{name: bootstrap(by_prompt(group, name)) for name in [*METRICS, *FAILURES]} for group in groups]


def summarize_real(records: Sequence[dict[str, Any]]) -> Summary:
    """The estimates for real texts. Each text counts as its own prompt. Without texts, all are nan."""
    values = {name: [_value(record, name) for record in records] for name in [*METRICS, *FAILURES]}
    return {name: bootstrap(np.array(column).reshape(-1, 1)) for name, column in values.items()}


def effect(samples: Sequence[Sample], control: str, name: str) -> tuple[float | None, float | None, Estimate]:
    """The lowest and highest value of a control, and how much the metric differs between them (highest - lowest).

    Two texts with the same prompt, seed and other controls make a pair. The differences of the pairs are averaged for
    each prompt and seed, and then bootstrapped: the other controls are fixed, so they are not resampled. Greedy
    settings are left out.
    """
    sampled = [sample for sample in samples if not is_greedy(sample["settings"])]
    low, *_, high = sorted({sample["settings"][control] for sample in sampled}, key=none_last)
    pairs: dict[Any, dict[Any, float]] = {}  # prompt, seed and other controls -> value of the control -> metric
    for sample in sampled:
        others = tuple(str(value) for key, value in sample["settings"].items() if key != control)
        pair = pairs.setdefault((sample["prompt"], sample["seed"], others), {})
        pair[sample["settings"][control]] = _value(sample, name)
    differences: dict[str, dict[int, list[float]]] = {}  # prompt -> seed -> differences
    for (prompt, seed, _), pair in pairs.items():
        if low in pair and high in pair:
            differences.setdefault(prompt, {}).setdefault(seed, []).append(pair[high] - pair[low])
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # nanmean warns where it returns nan
        rows = [[np.nanmean(of_seed) for of_seed in of_prompt.values()] for of_prompt in differences.values()]
    return low, high, bootstrap(np.array(list(zip_longest(*rows, fillvalue=math.nan)), ndmin=2).T)


def none_last(value: float | None) -> tuple[bool, float]:
    """Sort key for the values of a control. None means no limit and comes last."""
    return value is None, value or 0


def ranked_settings(summaries: Sequence[Summary], real_text: Summary) -> list[int]:
    """Indices of the settings, best first. report.jinja states the rule."""

    def rank(i: int) -> tuple[float, float]:
        failing, loss = (summaries[i][name].mean for name in ("failure: any", "ngram_loss"))
        # Means of the same shares can differ in the last bit, so they are rounded.
        return round(failing, 6), float(np.nan_to_num(abs(loss - real_text["ngram_loss"].mean)))

    return sorted(range(len(summaries)), key=rank)
