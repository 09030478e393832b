"""Runs side by side: what size and data change, on the same held-out text and with the same prompts."""

import dataclasses
import json
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minigpt_pl import runs
from minigpt_pl.config import GRID, ExploreConfig
from minigpt_pl.data.corpus import Corpus
from minigpt_pl.errors import InputError
from minigpt_pl.exploration import charts
from minigpt_pl.exploration.blocks import Blank, Block, Heading, Table, Words, as_markdown, estimate_text
from minigpt_pl.exploration.judging import Judge
from minigpt_pl.exploration.network_study import CUT, WINDOWS
from minigpt_pl.exploration.samples import Sample, Setting, label, without_nan, write_samples, write_texts
from minigpt_pl.exploration.scaling import SIZES, Fit, Run, held_out_documents, open_runs, power_laws, word_losses
from minigpt_pl.exploration.summary import MEASURES, Estimate, bootstrap, by_prompt, summarize_real
from minigpt_pl.files import make_folder, write_text
from minigpt_pl.generation.prompts import encode_prompts
from minigpt_pl.measures.likelihood import document_losses, summarise
from minigpt_pl.measures.probes import loss_by_context, windows_of

log = logging.getLogger(__name__)

CONSISTENCY = ("sentiment", "failure: sentiment", "drift", "failure: drift", "ngram_loss", "repeated_4grams")


def compare(config: ExploreConfig, prompts: Sequence[tuple[str, str]], folder: Path) -> None:
    """Measure runs, and write compare.md, compare.png, compare.json, samples.jsonl and held_out.jsonl into the folder.

    Raises:
        InputError: the runs have other words or other held-out text, or no texts can be written.
    """
    setting = _one_setting(config)
    checkpoints = [runs.find_checkpoint(name, Path(config.output_dir), setting="compare") for name in config.compare]
    corpus, compared = open_runs(checkpoints, config.source)
    encode_prompts(compared[0].model.tokenizer, [prompt for _, prompt in prompts], "prompts: prompt")
    make_folder(folder, "folder")
    documents = held_out_documents(corpus)
    losses = {}
    for run in compared:
        log.info("Loss of %s on %s held-out documents.", run.name, f"{len(documents):,}")
        losses[run.name] = document_losses(run.model.network, documents, show_progress=True)
    longest = max(run.model.network.max_length for run in compared)
    measured = summarise(losses, documents, longest, None)
    by_document = word_losses(losses, documents)

    contexts = _by_context(compared, corpus, longest)

    judge = Judge.prepare(compared[0].model, corpus, config.num_tokens)
    real = judge.real_texts(folder / "held_out.jsonl")
    people = summarize_real(real)
    consistency = {"real text": {name: people[name] for name in CONSISTENCY}}
    everything, seeds = [], range(config.seed, config.seed + config.num_seeds)
    for run in compared:
        log.info("Texts of %s.", run.name)
        samples = list(write_texts(config, run.model, prompts, setting, seeds))
        dataclasses.replace(judge, model=run.model).samples(samples)
        consistency[run.name] = {name: bootstrap(by_prompt(samples, name)) for name in CONSISTENCY}
        everything += [{"run": run.name} | sample for sample in samples]
    write_samples(folder / "samples.jsonl", everything)

    fits = list(power_laws(compared, {name: estimate.mean for name, (estimate, _) in by_document.items()}))
    record = {
        "documents": len(documents), "tokens": measured["whole"]["tokens"], "words": measured["whole"]["words"],
        "runs": {run.name: {
            "parameters": run.parameters, "in_blocks": run.in_blocks, "context": run.model.network.max_length,
            "text": run.text, "passes": run.passes,
            "word_loss": by_document[run.name][0], "less_first": by_document[run.name][1],
            "consistency": consistency[run.name],
        } for run in compared},
        "by_position": measured["by_position"], "by_context": contexts,
        "fits": [{"against": what, "of": names} | (dataclasses.asdict(fit) if fit else {})
                 for what, names, fit in fits],
    }  # fmt: skip
    write_text(folder / "compare.json", json.dumps(without_nan(record), indent=1) + "\n")
    charts.save(charts.compared(compared, by_document, measured["by_position"], fits), folder / "compare.png")
    blocks = _blocks(compared, corpus, setting, everything, measured, by_document, contexts, consistency, fits)
    write_text(folder / "compare.md", "\n\n".join(as_markdown(block) for block in blocks) + "\n")


def _by_context(compared: Sequence[Run], corpus: Corpus, longest: int) -> dict[str, dict[int, Estimate]]:
    """For each run the loss of the same tokens with shorter and shorter context, as far as its own reaches."""
    tokens, offsets = np.asarray(corpus.validation.tokens), np.asarray(corpus.validation.offsets)
    windows = windows_of(tokens, offsets, longest + 1, WINDOWS)  # (N, longest + 1)
    own = [(run, windows[:, -run.model.network.max_length - 1 :]) for run in compared]
    return {
        run.name: {c: bootstrap(values[:, None]) for c, values in loss_by_context(run.model.network, ids).items()}
        if len(ids) else {}
        for run, ids in own
    }  # fmt: skip


