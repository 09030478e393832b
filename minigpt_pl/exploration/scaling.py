"""Compared runs: size of the network, tokens of training text, loss, and power laws of the loss."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats  # comes with scikit-learn

from minigpt_pl import runs
from minigpt_pl.checkpoints import read_checkpoint
from minigpt_pl.data.batches import BatchLoader, Sequences
from minigpt_pl.data.corpus import Corpus, Ids, open_run_corpus
from minigpt_pl.errors import InputError
from minigpt_pl.exploration.samples import require_words
from minigpt_pl.exploration.summary import CONFIDENCE, RESAMPLES, Estimate, interval
from minigpt_pl.text_model import TextModel, load
from minigpt_pl.tokenizer import UNKNOWN_ID, list_vocabulary

MIN_SIZES = 4  # a power law has two parameters; with fewer sizes, its error cannot be estimated well
# Settings of files, logging and the trainer. They are not compared.
IGNORED_GROUPS = ("logger.", "trainer.", "text_generator.")
IGNORED_SETTINGS = ("run_name", "output_dir", "resume", "data.cache_dir", "data.source", "data.path", *IGNORED_GROUPS)


@dataclass(frozen=True)
class ComparedRun:
    """A run with its training text."""

    name: str
    model: TextModel
    corpus: Corpus
    held_out: Ids
    tokens: int  # of the training text that are used as targets, without padding
    epochs: float  # passes over them up to the checkpoint; nan for a model from Keras
    settings: dict[str, Any]  # name -> value, without IGNORED_SETTINGS

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.network.parameters())


def open_runs(checkpoints: Sequence[Path], source: str | None) -> list[ComparedRun]:
    """Open runs with the same words and the same held-out text.

    Raises:
        InputError: the words or the held-out texts differ, or two runs have the same name.
    """
    opened: list[ComparedRun] = []
    for checkpoint in checkpoints:
        folder = checkpoint.parent.parent
        problem = f"compare={folder.name}:"
        if folder.name in [run.name for run in opened]:
            raise InputError(f"{problem} occurs twice; give runs with different names")
        model = load(checkpoint)
        require_words(model)
        data, corpus = open_run_corpus(folder, model.tokenizer, source)
        held_out = corpus.validation
        if held_out is None:
            raise InputError(f"{problem} has no held-out text; train with data.validation_share above 0")
        if opened:
            first = opened[0]
            if list_vocabulary(model.tokenizer) != list_vocabulary(first.model.tokenizer):
                remedy = "give runs with the same text and vocabulary size"
                raise InputError(f"{problem} has other words than {first.name}; {remedy}")
            this_text, first_text = ((ids.tokens, ids.offsets) for ids in (held_out, first.held_out))
            if not all(map(np.array_equal, this_text, first_text)):
                remedy = "give runs with the same data.validation_share and data.validation_documents"
                raise InputError(f"{problem} has other held-out text than {first.name}; {remedy}")
        settings: dict[str, Any] = {}
        for group, values in runs.read_settings(folder).items():
            nested = isinstance(values, dict)
            settings |= {f"{group}.{name}": v for name, v in values.items()} if nested else {group: values}
        contents, max_length = read_checkpoint(checkpoint), model.network.max_length
        sequences = Sequences(corpus.train, max_length, data.cut, data.end_token, count_padding=False)
        seed = contents["hyper_parameters"].get("seed", 0)
        loader = BatchLoader(sequences, data.batch_size, seed, max_sequences=data.max_sequences)
        batches = contents.get("global_step", math.nan) * settings.get("trainer.accumulate_grad_batches", 1)
        tokens, epochs = loader.count_targets(), batches / loader.num_batches
        kept = {name: value for name, value in settings.items() if not name.startswith(IGNORED_SETTINGS)}
        opened.append(ComparedRun(folder.name, model, corpus, held_out, tokens, epochs, kept))
    return opened


def word_losses(
    losses: dict[str, np.ndarray], documents: Sequence[np.ndarray]
) -> dict[str, tuple[Estimate, Estimate | None]]:
    """The mean loss of a known word for each run, in nats, and the same loss minus that of the first run.

    The intervals come from a bootstrap over documents, with the same resampled documents for all runs. So the interval
    of a difference is narrow if it is similar in all documents. `losses` come from `document_losses`.
    """
    known = np.concatenate([document[1:] for document in documents]) != UNKNOWN_ID
    numbers = np.repeat(np.arange(len(documents)), [max(len(document) - 1, 0) for document in documents])[known]
    counts = np.bincount(numbers, minlength=len(documents))
    rows = np.random.default_rng(0).integers(len(documents), size=(RESAMPLES, len(documents)))
    result: dict[str, tuple[Estimate, Estimate | None]] = {}
    first: tuple[float, np.ndarray] | None = None
    for name, values in losses.items():
        sums = np.bincount(numbers, values[known].astype(np.float64), minlength=len(documents))
        mean, resampled = sums.sum() / counts.sum(), sums[rows].sum(axis=1) / counts[rows].sum(axis=1)
        difference = None if first is None else interval(mean - first[0], resampled - first[1])
        result[name] = interval(mean, resampled), difference
        first = first or (mean, resampled)
    return result


def power_law(x: Sequence[float], loss: Sequence[float]) -> dict[str, Any]:
    """Fit loss = scale * x ** -exponent (Kaplan et al., arXiv 2001.08361) by least squares of the logarithms.

    There is no constant term, because few points cannot distinguish it from a smaller exponent. So the law holds only
    between the smallest and the largest x. The interval of the exponent comes from Student's t. With fewer than
    `MIN_SIZES` different x, the result is empty.
    """
    if len(set(x)) < MIN_SIZES:
        return {}
    line = stats.linregress(np.log(x), np.log(loss))
    error = stats.t.ppf((1 + CONFIDENCE) / 2, len(x) - 2) * line.stderr
    exponent = Estimate(-line.slope, -line.slope - error, -line.slope + error)
    return {"scale": float(np.exp(line.intercept)), "exponent": exponent, "points": len(x)}


def power_laws(compared: Sequence[ComparedRun], loss: dict[str, float]) -> list[dict[str, Any]]:
    """A power law for each group of two or more runs that differ only in their parameters, or only in their tokens.

    `against` is "parameters" or "tokens". `of` lists the names of the runs from small to large.
    """
    result = []
    for variable, prefix in {"parameters": "model.", "tokens": "data.max_sequences"}.items():
        groups: dict[tuple[Any, ...], list[ComparedRun]] = {}
        for run in compared:
            if not math.isnan(run.epochs):
                same = [(key, str(v)) for key, v in run.settings.items() if not key.startswith((prefix, "seed"))]
                text = run.tokens if variable == "parameters" else None
                groups.setdefault((*sorted(same), text, round(run.epochs, 1)), []).append(run)
        for group in groups.values():
            group.sort(key=lambda run: getattr(run, variable))
            x, names = [getattr(run, variable) for run in group], [run.name for run in group]
            if x[0] < x[-1]:
                result.append({"against": variable, "of": names} | power_law(x, [loss[name] for name in names]))
    return result
