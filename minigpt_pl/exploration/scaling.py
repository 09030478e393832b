"""Runs as points: how large each network is, how much text it learned from, its loss, and power laws through them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats  # comes with scikit-learn

from minigpt_pl import runs
from minigpt_pl.checkpoints import read_checkpoint
from minigpt_pl.data.batches import BatchLoader, Sequences
from minigpt_pl.data.corpus import Corpus, open_run_corpus
from minigpt_pl.errors import InputError
from minigpt_pl.exploration.summary import CONFIDENCE, RESAMPLES, Estimate
from minigpt_pl.text_model import TextModel, load
from minigpt_pl.tokenizer import UNKNOWN_ID, list_vocabulary

DOCUMENTS = 1_000  # held-out ones, the first
SIZES = 4  # a power law has two unknowns; fewer different sizes leave too little to tell how sure it is
NOT_COMPARED = (
    "run_name", "output_dir", "resume", "data.cache_dir", "data.source", "data.path", "logger.", "trainer.",
    "text_generator.",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A run and what it learned from.

    Attributes:
        parameters: all of them; `in_blocks`: without embeddings and the output layer.
        text: predicted tokens of its training text, padding aside.
        passes: how often it saw them, up to the checkpoint; nan where that is not known (a model from Keras).
        settings: name -> value, those that do not say where or how it ran.
    """

    name: str
    model: TextModel
    parameters: int
    in_blocks: int
    text: int
    passes: float
    settings: dict[str, Any]

    @property
    def tokens(self) -> float:
        """Trained on, repeats counted."""
        return self.text * self.passes


@dataclass(frozen=True)
class Fit:
    """loss = scale * x ** -exponent, by least squares of the logarithms; the interval is Student's."""

    scale: float
    exponent: Estimate
    points: int


def open_runs(checkpoints: Sequence[Path], source: str | None) -> tuple[Corpus, list[Run]]:
    """The text that the runs share, and the runs."""
    first, opened = None, []
    for checkpoint in checkpoints:
        folder = checkpoint.parent.parent
        if folder.name in [run.name for run in opened]:
            raise InputError(f"compare={folder.name}: stands there twice; give runs of different names")
        model = load(checkpoint)
        data, corpus = open_run_corpus(folder, model.tokenizer, source)
        if corpus.validation is None:
            raise InputError(f"compare={folder.name}: held no text out; train with data.validation_share above 0")
        first = first or (model, corpus)
        if list_vocabulary(model.tokenizer) != list_vocabulary(first[0].tokenizer):
            raise InputError(
                f"compare={folder.name}: has other words than {opened[0].name}, so their losses do not compare;"
                " give runs of one text and one model.vocab_size"
            )
        ours, theirs = corpus.validation, first[1].validation
        if not (np.array_equal(ours.tokens, theirs.tokens) and np.array_equal(ours.offsets, theirs.offsets)):
            raise InputError(
                f"compare={folder.name}: held out other text than {opened[0].name}, so their losses do not compare;"
                " give runs with the same data.validation_share and data.validation_documents"
            )
        opened.append(_run(folder, checkpoint, model, data, corpus))
    return first[1], opened


def _run(folder: Path, checkpoint: Path, model: TextModel, data: Any, corpus: Corpus) -> Run:
    contents, groups = read_checkpoint(checkpoint), runs.read_settings(folder)
    settings = {name: value for name, value in groups.items() if not isinstance(value, dict)} | {
        f"{group}.{name}": value for group, values in groups.items() if isinstance(values, dict)
        for name, value in values.items()
    }  # fmt: skip
    sequences = Sequences(corpus.train, model.network.max_length, data.cut, data.end_token, count_padding=False)
    seed = contents["hyper_parameters"].get("seed", 0)
    rows = BatchLoader(sequences, data.batch_size, seed, max_sequences=data.max_sequences).rows
    steps = contents.get("global_step", math.nan)
    network = model.network
    return Run(
        folder.name,
        model,
        sum(p.numel() for p in network.parameters()),
        sum(p.numel() for p in network.blocks.parameters()),
        int(sequences.target_counts[rows].sum()),
        steps * settings.get("trainer.accumulate_grad_batches", 1) * data.batch_size / len(rows),
        {name: value for name, value in settings.items() if not name.startswith(NOT_COMPARED)},
    )


