"""The five findings of a report: sentences with figures, chosen by thresholds. The student finds the reasons."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from minigpt_pl.exploration.metrics import PAIRS
from minigpt_pl.exploration.samples import Sample, value_text
from minigpt_pl.exploration.summary import Estimate, Summary, bootstrap, by_prompt, effect, estimate_text
from minigpt_pl.measures.failures import KINDS

# A difference counts if its 95 % interval does not contain 0.
MIN_GAIN = 0.05  # nats; with a smaller gain, words further back hardly help


class Finding(NamedTuple):
    title: str
    text: str


def five_findings(
    samples: Sequence[Sample],
    varied: Sequence[str],
    real_records: Sequence[dict[str, Any]],
    real_text: Summary,
    network_study: dict[str, Any],
) -> list[Finding]:
    """The findings in the order of the report. `varied` are the controls with several values."""
    first = "temperature" if "temperature" in varied else next(iter(varied), None)
    second = "top_k" if "top_k" in varied else [None, *varied][-1]
    return [
        Finding("Prediction", prediction([record["metrics"] for record in real_records])),
        Finding("Coherence", coherence(samples, first)),
        Finding("Repetition and variety", repetition(samples, second)),
        Finding("Failures", failures(samples, real_text)),
        Finding("Context", context(network_study["context"], network_study["further"])),
    ]


def prediction(real_metrics: Sequence[dict[str, Any]]) -> str:
    """Compare the network with a count of word pairs on the same held-out texts."""
    losses = np.array([[metrics["loss"], metrics[PAIRS]] for metrics in real_metrics]).reshape(-1, 2)
    if not len(losses):
        return "The held-out documents are too short to compare the network with word pairs."
    network, pairs, difference = (bootstrap(values[:, None]) for values in (*losses.T, losses[:, 0] - losses[:, 1]))
    figures = f"perplexity {_perplexity(network)} against {_perplexity(pairs)}, over {len(losses):,} held-out texts"
    if difference.low > 0:
        return (
            f"Your network predicts words worse than counting word pairs: {figures}."
            " So some failures below come from too little training, not from the single block. Train longer."
        )
    if difference.high < 0:
        return f"Your network predicts words better than counting word pairs: {figures}."
    return f"Your network predicts words as well as counting word pairs: {figures}. The difference is within its error."


def _perplexity(loss: Estimate) -> str:
    return estimate_text(Estimate(*map(math.exp, loss)), digits=0)


def coherence(samples: Sequence[Sample], control: str | None) -> str:
    """The effect of a control on the n-gram loss, which is lower for usual words."""
    words = "the n-gram loss, which is lower for usual words,"
    return _effect(samples, control, ("ngram_loss", words, "nats", "more unusual", "more usual"))


def repetition(samples: Sequence[Sample], control: str | None) -> str:
    """The effect of a control on the shares of repeated 4-word sequences and of different pairs of words."""
    repeated = "repeated_4grams", "the share of repeated 4-word sequences", "", "more repetitive", "less repetitive"
    different = "distinct_2", "the share of different pairs of words", "", "more varied", "less varied"
    return _effect(samples, control, repeated, different)


def _effect(samples: Sequence[Sample], control: str | None, *measures: tuple[str, str, str, str, str]) -> str:
    """One sentence. A measure has a name, its words, a unit, and what the texts become if it rises or falls."""
    if control is None:
        return "You tried only one setting. Give several values, as in temperature=[0.5,1.0], to see an effect."
    effects = []
    for name, words, unit, rises, falls in measures:
        low, high, difference = effect(samples, control, name)
        clear = difference.low > 0 or difference.high < 0
        change = f"{estimate_text(difference, sign=True)} {unit}".rstrip()
        result = f"makes the texts {rises if difference.low > 0 else falls}: {words} changes by {change}"
        effects.append(result if clear else f"does not clearly change {words.rstrip(',')} ({change})")
    return f"Raising {control} from {value_text(low)} to {value_text(high)} {'; it '.join(effects)}."


def failures(samples: Sequence[Sample], real_text: Summary) -> str:
    """The failure that is furthest above its share of real texts. The intervals of the two shares must not overlap."""
    found = {kind: bootstrap(by_prompt(samples, f"failure: {kind}")) for kind in KINDS}
    excess = {kind: share.mean - np.nan_to_num(real_text[f"failure: {kind}"].mean) for kind, share in found.items()}
    clear = [k for k, share in found.items() if share.low > np.nan_to_num(real_text[f"failure: {k}"].high)]
    if not clear:
        return "No failure is clearly more frequent in your texts than in real text."
    kind = max(clear, key=lambda kind: excess[kind])
    share, real = estimate_text(found[kind], percent=True), estimate_text(real_text[f"failure: {kind}"], percent=True)
    others = [other for other in clear if other != kind]
    more = f" Also clearly more frequent than in real text: {', '.join(others)}." if others else ""
    figures = f"{share} of your texts, {real} of real texts"
    return f"Compared with real text, the clearest failure is {kind}: {figures}.{more}"


def context(loss: dict[int, Estimate], further: dict[int, Estimate]) -> str:
    """The number of words after which more context hardly lowers the loss of held-out words."""
    if not further:
        return "The held-out documents are too short to measure how much context the network uses."
    longest = max(loss)
    enough = next((c for c, gain in sorted(further.items()) if gain.mean < MIN_GAIN), None)
    if enough is None:
        last = max(further)
        return (
            f"The network uses all of its context: {longest} words instead of {last}"
            f" lower the loss by {estimate_text(further[last], digits=2)} nats."
        )
    words, gain = "word" if enough == 1 else "words", further[enough]
    more = f"The network hardly uses more than {enough} {words} of its context: {longest} words instead of {enough}"
    change = Estimate(-gain.mean, -gain.high, -gain.low)
    if gain.low > 0:
        return f"{more} lower the loss by {estimate_text(gain, digits=2)} nats."
    if gain.high < 0:
        return f"{more} raise the loss by {estimate_text(change, digits=2)} nats."
    return f"{more} change the loss by {estimate_text(change, sign=True, digits=2)} nats, which is no clear difference."
