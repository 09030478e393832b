"""Compare runs: the effect of size and data, on the same held-out text and with the same prompts."""

import dataclasses
import json
import logging
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from minigpt_pl.checkpoints import find_checkpoint
from minigpt_pl.config import GRID, ExploreConfig, NumberControls
from minigpt_pl.errors import InputError
from minigpt_pl.exploration import charts
from minigpt_pl.exploration.markup import Link, MarkedSample, NamedText, render, write_html, write_markdown
from minigpt_pl.exploration.metrics import METRICS, TextMetrics
from minigpt_pl.exploration.network_study import NUM_WINDOWS
from minigpt_pl.exploration.samples import Prompts, Sample, Setting, generate_setting, label, without_nan, write_samples
from minigpt_pl.exploration.scaling import MIN_SIZES, ComparedRun, open_runs, power_laws, word_losses
from minigpt_pl.exploration.summary import Estimate, Summary, bootstrap, by_prompt, estimate_text, summarize_real
from minigpt_pl.files import make_folder, write_text
from minigpt_pl.generation.prompts import encode_prompts
from minigpt_pl.generation.text import decode_continuation
from minigpt_pl.measures.evaluation import frequency_ranks, summarize_losses
from minigpt_pl.measures.likelihood import document_losses
from minigpt_pl.measures.probes import loss_by_context, non_overlapping_windows

log = logging.getLogger(__name__)

NUM_DOCUMENTS = 1_000  # held-out documents, from the beginning
CONSISTENCY = ("sentiment", "failure: sentiment", "drift", "failure: drift", "ngram_loss", "repeated_4grams")


def compare(config: ExploreConfig, prompts: Prompts, folder: Path) -> None:
    """Measure runs, and write a report into the folder.

    The files are compare.html, compare.md, compare.png, compare.json, samples.jsonl and held_out.jsonl.

    Raises:
        InputError: the runs differ in their words or held-out text, no text can be generated, or the folder has a
            comparison.
    """
    setting, names = _one_setting(config), config.compare or []
    checkpoints = [find_checkpoint(name, Path(config.output_dir), setting="compare") for name in names]
    if (folder / "compare.md").exists():
        raise InputError(f"folder={folder}: has a comparison; give folder=ANOTHER")
    compared = open_runs(checkpoints, config.source)
    first = compared[0]
    encode_prompts(first.model.tokenizer, [prompt for _, prompt in prompts], "prompts: prompt")
    make_folder(folder, "folder")
    # Without end tokens, because not all runs have learned to predict them.
    documents = [first.held_out.tokens[a : b - 1] for a, b in pairwise(first.held_out.offsets[: NUM_DOCUMENTS + 1])]
    losses, texts_of = {}, {}
    for run in compared:
        log.info("Loss of %s on %s held-out documents.", run.name, f"{len(documents):,}")
        losses[run.name] = document_losses(run.model.network, documents, show_progress=True)
    metrics = TextMetrics.fit(first.model, first.corpus.train, first.held_out, config.num_tokens, config.num_real)
    real_text = summarize_real(metrics.of_real_texts(folder / "held_out.jsonl"))
    for run in compared:
        log.info("Texts of %s.", run.name)
        seeds = range(config.seed, config.seed + config.num_seeds)
        texts_of[run.name] = list(generate_setting(config, run.model, prompts, setting, seeds))
        dataclasses.replace(metrics, model=run.model).add_to(texts_of[run.name])
    samples = [{"run": name} | sample for name, texts in texts_of.items() for sample in texts]
    write_samples(folder / "samples.jsonl", samples)

    longest = max(run.model.network.max_length for run in compared)
    ranks = frequency_ranks(first.corpus.train.tokens, first.model.network.vocab_size)
    summary, losses_of_words = summarize_losses(losses, documents, ranks, longest, None), word_losses(losses, documents)
    record: dict[str, Any] = {  # all figures of the report; less_first is the loss minus that of the first run
        "documents": len(documents),
        "tokens": summary["whole"]["tokens"],
        "words": summary["whole"]["words"],
        "runs": {
            run.name: {
                "parameters": run.parameters,
                "in_blocks": sum(p.numel() for block in run.model.network.blocks for p in block.parameters()),
                "context": run.model.network.max_length,
                "text": run.tokens,
                "passes": run.epochs,
                **dict(zip(("word_loss", "less_first"), losses_of_words[run.name], strict=True)),
                "consistency": {name: bootstrap(by_prompt(texts_of[run.name], name)) for name in CONSISTENCY},
            }
            for run in compared
        },
        "by_position": summary["by_position"],
        "by_context": _by_context(compared, longest),
        "fits": power_laws(compared, {name: loss.mean for name, (loss, _) in losses_of_words.items()}),
    }
    write_text(folder / "compare.json", json.dumps(without_nan(record), indent=1) + "\n")
    _write(compared, record, real_text, samples, folder)