def _one_setting(config: ExploreConfig) -> Setting:
    """What texts are written with: the homework's own setting, save the controls that were given one value."""
    setting, problems = {}, []
    for name in GRID:
        values = getattr(config, name)
        if len(values) != 1 and name not in CUT:
            problems.append(f"{name}={values}: compare= writes with one value of each control; give one")
        setting[name] = values[0] if len(values) == 1 else CUT.get(name)
    if problems:
        raise InputError(*problems)
    return setting


# ------------------------------------------------------------------------------------------------ what it says


def _blocks(
    compared: Sequence[Run], corpus: Corpus, setting: Setting, samples: Sequence[Sample], measured: dict[str, Any],
    by_document: dict[str, tuple[Estimate, Estimate | None]], contexts: dict[str, dict[int, Estimate]],
    consistency: dict[str, dict[str, Estimate]], fits: Sequence[tuple[str, list[str], Fit | None]],
) -> Iterator[Block]:  # fmt: skip
    names = [run.name for run in compared]
    yield Heading(f"# {', '.join(names)} side by side")
    yield Words(
        f"Text: {corpus.record['source']}. All runs have the same words and are measured on the same"
        f" {measured['whole']['words']:,} known words of text that all of them held out; a word is predicted from as"
        " much of its document as the run's own context takes in. Square brackets hold 95 % intervals. Every figure"
        " stands in compare.json."
    )
    yield Heading("## Loss against size and data")
    differing = [
        name for name, value in compared[0].settings.items()
        if all(name in run.settings for run in compared) and any(run.settings[name] != value for run in compared)
    ]  # fmt: skip
    yield Words(
        "`text` is how many tokens of the training text a run could see, padding aside, `passes` how often it saw"
        f" them. The last columns are the settings in which the runs differ. `less {names[0]}` is the difference in"
        " loss: an interval that holds 0 shows none."
    )
    yield Table(
        ["run", "parameters", "in blocks", "text", "passes", "loss of a word, nats", f"less {names[0]}",
         "word perplexity", *differing],
        [[run.name, f"{run.parameters:,}", f"{run.in_blocks:,}", f"{run.text:,}",
          "–" if math.isnan(run.passes) else f"{run.passes:.2f}", estimate_text(by_document[run.name][0], digits=3),
          estimate_text(by_document[run.name][1], sign=True, digits=3),
          f"{math.exp(by_document[run.name][0].mean):.1f}",
          *(str(run.settings[name]) for name in differing)] for run in compared],
    )  # fmt: skip
    yield Words("![Loss against parameters, against tokens, and by position](compare.png)")
    for what in ("parameters", "tokens"):
        alike = "alike but for the network" if what == "parameters" else "alike but for data.max_sequences"
        mine = [(group, fit) for against, group, fit in fits if against == what]
        if not mine:
            yield Words(f"Against {what}: no two runs are {alike}, so nothing is said of it alone.")
        for group, fit in mine:
            if fit is None:
                yield Words(
                    f"Against {what}: {', '.join(group)} are {alike}: too few for a power law, which is fitted to"
                    f" {SIZES} different sizes or more."
                )
            else:
                yield Words(
                    f"Against {what}, over the {fit.points} runs {alike} ({', '.join(group)}): loss ="
                    f" {fit.scale:.3g} · {what}^-a with a = {estimate_text(fit.exponent, digits=3)}, within this range;"
                    " where the loss would level off it cannot tell."
                )
    yield Heading("## Long-range coherence")
    yield Words(
        "Loss by the tokens before in the document. Compare runs, not rows: other tokens stand at other places."
    )
    yield Table(
        ["tokens before", "tokens", *names],
        [[row["band"], f"{row['tokens']:,}", *(f"{row[name]:.3f}" for name in names)]
         for row in measured["by_position"]],
    )  # fmt: skip
    if contexts[names[0]]:
        yield Words(
            "The same held-out tokens, predicted from the last tokens before them only: where more no longer lower the"
            " loss, a network makes nothing of them."
        )
        yield Table(
            ["context, tokens", *names],
            [[str(c), *(estimate_text(contexts[name].get(c)) for name in names)]
             for c in sorted({c for estimates in contexts.values() for c in estimates})],
        )  # fmt: skip
    yield Heading("## Semantic consistency: sentiment and topic held through a text")
    yield Words(
        f"{len(samples) // len(compared):,} texts of each run, of up to {samples[0]['num_tokens']} words, with"
        f" {label(setting, ['temperature', 'top_k'])} and the same prompts and seeds; real text is held-out text of"
        " the same length. A failure's figure is the share of texts marked; that of real text is its false alarms."
    )
    yield Table(["measure", "what it is"], [[name, MEASURES[name]] for name in CONSISTENCY if name in MEASURES])
    yield Table(
        ["run", *CONSISTENCY],
        [[name, *map(estimate_text, estimates.values())] for name, estimates in consistency.items()],
    )
    yield Blank("What do size and data change, and what not?")
