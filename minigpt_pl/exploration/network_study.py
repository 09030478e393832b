"""Why a single block does this: what this network makes of the words before, measured on held-out text."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minigpt_pl.data.corpus import Corpus
from minigpt_pl.exploration.judging import Judge
from minigpt_pl.exploration.samples import without_nan
from minigpt_pl.exploration.summary import bootstrap
from minigpt_pl.files import write_text
from minigpt_pl.generation.text import TextModel, generate_texts
from minigpt_pl.measures import probes, repetition

WINDOWS = 2_000  # held-out words that are predicted with shorter and shorter context
COPIED = 100  # texts of the copying tests
CUT_SEEDS = 2  # texts a prompt written with each context
CUT = {"temperature": 0.8, "top_k": 20}  # the homework's own settings


def study(judge: Judge, corpus: Corpus, prompts: Sequence[str], num_tokens: int, path: Path) -> dict[str, Any]:
    """Measure, and write the figures to a file.

    Returns:
        `context`: words of context -> estimate of the loss; `further`: words -> what the ones beyond them help;
        `copying`: test -> loss; `attention`: (blocks, H, distance) mean weights; `cut`: words of context at generation
        -> measure -> estimate; `planted`: what `Judge.planted` gives; `windows`, `copied_texts`: how many held-out
        texts these were; `thresholds`: of the detectors. Estimates are [mean, low, high].
    """
    network, length = judge.model.network, judge.model.network.max_length
    tokens, offsets = np.asarray(corpus.validation.tokens), np.asarray(corpus.validation.offsets)
    windows = probes.windows_of(tokens, offsets, length + 1, WINDOWS)
    losses = probes.loss_by_context(network, windows) if len(windows) else {}
    longest = max(losses, default=0)
    halves, cuts = windows[:COPIED, : length // 2], [*(c for c in probes.CONTEXTS if c < length), length]
    result = {
        "windows": len(next(iter(losses.values()), [])),
        "context": {c: bootstrap(values[:, None]) for c, values in losses.items()},
        "further": {c: bootstrap((v - losses[longest])[:, None]) for c, v in losses.items() if c < longest},
        "copied_texts": len(halves),
        "copying": {
            name: bootstrap(values) for name, values in probes.copying_losses(network, halves).items()
        } if len(halves) else {},
        "attention": probes.attention_by_distance(network, windows[:COPIED, :length]).round(4).tolist()
        if len(windows) else [],
        "cut": {c: _cut(judge, prompts, num_tokens, c) for c in cuts},
        "planted": judge.planted(),
        "thresholds": judge.detectors.thresholds,
    }  # fmt: skip
    write_text(path, json.dumps(without_nan(result), indent=1) + "\n")
    return result


def _cut(judge: Judge, prompts: Sequence[str], num_tokens: int, context: int) -> dict[str, Any]:
    """Measures of texts written while only the last words can be seen; judged by the whole network."""
    model = judge.model
    shorter = TextModel(probes.with_context(model.network, context), model.tokenizer, model.end_id)
    written = generate_texts(shorter, prompts, num_tokens, seed=0, num_samples=CUT_SEEDS, **CUT)
    asked = [model.tokenizer.encode(prompt).ids for prompt in prompts]
    new = [[model.tokenizer.encode(text).ids[len(ids) :] for text in group]
           for ids, group in zip(asked, written, strict=True)]  # fmt: skip
    flat = [(ids, text) for ids, group in zip(asked, new, strict=True) for text in group]
    values = {
        "loss": [score.loss for score in probes.score_texts(model.network, flat)],
        "ngram_loss": [-judge.ngrams.log_probabilities(np.array([*a, *t]))[len(a) :].mean() if t else np.nan
                       for a, t in flat],
        "repeated_4grams": [repetition.repeated(text) for _, text in flat],
        "distinct_2": [repetition.distinct(text, 2) for _, text in flat],
    }  # fmt: skip
    return {name: bootstrap(np.array(value).reshape(len(prompts), -1)) for name, value in values.items()}
