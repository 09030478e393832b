"""Compare runs: the effect of size and data, on the same held-out text and with the same prompts."""

import dataclasses
import json
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from minigpt_pl import runs
from minigpt_pl.config import GRID, ExploreConfig, NumberControls
from minigpt_pl.errors import InputError
from minigpt_pl.exploration import charts
from minigpt_pl.exploration.markup import Block, Chart, Heading, Paragraph, Question, Table, estimate_text
from minigpt_pl.exploration.metrics import TextMetrics
from minigpt_pl.exploration.network_study import NUM_WINDOWS
from minigpt_pl.exploration.samples import Prompts, Sample, Setting, generate_setting, label, without_nan, write_samples
from minigpt_pl.exploration.scaling import (
    MIN_SIZES,
    Run,
    RunGroup,
    held_out_documents,
    open_runs,
    run_groups,
    word_losses,
)
from minigpt_pl.exploration.summary import METRICS, Estimate, Summary, bootstrap, by_prompt, summarize_real
from minigpt_pl.files import make_folder, write_aside
from minigpt_pl.generation.prompts import encode_prompts
from minigpt_pl.measures.evaluation import summarize_losses
from minigpt_pl.measures.likelihood import document_losses
from minigpt_pl.measures.probes import loss_by_context, non_overlapping_windows

log = logging.getLogger(__name__)

CONSISTENCY = ("sentiment", "failure: sentiment", "drift", "failure: drift", "ngram_loss", "repeated_4grams")
ONLY_DIFFERENCE = {"parameters": "the network", "tokens": "data.max_sequences"}


@dataclasses.dataclass
class Comparison:
    """All results that compare.md shows.

    Attributes:
        setting, samples: the setting of the texts, and the texts of all runs.
        losses: as from `summarize_losses`.
        word_losses: as from the function of that name.
        by_context: run -> words of context -> loss.
        consistency: run, or "real text" -> estimates of `CONSISTENCY`.
    """

    runs: Sequence[Run]
    setting: Setting
    samples: Sequence[Sample]
    num_documents: int
    losses: dict[str, Any]
    word_losses: dict[str, tuple[Estimate, Estimate | None]]
    groups: Sequence[RunGroup]
    by_context: dict[str, dict[int, Estimate]]
    consistency: dict[str, Summary]


def compare(config: ExploreConfig, prompts: Prompts, folder: Path) -> None:
    """Measure runs, and write compare.md, compare.png, compare.json, samples.jsonl and held_out.jsonl into the folder.

    Raises:
        InputError: the runs have other words or other held-out text, or no texts can be generated.
    """
    setting, names = _one_setting(config), config.compare or []
    checkpoints = [runs.find_checkpoint(name, Path(config.output_dir), setting="compare") for name in names]
    compared = open_runs(checkpoints, config.source)
    first = compared[0]
    encode_prompts(first.model.tokenizer, [prompt for _, prompt in prompts], "prompts: prompt")
    make_folder(folder, "folder")
    documents, losses = held_out_documents(first.held_out), {}
    for run in compared:
        log.info("Loss of %s on %s held-out documents.", run.name, f"{len(documents):,}")
        losses[run.name] = document_losses(run.model.network, documents, show_progress=True)
    by_run = word_losses(losses, documents)
    longest = max(run.model.network.max_length for run in compared)

    metrics = TextMetrics.fit(first.model, first.corpus.train, first.held_out, config.num_tokens)
    real = summarize_real(metrics.of_real_texts(folder / "held_out.jsonl"))
    consistency = {"real text": {name: real[name] for name in CONSISTENCY}}
    all_samples: list[Sample] = []
    seeds = range(config.seed, config.seed + config.num_seeds)
    for run in compared:
        log.info("Texts of %s.", run.name)
        samples = list(generate_setting(config, run.model, prompts, setting, seeds))
        dataclasses.replace(metrics, model=run.model).add_to(samples)
        consistency[run.name] = {name: bootstrap(by_prompt(samples, name)) for name in CONSISTENCY}
        all_samples += [{"run": run.name} | sample for sample in samples]
    write_samples(folder / "samples.jsonl", all_samples)

    comparison = Comparison(
        compared,
        setting,
        all_samples,
        len(documents),
        summarize_losses(losses, documents, longest, None),
        by_run,
        list(run_groups(compared, {name: estimate.mean for name, (estimate, _) in by_run.items()})),
        _by_context(compared, longest),
        consistency,
    )
    write_aside(folder / "compare.json", json.dumps(without_nan(_record(comparison)), indent=1) + "\n")
    blocks = [block for section in (_losses, _coherence, _consistency) for block in section(comparison)]
    for block in blocks:
        if isinstance(block, Chart):
            block.save(folder)
    write_aside(folder / "compare.md", "\n\n".join(block.markdown() for block in blocks) + "\n")


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


def _by_context(compared: Sequence[Run], longest: int) -> dict[str, dict[int, Estimate]]:
    """The loss of the same tokens with shorter and shorter context, up to each run's own."""
    held_out = compared[0].held_out
    windows = non_overlapping_windows(held_out.tokens, held_out.offsets, longest + 1, NUM_WINDOWS)  # (N, longest + 1)
    result: dict[str, dict[int, Estimate]] = {run.name: {} for run in compared}
    for run in compared if len(windows) else ():
        losses = loss_by_context(run.model.network, windows[:, -run.model.network.max_length - 1 :])
        result[run.name] = {c: bootstrap(values[:, None]) for c, values in losses.items()}
    return result


