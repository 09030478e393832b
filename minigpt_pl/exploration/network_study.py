"""How the network uses its context, measured on held-out text and on texts generated with a shorter context."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm  # comes with lightning

from minigpt_pl.data.corpus import Ids
from minigpt_pl.exploration.metrics import TextMetrics, ngram_loss
from minigpt_pl.exploration.samples import without_nan
from minigpt_pl.exploration.summary import Estimate, bootstrap
from minigpt_pl.files import write_text
from minigpt_pl.generation.text import generate_texts
from minigpt_pl.measures import probes
from minigpt_pl.measures.repetition import distinct, repeated
from minigpt_pl.text_model import TextModel

NUM_WINDOWS = 2_000  # held-out words that are predicted with each length of context
NUM_INDUCTION = 100  # held-out texts for the induction test and the attention by distance
SHORT_CONTEXT_SEEDS = 2  # texts per prompt for each length of context


def study_network(
    metrics: TextMetrics, held_out: Ids, prompts: Sequence[str], num_tokens: int, folder: Path
) -> dict[str, Any]:
    """Measure the network, and write the figures to network.json. Estimates are [mean, low, high].

    | key | content |
    |---|---|
    | `windows`, `context` | number of held-out words; words of context -> loss of these held-out words |
    | `further` | words of context -> how much the words further back lower the loss |
    | `copied_texts`, `copying` | number of texts in the induction test; losses of `induction_losses` |
    | `attention` | mean weights (blocks, H, distance) |
    | `cut` | words of context during generation -> metric of the texts, measured with the whole network |
    | `planted`, `thresholds` | `TextMetrics.detection_rates`; thresholds of the detector |
    """
    network, length = metrics.model.network, metrics.model.network.max_length
    windows = probes.non_overlapping_windows(held_out.tokens, held_out.offsets, length + 1, NUM_WINDOWS)
    result: dict[str, Any] = {"windows": 0, "context": {}, "further": {}}
    result |= {"copied_texts": len(windows[:NUM_INDUCTION]), "copying": {}, "attention": []}
    if len(windows):
        losses = probes.loss_by_context(network, windows)
        longest = losses[length]
        result["windows"] = len(longest)
        result["context"] = {c: bootstrap(values[:, None]) for c, values in losses.items()}
        result["further"] = {c: bootstrap((v - longest)[:, None]) for c, v in losses.items() if c < length}
        induction = probes.induction_losses(network, windows[:NUM_INDUCTION, : length // 2])
        result["copying"] = {name: bootstrap(values) for name, values in induction.items()}
        attention = probes.attention_by_distance(network, windows[:NUM_INDUCTION, :length])
        result["attention"] = attention.round(4).tolist()
    contexts = [*(c for c in probes.CONTEXTS if c < length), length]
    progress = tqdm(contexts, desc="Short contexts", unit=" contexts", disable=None, leave=False)
    result["cut"] = {c: _with_context(metrics, prompts, num_tokens, c) for c in progress}
    result |= {"planted": metrics.detection_rates(), "thresholds": metrics.detector.thresholds}
    write_text(folder / "network.json", json.dumps(without_nan(result), indent=1) + "\n")
    return result


def _with_context(metrics: TextMetrics, prompts: Sequence[str], num_tokens: int, context: int) -> dict[str, Estimate]:
    """Metrics of texts that the network generates with a shorter context, at temperature 0.8 and top_k 20."""
    model, encode = metrics.model, metrics.model.tokenizer.encode
    shorter = TextModel(probes.limit_context(model.network, context), model.tokenizer, model.end_id)
    top_k = min(20, model.network.vocab_size)
    groups = generate_texts(shorter, prompts, num_tokens, 0.8, top_k, seed=0, num_samples=SHORT_CONTEXT_SEEDS)
    texts = []
    for prompt, group in zip(prompts, groups, strict=True):
        ids = encode(prompt).ids
        texts += [(ids, encode(text).ids[len(ids) :]) for text in group]
    values = {
        "loss": [scores.loss for scores in probes.score_texts(model.network, texts)],
        "ngram_loss": [ngram_loss(metrics.ngrams, text) for text in texts],
        "repeated_4grams": [repeated(ids) for _, ids in texts],
        "distinct_2": [distinct(ids, 2) for _, ids in texts],
    }
    return {name: bootstrap(np.array(value).reshape(len(prompts), -1)) for name, value in values.items()}
