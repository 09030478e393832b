"""Compare runs: the effect of size and data, on the same held-out text and with the same prompts."""

import dataclasses
import json
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minigpt_pl.checkpoints import find_checkpoint
from minigpt_pl.config import GRID, ExploreConfig, NumberControls
from minigpt_pl.errors import InputError
from minigpt_pl.exploration import charts
from minigpt_pl.exploration.markup import Block, Chart, Heading, Paragraph, Question, Table, write_report
from minigpt_pl.exploration.metrics import METRICS, TextMetrics
from minigpt_pl.exploration.network_study import NUM_WINDOWS
from minigpt_pl.exploration.samples import Prompts, Sample, Setting, generate_setting, label, without_nan, write_samples
from minigpt_pl.exploration.scaling import MIN_SIZES, Run, held_out_documents, open_runs, power_laws, word_losses
from minigpt_pl.exploration.summary import Estimate, Summary, bootstrap, by_prompt, estimate_text, summarize_real
from minigpt_pl.files import make_folder, write_text
from minigpt_pl.generation.prompts import encode_prompts
from minigpt_pl.measures.evaluation import summarize_losses
from minigpt_pl.measures.likelihood import document_losses
from minigpt_pl.measures.probes import loss_by_context, non_overlapping_windows

log = logging.getLogger(__name__)

CONSISTENCY = ("sentiment", "failure: sentiment", "drift", "failure: drift", "ngram_loss", "repeated_4grams")
ONLY_DIFFERENCE = {"parameters": "the network", "tokens": "data.max_sequences"}


def compare(config: ExploreConfig, prompts: Prompts, folder: Path) -> None:
    """Measure runs, and write compare.md, compare.png, compare.json, samples.jsonl and held_out.jsonl into the folder.

    Raises:
        InputError: the runs have other words or other held-out text, or no texts can be generated.
    """
    setting, names = _one_setting(config), config.compare or []
    checkpoints = [find_checkpoint(name, Path(config.output_dir), setting="compare") for name in names]
    compared = open_runs(checkpoints, config.source)
    first = compared[0]
    encode_prompts(first.model.tokenizer, [prompt for _, prompt in prompts], "prompts: prompt")
    make_folder(folder, "folder")
    documents = held_out_documents(first.held_out)
    losses, texts_of = {}, {}
    for run in compared:
        log.info("Loss of %s on %s held-out documents.", run.name, f"{len(documents):,}")
        losses[run.name] = document_losses(run.model.network, documents, show_progress=True)
    metrics = TextMetrics.fit(first.model, first.corpus.train, first.held_out, config.num_tokens)
    real = summarize_real(metrics.of_real_texts(folder / "held_out.jsonl"))
    for run in compared:
        log.info("Texts of %s.", run.name)
        seeds = range(config.seed, config.seed + config.num_seeds)
        texts_of[run.name] = list(generate_setting(config, run.model, prompts, setting, seeds))
        dataclasses.replace(metrics, model=run.model).add_to(texts_of[run.name])
    samples = [{"run": name} | sample for name, texts in texts_of.items() for sample in texts]
    write_samples(folder / "samples.jsonl", samples)

    record = _record(compared, documents, losses, texts_of)
    write_text(folder / "compare.json", json.dumps(without_nan(record), indent=1) + "\n")
    sections = _losses(compared, record), _coherence(record), _consistency(record, real, samples)
    write_report(folder / "compare.md", [block for section in sections for block in section])


def _one_setting(config: ExploreConfig) -> Setting:
    """The setting of the texts: the given values, and the defaults of temperature and top_k if they have several."""
    values = {name: getattr(config, name) for name in GRID}
    several = {name: value for name, value in values.items() if len(value) != 1}
    if problems := [
        f"{name}={value}: compare= takes one value of each control; give one"
        for name, value in several.items()
        if name not in ("temperature", "top_k")
    ]:
        raise InputError(*problems)
    return {name: getattr(NumberControls, name) if name in several else value[0] for name, value in values.items()}


def _record(
    compared: Sequence[Run],
    documents: Sequence[np.ndarray],
    losses: dict[str, np.ndarray],
    texts_of: dict[str, list[Sample]],
) -> dict[str, Any]:
    """The contents of compare.json, and the only source of the report's figures.

    Args:
        documents: held-out documents; losses: run -> the losses of their tokens.
        texts_of: run -> its samples.
    """
    longest = max(run.model.network.max_length for run in compared)
    summary, losses_of_words = summarize_losses(losses, documents, longest, None), word_losses(losses, documents)
    runs_record = {}
    for run in compared:
        loss, less_first = losses_of_words[run.name]
        runs_record[run.name] = {
            "parameters": run.parameters,
            "in_blocks": run.block_parameters,
            "context": run.model.network.max_length,
            "text": run.text_tokens,
            "passes": run.epochs,
            "word_loss": loss,
            "less_first": less_first,
            "consistency": {name: bootstrap(by_prompt(texts_of[run.name], name)) for name in CONSISTENCY},
        }
    fits = power_laws(compared, {name: loss.mean for name, (loss, _) in losses_of_words.items()})
    counts = {"documents": len(documents)} | {name: summary["whole"][name] for name in ("tokens", "words")}
    results = {"by_position": summary["by_position"], "by_context": _by_context(compared, longest), "fits": fits}
    return counts | {"runs": runs_record} | results