def _one_setting(config: ExploreConfig) -> Setting:
    """The setting of the texts. If temperature or top_k has several values, its default is used."""
    setting, problems = {}, []
    for name in GRID:
        values = getattr(config, name)
        if len(values) != 1 and name not in ("temperature", "top_k"):
            problems.append(f"{name}={values}: compare= takes one value of each control; give one")
        setting[name] = values[0] if len(values) == 1 else getattr(NumberControls, name)
    if problems:
        raise InputError(*problems)
    return setting


def _by_context(compared: Sequence[ComparedRun], longest: int) -> dict[str, dict[int, Estimate]]:
    """Run name -> words of context -> how much higher the loss is than with the whole context of the run.

    The entry of the whole context is the loss itself. All runs predict the same tokens.
    """
    held_out, result = compared[0].held_out, {}
    windows = non_overlapping_windows(held_out.tokens, held_out.offsets, longest + 1, NUM_WINDOWS)  # (N, longest + 1)
    for run in compared:
        losses = loss_by_context(run.model.network, windows[:, -run.model.network.max_length - 1 :])
        whole = max(losses, default=0)  # without windows, there are no losses
        less = {c: values - losses[whole] if c < whole else values for c, values in losses.items()}
        result[run.name] = {c: bootstrap(values[:, None]) for c, values in less.items()}
    return result


def _write(
    compared: Sequence[ComparedRun], record: dict[str, Any], real_text: Summary, samples: Sequence[Sample], folder: Path
) -> None:
    """Write compare.md and compare.html. Their sentences are in compare.jinja."""
    first, names = compared[0], [*record["runs"]]
    differing = [
        name
        for name, value in first.settings.items()
        if all(name in run.settings for run in compared) and any(run.settings[name] != value for run in compared)
    ]
    rows = []
    for run in compared:
        figures = record["runs"][run.name]
        sizes = [f"{figures[name]:,}" for name in ("parameters", "in_blocks", "text")]
        epochs = "–" if math.isnan(run.epochs) else f"{run.epochs:.2f}"
        loss, difference = figures["word_loss"], estimate_text(figures["less_first"], sign=True, digits=3)
        losses = [estimate_text(loss, digits=3), difference, f"{math.exp(loss.mean):.1f}"]
        rows.append([run.name, *(str(run.settings[name]) for name in differing), *sizes, epochs, *losses])
    positions = [[r["band"], f"{r['tokens']:,}", *(f"{r[name]:.3f}" for name in names)] for r in record["by_position"]]
    by_context = record["by_context"].values()
    contexts = [
        [str(context), *(estimate_text(e.get(context), sign=context < max(e)) for e in by_context)]
        for context in sorted({context for estimates in by_context for context in estimates})
    ]
    summaries = {"real text": real_text} | {name: run["consistency"] for name, run in record["runs"].items()}
    consistency = [
        [name, *(estimate_text(summary[metric], percent=metric.startswith("failure")) for metric in CONSISTENCY)]
        for name, summary in summaries.items()
    ]
    measures = [METRICS[name] for name in CONSISTENCY if name in METRICS]
    prompt, seed, tokenizer = samples[0]["prompt"], samples[0]["seed"], first.model.tokenizer
    texts = [
        NamedText(sample["run"], [decode_continuation(tokenizer, [id_]) for id_ in sample["ids"]], sample)
        for sample in samples
    ]
    shown = [text for text in texts if (text.sample["prompt"], text.sample["seed"]) == (prompt, seed)]
    blocks = render(
        "compare.jinja",
        record=record,
        first=first.name,
        source=first.corpus.record["source"],
        runs=rows,
        differing=differing,
        short_names=[name.split(".")[-1] for name in differing],
        panels=charts.compared(compared, record, differing),
        estimate_text=estimate_text,
        min_sizes=MIN_SIZES,
        names=names,
        by_position=positions,
        by_context=contexts,
        num_texts=len(samples) // len(names),
        num_tokens=samples[0]["num_tokens"],
        setting=label(samples[0]["settings"], ["temperature", "top_k"]),
        meanings=[[m.label, m.meaning, m.direction, Link("definition", m.source)] for m in measures],
        metrics=[METRICS[name].label if name in METRICS else name for name in CONSISTENCY],
        consistency=consistency,
        texts=[MarkedSample(name, prompt, tokens, sample["failures"]) for name, tokens, sample in shown],
    )
    write_markdown(folder / "compare.md", blocks)
    write_html(folder / "compare.html", f"Comparison of {', '.join(names)}", blocks, "run", texts)