def _record(c: Comparison) -> dict[str, Any]:
    """The contents of compare.json."""
    whole = c.losses["whole"]
    by_run = {
        run.name: {
            "parameters": run.parameters,
            "in_blocks": run.block_parameters,
            "context": run.model.network.max_length,
            "text": run.text_tokens,
            "passes": run.epochs,
            "word_loss": c.word_losses[run.name][0],
            "less_first": c.word_losses[run.name][1],
            "consistency": c.consistency[run.name],
        }
        for run in c.runs
    }
    fits = [{"against": g.variable, "of": g.names} | (g.fit._asdict() if g.fit else {}) for g in c.groups]
    record = {"documents": c.num_documents, "tokens": whole["tokens"], "words": whole["words"], "runs": by_run}
    return record | {"by_position": c.losses["by_position"], "by_context": c.by_context, "fits": fits}


def _losses(c: Comparison) -> Iterator[Block]:
    first, names = c.runs[0], [run.name for run in c.runs]
    yield Heading(1, f"Comparison of {', '.join(names)}")
    yield Paragraph(
        f"Text: {first.corpus.record['source']}. All runs have the same words. The losses are those of the same"
        f" {c.losses['whole']['words']:,} known words of text that all of them held out. A word is predicted from the"
        " words before it in its document, as many as the run's context allows. Square brackets hold 95 % intervals."
        " All figures are in compare.json."
    )
    yield Heading(2, "Loss against size and data")
    differing = [
        name
        for name, value in first.settings.items()
        if all(name in run.settings for run in c.runs) and any(run.settings[name] != value for run in c.runs)
    ]
    yield Paragraph(
        '"text" is the number of tokens in the run\'s training text, without padding. "passes" is how often the run saw'
        f' them. "minus {names[0]}" is the difference in loss; if its interval contains 0, the figures show no'
        " difference. The last columns are the settings that differ."
    )
    header = ["run", "parameters", "in blocks", "text", "passes", "loss of a word, nats", f"minus {names[0]}"]
    rows = []
    for run in c.runs:
        loss, difference = c.word_losses[run.name]
        sizes = [f"{size:,}" for size in (run.parameters, run.block_parameters, run.text_tokens)]
        epochs = "–" if math.isnan(run.epochs) else f"{run.epochs:.2f}"
        losses = [estimate_text(loss, digits=3), estimate_text(difference, sign=True, digits=3)]
        perplexity = f"{math.exp(loss.mean):.1f}"
        rows.append([run.name, *sizes, epochs, *losses, perplexity, *(str(run.settings[name]) for name in differing)])
    yield Table([*header, "word perplexity", *differing], rows)
    title = "Loss against parameters, against tokens, and by position"
    yield Chart("compare", title, charts.compared(c.runs, c.word_losses, c.losses["by_position"], c.groups))
    for variable, only_difference in ONLY_DIFFERENCE.items():
        groups = [group for group in c.groups if group.variable == variable]
        if not groups:
            yield Paragraph(
                f"Against {variable}: no two runs differ only in {only_difference}, so there is no comparison."
            )
        for _, group, fit in groups:
            runs_text = f"Against {variable}: {', '.join(group)} differ only in {only_difference}"
            if fit is None:
                yield Paragraph(f"{runs_text}. These are too few for a power law, which needs {MIN_SIZES} sizes.")
            else:
                yield Paragraph(
                    f"{runs_text}: loss = {fit.scale:.3g} · {variable}^-a with a ="
                    f" {estimate_text(fit.exponent, digits=3)}, over {fit.points} runs. The law holds within this range"
                    " only; it cannot show where the loss stops falling."
                )


def _coherence(c: Comparison) -> Iterator[Block]:
    names = [run.name for run in c.runs]
    yield Heading(2, "Long-range coherence")
    yield Paragraph(
        "Loss by the number of tokens before the token in its document. Compare columns, not rows, because each row has"
        " other tokens."
    )
    rows = [[r["band"], f"{r['tokens']:,}", *(f"{r[name]:.3f}" for name in names)] for r in c.losses["by_position"]]
    yield Table(["tokens before", "tokens", *names], rows)
    if c.by_context[names[0]]:
        yield Paragraph(
            "The same held-out tokens, predicted only from the last tokens before them. If more context does not lower"
            " the loss, the network does not use it."
        )
        contexts = sorted({context for estimates in c.by_context.values() for context in estimates})
        rows = [[str(n), *(estimate_text(c.by_context[name].get(n)) for name in names)] for n in contexts]
        yield Table(["context, tokens", *names], rows)


def _consistency(c: Comparison) -> Iterator[Block]:
    yield Heading(2, "Semantic consistency: sentiment and topic of a text")
    yield Paragraph(
        f"{len(c.samples) // len(c.runs):,} texts of each run, of up to {c.samples[0]['num_tokens']} words, with"
        f" {label(c.setting, ['temperature', 'top_k'])} and the same prompts and random seeds. Real text is held-out"
        " text of the same length. The figure of a failure is the share of marked texts; for real text, the rate of false"
        " alarms."
    )
    yield Table(["measure", "meaning"], [[name, METRICS[name]] for name in CONSISTENCY if name in METRICS])
    rows = [[name, *map(estimate_text, estimates.values())] for name, estimates in c.consistency.items()]
    yield Table(["run", *CONSISTENCY], rows)
    yield Question("What do size and data change, and what not?")