def _by_context(compared: Sequence[Run], longest: int) -> dict[str, dict[int, Estimate]]:
    """The loss of the same tokens for all runs, with shorter and shorter context, up to each run's own."""
    held_out, result = compared[0].held_out, {}
    windows = non_overlapping_windows(held_out.tokens, held_out.offsets, longest + 1, NUM_WINDOWS)  # (N, longest + 1)
    for run in compared:
        losses = loss_by_context(run.model.network, windows[:, -run.model.network.max_length - 1 :])
        result[run.name] = {c: bootstrap(values[:, None]) for c, values in losses.items()}
    return result


def _losses(compared: Sequence[Run], record: dict[str, Any]) -> Iterator[Block]:
    first, names = compared[0], [*record["runs"]]
    yield Heading(1, f"Comparison of {', '.join(names)}")
    yield Paragraph(
        f"Text: {first.corpus.record['source']}. All runs have the same words. The losses are those of the same"
        f" {record['words']:,} known words of text that all of them held out. A word is predicted from the"
        " words before it in its document, as many as the run's context allows. Square brackets hold 95 % intervals."
        " All figures are in compare.json."
    )
    yield Heading(2, "Loss against size and data")
    differing = [
        name
        for name, value in first.settings.items()
        if all(name in run.settings for run in compared) and any(run.settings[name] != value for run in compared)
    ]
    yield Paragraph(
        '"text" is the number of tokens in the run\'s training text, without padding. "passes" is how often the run saw'
        f' them. "minus {names[0]}" is the difference in loss; if its interval contains 0, the figures show no'
        " difference. The last columns are the settings that differ."
    )
    header = ["run", "parameters", "in blocks", "text", "passes", "loss of a word, nats", f"minus {names[0]}"]
    rows = []
    for run in compared:
        figures = record["runs"][run.name]
        sizes = [f"{figures[name]:,}" for name in ("parameters", "in_blocks", "text")]
        epochs = "–" if math.isnan(run.epochs) else f"{run.epochs:.2f}"
        loss, difference = figures["word_loss"], estimate_text(figures["less_first"], sign=True, digits=3)
        losses = [estimate_text(loss, digits=3), difference, f"{math.exp(loss.mean):.1f}"]
        rows.append([run.name, *sizes, epochs, *losses, *(str(run.settings[name]) for name in differing)])
    yield Table([*header, "word perplexity", *differing], rows)
    title = "Loss against parameters, against tokens, and by position"
    yield Chart("compare", title, charts.compared(compared, record))
    for variable, only_difference in ONLY_DIFFERENCE.items():
        fits = [fit for fit in record["fits"] if fit["against"] == variable]
        if not fits:
            yield Paragraph(f"Against {variable}: no comparison, because no two runs differ only in {only_difference}.")
        for fit in fits:
            runs_text = f"Against {variable}: {', '.join(fit['of'])} differ only in {only_difference}"
            if "exponent" not in fit:
                yield Paragraph(f"{runs_text}. These are too few for a power law, which needs {MIN_SIZES} sizes.")
            else:
                yield Paragraph(
                    f"{runs_text}: loss = {fit['scale']:.3g} · {variable}^-a with a ="
                    f" {estimate_text(fit['exponent'], digits=3)}, over {fit['points']} runs. The law holds within this"
                    " range only; it cannot show where the loss stops falling."
                )


def _coherence(record: dict[str, Any]) -> Iterator[Block]:
    names = [*record["runs"]]
    yield Heading(2, "Long-range coherence")
    yield Paragraph(
        "Loss by the number of tokens before the token in its document. Compare columns, not rows, because each row has"
        " other tokens."
    )
    rows = [[r["band"], f"{r['tokens']:,}", *(f"{r[name]:.3f}" for name in names)] for r in record["by_position"]]
    yield Table(["tokens before", "tokens", *names], rows)
    if record["by_context"][names[0]]:
        yield Paragraph(
            "The same held-out tokens, predicted only from the last tokens before them. If more context does not lower"
            " the loss, the network does not use it."
        )
        contexts = sorted({context for estimates in record["by_context"].values() for context in estimates})
        rows = [[str(n), *(estimate_text(record["by_context"][name].get(n)) for name in names)] for n in contexts]
        yield Table(["context, tokens", *names], rows)


def _consistency(record: dict[str, Any], real: Summary, samples: Sequence[Sample]) -> Iterator[Block]:
    figures = {"real text": real} | {name: run["consistency"] for name, run in record["runs"].items()}
    yield Heading(2, "Semantic consistency: sentiment and topic of a text")
    setting = label(samples[0]["settings"], ["temperature", "top_k"])
    yield Paragraph(
        f"{len(samples) // len(record['runs']):,} texts of each run, of up to {samples[0]['num_tokens']} words, with"
        f" {setting} and the same prompts and random seeds. Real text is held-out text of the same length. The figure"
        " of a failure is the share of marked texts. For real text, it is the rate of false alarms."
    )
    yield Table(["measure", "meaning"], [[name, METRICS[name]] for name in CONSISTENCY if name in METRICS])
    rows = [[name, *(estimate_text(summary[metric]) for metric in CONSISTENCY)] for name, summary in figures.items()]
    yield Table(["run", *CONSISTENCY], rows)
    yield Question("What do size and data change, and what not?")
