"""The five findings: each sentence in each of its cases, from made measurements."""

import math

import pytest

from minigpt_pl.exploration import findings
from minigpt_pl.exploration.metrics import PAIRS
from minigpt_pl.exploration.summary import Estimate
from minigpt_pl.measures.failures import KINDS

NO_FAILURES = {f"failure: {kind}": Estimate(0.0, 0.0, 0.0) for kind in KINDS}


def sample(prompt="a", seed=0, temperature=1.0, kinds=(), top_k=5, **metrics):
    marks = [{"kind": kind, "start": 0, "end": 1, "note": ""} for kind in kinds]
    chosen = {"temperature": temperature, "top_k": top_k}
    return {"prompt": prompt, "seed": seed, "settings": chosen, "metrics": metrics, "failures": marks}


class TestPrediction:
    @staticmethod
    def real(*differences):
        """Real texts on which the network's loss differs from that of word pairs, which is log 200."""
        return [{"loss": math.log(200) + difference, PAIRS: math.log(200)} for difference in differences]

    def test_worse(self):
        text = findings.prediction(self.real(*[math.log(2)] * 9, math.log(2) + 0.01))
        assert text.startswith("Your network predicts words worse than counting word pairs: perplexity 400 [400, 401]")
        assert "against 200 [200, 200], over 10 held-out texts" in text and "Train longer" in text

    def test_better(self):
        text = findings.prediction(self.real(-1, -1.1, -0.9))
        assert text.startswith("Your network predicts words better than counting word pairs: perplexity 74 [")
        assert "Train longer" not in text

    def test_no_difference(self):
        assert "within its error" in findings.prediction(self.real(-1, 1, -0.5, 0.4))

    def test_without_texts(self):
        assert "too short" in findings.prediction([])


class TestEffects:
    @staticmethod
    def samples(effect, name):
        return [
            sample(prompt, seed, temperature, **{name: 3 + 0.01 * seed + effect * (temperature == 2)})
            for prompt in "abcd"
            for seed in range(3)
            for temperature in (0.5, 1, 2)
        ]

    @pytest.mark.parametrize(
        ("effect", "words"),
        [
            (1.5, "Raising temperature from 0.5 to 2 makes the texts more unusual: {} changes by +1.50 ["),
            (-1.5, "makes the texts more usual: {} changes by -1.50 ["),
            (0, "does not clearly change the n-gram loss, which is lower for usual words (+0.0000 ["),
        ],
    )
    def test_coherence(self, effect, words):
        text = findings.coherence(self.samples(effect, "ngram_loss"), "temperature")
        measure = "the n-gram loss, which is lower for usual words,"
        assert words.format(measure) in text and text.endswith("] nats." if effect else "] nats).")

    @pytest.mark.parametrize(
        ("effect", "words"),
        [
            (0.2, "makes the texts more repetitive: {} changes by +0.20"),
            (-0.2, "makes the texts less repetitive: {} changes by -0.20"),
            (0, "does not clearly change {} (+0.00"),
        ],
    )
    def test_repetition(self, effect, words):
        texts = self.samples(effect, "repeated_4grams")
        for text, different in zip(texts, self.samples(-effect, "distinct_2"), strict=True):
            text["metrics"] |= different["metrics"]
        text = findings.repetition(texts, "temperature")
        first, second = text.split("; it ")
        assert words.format("the share of repeated 4-word sequences") in first
        varied = "more varied" if effect < 0 else "less varied" if effect > 0 else "does not clearly change"
        change = f" changes by {-effect:+.2f}" if effect else " (+0.00"
        assert varied in second and f"the share of different pairs of words{change}" in second

    def test_one_setting(self):
        assert "You tried only one setting" in findings.coherence([sample()], None)


class TestFailures:
    def test_the_kind_that_is_furthest_above_real_text(self):
        some = [sample(prompt, kinds=["loop", "drift"] if prompt < "e" else ["drift"]) for prompt in "abcdefgh"]
        real = NO_FAILURES | {"failure: drift": Estimate(0.9, 0.8, 0.95), "failure: loop": Estimate(0.01, 0.0, 0.02)}
        text = findings.failures(some, real)
        assert text.startswith("Compared with real text, the clearest failure is loop: 50.0% [")
        assert (
            "of your texts, 1.0% [0%, 2%] of real texts. Also clearly more frequent than in real text: drift." in text
        )

    def test_intervals_that_overlap_do_not_count(self):
        some = [sample(prompt, kinds=["loop"] * (prompt == "a")) for prompt in "abcdefgh"]
        real = NO_FAILURES | {"failure: loop": Estimate(0.02, 0.01, 0.03)}
        assert findings.failures(some, real) == "No failure is clearly more frequent in your texts than in real text."

    def test_without_real_texts(self):
        nan = {name: Estimate(*[math.nan] * 3) for name in NO_FAILURES}
        assert "is loop: 100.0% of your texts, – of real" in findings.failures([sample(kinds=["loop"])], nan)


class TestContext:
    LOSS = {1: Estimate(6, 5.9, 6.1), 5: Estimate(5.2, 5.1, 5.3), 80: Estimate(5.1, 5.0, 5.2)}

    def test_the_shortest_context_that_is_enough(self):
        further = {1: Estimate(0.9, 0.8, 1.0), 5: Estimate(0.04, 0.03, 0.05)}
        text = findings.context(self.LOSS, further)
        assert text.startswith("The network hardly uses more than 5 words of its context: 80 words instead of 5 lower")
        assert text.endswith("the loss by 0.04 [0.03, 0.05] nats.")

    def test_words_that_mislead_the_network(self):
        further = {1: Estimate(0.9, 0.8, 1.0), 5: Estimate(-0.04, -0.05, -0.03)}
        assert findings.context(self.LOSS, further).endswith(
            "80 words instead of 5 raise the loss by 0.04 [0.03, 0.05] nats."
        )

    def test_no_clear_difference(self):
        further = {1: Estimate(0.9, 0.8, 1.0), 5: Estimate(-0.01, -0.03, 0.01)}
        text = findings.context(self.LOSS, further)
        assert text.endswith("change the loss by +0.01 [-0.01, +0.03] nats, which is no clear difference.")

    def test_all_of_it(self):
        further = {1: Estimate(0.9, 0.8, 1.0), 5: Estimate(0.06, 0.05, 0.07)}
        text = findings.context(self.LOSS, further)
        assert text.startswith("The network uses all of its context: 80 words instead of 5 lower the loss by 0.06")

    def test_without_windows(self):
        assert "too short" in findings.context({}, {})


def test_the_controls_of_two_findings():
    some = [
        sample("a", seed, t, top_k=top_k, ngram_loss=t, repeated_4grams=t, distinct_2=-t)
        for seed in range(2)
        for t in (0.5, 1)
        for top_k in (5, 10)
    ]
    study = {"context": {}, "further": {}}
    for varied in (["temperature"], ["top_k"], ["top_k", "temperature"]):
        found = findings.five_findings(some, varied, [], NO_FAILURES, study)
        assert [finding.title for finding in found] == [
            "Prediction",
            "Coherence",
            "Repetition and variety",
            "Failures",
            "Context",
        ]
        assert found[1].text.startswith(f"Raising {varied[-1]} ") and found[2].text.startswith(f"Raising {varied[0]} ")