def held_out_documents(corpus: Corpus) -> list[np.ndarray]:
    """The first `DOCUMENTS`, without the token that closes each: not all runs have learned one."""
    tokens, offsets = corpus.validation.tokens, corpus.validation.offsets[: DOCUMENTS + 1]
    return [tokens[start : end - 1] for start, end in zip(offsets, offsets[1:], strict=False)]


def word_losses(
    losses: dict[str, np.ndarray], documents: Sequence[np.ndarray]
) -> dict[str, tuple[Estimate, Estimate | None]]:
    """For each run the loss of a known word, and that less the first run's, with 95 % bootstrap intervals.

    Documents are drawn with replacement, for all runs the same, so a difference is sure where documents agree on it.

    Args:
        losses: run -> (T,) nats, as `document_losses` gives them.
        documents: each one's ids.
    """
    known = np.concatenate([document[1:] for document in documents]) != UNKNOWN_ID
    numbers = np.repeat(np.arange(len(documents)), [max(len(document) - 1, 0) for document in documents])[known]
    counts = np.bincount(numbers, minlength=len(documents))
    drawn = np.random.default_rng(0).integers(len(documents), size=(RESAMPLES, len(documents)))
    means, resampled = {}, {}
    for name, values in losses.items():
        sums = np.bincount(numbers, values[known].astype(np.float64), minlength=len(documents))
        means[name], resampled[name] = sums.sum() / counts.sum(), sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    first, tail = next(iter(losses)), (1 - CONFIDENCE) / 2

    def estimate(mean: float, values: np.ndarray) -> Estimate:
        return Estimate(float(mean), *map(float, np.quantile(values, [tail, 1 - tail])))

    return {
        name: (
            estimate(means[name], resampled[name]),
            None if name == first else estimate(means[name] - means[first], resampled[name] - resampled[first]),
        )
        for name in losses
    }


def power_law(x: Sequence[float], loss: Sequence[float]) -> Fit | None:
    """The power law through points (Kaplan et al., arXiv 2001.08361); None with fewer than `SIZES` different x.

    It has no floor, which so few points cannot tell from a smaller exponent: it holds for the range of the points.
    """
    if len(set(x)) < SIZES:
        return None
    line = stats.linregress(np.log(x), np.log(loss))
    wide = stats.t.ppf((1 + CONFIDENCE) / 2, len(x) - 2) * line.stderr
    return Fit(float(np.exp(line.intercept)), Estimate(-line.slope, -line.slope - wide, -line.slope + wide), len(x))


def power_laws(compared: Sequence[Run], loss: dict[str, float]) -> Iterator[tuple[str, list[str], Fit | None]]:
    """Power laws against parameters and against tokens, each through runs that are alike but for it.

    Yields:
        "parameters" or "tokens", the names of two runs or more that differ in it, from small to large, and the fit.
    """
    varied = {"parameters": "model.", "tokens": "data.max_sequences"}
    for what, prefix in varied.items():
        groups: dict[tuple, list[Run]] = {}
        for run in compared:
            if math.isnan(run.passes):
                continue
            same = [(name, str(value)) for name, value in run.settings.items() if not name.startswith((prefix, "seed"))]
            seen = (run.text if what == "parameters" else None, round(run.passes, 1))
            groups.setdefault((*sorted(same), *seen), []).append(run)
        for group in groups.values():
            group.sort(key=lambda run: getattr(run, what))
            x = [getattr(run, what) for run in group]
            if x[0] < x[-1]:
                yield what, [run.name for run in group], power_law(x, [loss[run.name] for run in group])
