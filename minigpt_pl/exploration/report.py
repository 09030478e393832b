"""The report: what was measured, as `report.md` to hand in and `report.html` to look around in, without a network.

It states measurements. What they mean is for the reader to say; the places for it are left blank and marked.
"""

import html
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from string import Template
from typing import Any

import torch

from minigpt_pl.exploration import charts
from minigpt_pl.exploration.blocks import (
    Blank,
    Block,
    Chart,
    Heading,
    Marked,
    Table,
    Words,
    as_html,
    as_markdown,
    estimate_text,
)
from minigpt_pl.exploration.judging import CONTEXT, Judge
from minigpt_pl.exploration.samples import Sample, Setting, is_greedy, label, value_text, varied_controls
from minigpt_pl.exploration.summary import (
    FAILURES,
    MEASURES,
    RULE,
    Estimate,
    best_settings,
    effect,
    summarize,
    summarize_real,
)
from minigpt_pl.files import write_text
from minigpt_pl.generation.text import TextModel
from minigpt_pl.measures.failures import KINDS
from minigpt_pl.measures.probes import attention_maps

WORST = 3  # examples of each failure
COPIES = 10  # of the longest copied runs
MAP_WORDS = 40  # of a sample in an attention map
SHOWN = ("ngram_loss", "loss", "seen_4grams", "entropy", "repeated_4grams", "loop", "distinct_2", "self_bleu",
         "unknown", "tokens", "copied", "recurring", "drift", "sentiment")  # fmt: skip
QUESTIONS = {
    "A": ("How does increasing temperature affect coherence?",
          "How does changing top-k affect repetition or diversity?",
          "Which settings produced the best outputs, and why? Do you agree with the rule?"),
    "B": ("Which failure mode do you find most telling, and in which texts do you see it?",
          "Why does this happen in a small, single-block GPT model?"),
    "C": ("Long-range coherence: how do model size and training data limit it?", "Semantic consistency?",
          "Real-world usability?"),
}  # fmt: skip


def write(
    folder: Path, run: str, model: TextModel, grid: Sequence[Setting], samples: Sequence[Sample],
    real: Sequence[dict[str, Any]], judge: Judge, study: dict[str, Any], broken: Sequence[str], text: str,
) -> None:  # fmt: skip
    """Write report.md, report.html and the charts as PNG into the folder."""
    blocks = list(_blocks(folder, run, model, grid, samples, real, judge, study, broken, text))
    write_text(folder / "report.md", "\n\n".join(as_markdown(block) for block in blocks) + "\n")
    page = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    varied = varied_controls(grid)
    data = [
        {"prompt": s["prompt"], "kind": s["kind"], "setting": label(s["settings"], varied), "seed": s["seed"],
         "words": s["words"], "failures": s["failures"], "copied": s["copied"], "metrics": _rounded(s["metrics"])}
        for s in samples
    ]  # fmt: skip
    write_text(folder / "report.html", page.substitute(
        title=html.escape(f"Exploring {run}"), body="\n".join(as_html(block) for block in blocks),
        data=json.dumps(data, ensure_ascii=False).replace("</", "<\\/").replace("<!--", "<\\u0021--"),
    ))  # fmt: skip


def _rounded(metrics: dict[str, float]) -> dict[str, float | None]:
    return {name: None if value is None or value != value else round(value, 4) for name, value in metrics.items()}


def _blocks(
    folder: Path, run: str, model: TextModel, grid: Sequence[Setting], samples: Sequence[Sample],
    real: Sequence[dict[str, Any]], judge: Judge, study: dict[str, Any], broken: Sequence[str], text: str,
) -> Iterator[Block]:  # fmt: skip
    summary, people, varied = summarize(samples, grid), summarize_real(real), varied_controls(grid)
    names = [label(setting, varied) for setting in grid]
    best = best_settings(summary)
    prompts = list(dict.fromkeys((sample["kind"], sample["prompt"]) for sample in samples))
    network = model.network
    parameters = sum(p.numel() for p in network.parameters())

    def chart(name: str, title: str, figure: Any) -> Chart:
        return Chart(name, title, charts.save(figure, folder / f"{name}.png"))

    def first_sample(setting: Setting, prompt: str) -> Sample | None:
        return next((s for s in samples if s["settings"] == setting and s["prompt"] == prompt), None)

    yield Heading(f"# Exploring {run}")
    yield Words(
        f"{parameters:,} parameters, {len(network.blocks)} block(s), {network.vocab_size:,} words, a context of"
        f" {network.max_length}. Trained on {text}. {len(samples):,} texts of up to {samples[0]['num_tokens']} words:"
        f" {len(prompts)} prompts, {len(grid)} settings (what is greedy, by temperature 0 or top_k 1, is one setting"
        f" and is written once a prompt). Beside them {len(real):,} real held-out texts: the words after the"
        f" first {CONTEXT} of each, cut to the same length. Square brackets hold 95 % bootstrap intervals over prompts"
        " and seeds. Every figure comes from samples.jsonl, held_out.jsonl or network.json in this folder."
    )
    for line in broken:
        yield Words(f"Left out: {line}")

    yield Heading("## Prompts and outputs (Q3)")
    extremes = [i for i in dict.fromkeys([best[0], *_extremes(grid, summary)])]
    yield Words(
        "All texts, with their settings and seeds, are in samples.jsonl. Here for each prompt the first seed's text at"
        f" {', '.join(names[i] for i in extremes)}. Marked are the failures found."
    )
    for kind, prompt in prompts:
        yield Heading(f"### {prompt} ({kind.replace('_', ' ')})")
        for i in extremes:
            if sample := first_sample(grid[i], prompt):
                yield Marked(sample, names[i])

    yield Heading("## Sampling behaviour (Q4 A)")
    yield Table(["measure", "what it is"], [[name, MEASURES[name]] for name in SHOWN])
    yield Table(
        ["setting", *SHOWN],
        [["real text", *(estimate_text(people[name]) for name in SHOWN)],
         *([names[i], *(estimate_text(summary[i][name]) for name in SHOWN)] for i in range(len(grid)) if summary[i])],
    )  # fmt: skip
    yield chart("behaviour", "Measures by setting, with their intervals; real text dotted",
                charts.behaviour(summary, grid, people))  # fmt: skip
    for control in varied:
        low, high, _ = effect(samples, control, "loss")
        yield Words(
            f"What {control} changes: the mean at {value_text(high)} less the mean at {value_text(low)}, over all other"
            " controls, prompt by prompt. An interval that holds 0 shows no difference."
        )
        yield Table(
            ["measure", f"{control}: {value_text(low)} to {value_text(high)}"],
            [[name, estimate_text(effect(samples, control, name)[2], sign=True)] for name in [*SHOWN, "failure: any"]],
        )
    yield Heading("### The best settings, by a stated rule")
    yield Words(f"{RULE} By it: {'; '.join(names[i] for i in best)}.")
    yield chart("trade_off", "Coherence against diversity: low is good in both",
                charts.trade_off(summary, grid, people, best))  # fmt: skip
    yield Words(f"What shows it: the first seed's texts at {names[best[0]]} stand under Prompts and outputs.")
    yield from map(Blank, QUESTIONS["A"])

    yield Heading("## Failure modes (Q4 B)")
    yield Words(
        "loop: words said again, from the onset; bracket: one closed and not opened, or not closed; grammar, nonsense:"
        " 6 words whose order, or whose company, n-grams of the training text find stranger than the worst of 19 in 20"
        " real texts; drift: a second half further from what stands before, in topic and in the words that return, and"
        " sentiment: 20 words further from those before in praise and blame, than in 19 of 20 real texts. A text too"
        " short for that (6 words, or 40) cannot be marked, and counts as free of it. The limits come from"
        f" {judge.calibrating} other held-out texts, so real text shows the rate of false alarms."
    )
    yield chart("failures", "Texts with a failure, by setting", charts.failures(summary, grid, people))
    planted = [
        [name, *(f"{shares[kind]:.0%}" for kind in KINDS)] for name, shares in study["planted"].items() if shares
    ]
    if planted:
        yield Words("Do the detectors find what is there? The share of real texts marked when this was put into them:")
        yield Table(["put into real text", *KINDS], planted)
    order = sorted((i for i in range(len(grid)) if summary[i]), key=lambda i: -summary[i]["failure: any"].mean)
    columns = [name.removeprefix("failure: ") for name in FAILURES]
    yield Table(
        ["setting, worst first", *columns],
        [["real text (false alarms)", *(_percent(people[name]) for name in FAILURES)],
         *([names[i], *(_percent(summary[i][name]) for name in FAILURES)] for i in order)],
    )  # fmt: skip
    for kind in KINDS:
        yield Heading(f"### {kind}: the worst examples")
        worst = _worst(samples, kind)
        if not worst:
            yield Words("No text was marked.")
        for sample in worst:
            yield Marked(sample, f"{label(sample['settings'], varied)}, seed {sample['seed']}", kind)

    yield Heading("## Why this network does it")
    yield Words(
        f"Loss of {study['windows']:,} held-out words when the network sees only the last words before them, and what"
        " the words beyond those would have helped. Then texts written with the context cut (temperature 0.8, top_k"
        " 20), judged by the whole network and the n-grams."
    )
    further = study["further"]
    yield Table(
        ["words of context", "loss", "words beyond help by", "n-gram loss of texts", "own loss", "repeated_4grams"],
        [[str(c), estimate_text(study["context"].get(c)), estimate_text(further.get(c)), *(
            estimate_text(study["cut"][c][name]) if c in study["cut"] else "" for name in ("ngram_loss", "loss",
                                                                                     "repeated_4grams"))]
         for c in sorted({*study["context"], *study["cut"]})],
    )  # fmt: skip
    yield chart("context", "What the words further back do", charts.context(study))
    if study["copying"]:
        yield Words(
            f"Does it go on with what stood there before? Loss of the second half of a sequence"
            f" ({study['copied_texts']} of them), when the first half is another and when it is the same: words drawn"
            " at random, and held-out text. A network with an induction head (two layers of attention at least; Olsson"
            " et al., arXiv 2209.11895) predicts the repeated half far better."
        )
        yield Table(["second half", "loss"], [[name.replace("first", "after another").replace("again", "after itself"),
                                               estimate_text(e)] for name, e in study["copying"].items()])  # fmt: skip
    shown = [("a text of the best setting", "attention_best", first_sample(grid[best[0]], prompts[0][1]))]
    looping = max(samples, key=lambda s: s["metrics"]["loop"])
    if looping["metrics"]["loop"]:
        shown.append(("the longest loop", "attention_loop", looping))
    for title, name, sample in shown:
        ids = [*sample["prompt_ids"], *sample["ids"]][: min(MAP_WORDS, network.max_length)]
        words = [model.tokenizer.id_to_token(id_) for id_ in ids]
        with torch.inference_mode():
            maps = attention_maps(network, ids).numpy()
        yield chart(name, f"Attention in {title}: each row is where that word looks (darker: more)",
                    charts.attention(maps, words))  # fmt: skip
    yield from map(Blank, QUESTIONS["B"])

    yield Heading("## Copying")
    most, most_real = (max(record["metrics"]["copied"] for record in records) for records in (samples, real))
    yield Words(
        "The longest run of words of each text that stands in the training text. Real held-out text shows how long"
        f" runs are by chance: {estimate_text(people['copied'])} words on average, {most_real} at most; here {most}."
    )
    rows: dict[str, list[str]] = {}
    for sample in samples:
        start, length = sample["copied"]["start"], sample["copied"]["length"]
        words = sample["words"][start : start + length]
        row = (
            len(set(words)),
            length,
            " ".join(words),
            sample["copied"]["document"],
            label(sample["settings"], varied),
        )
        rows.setdefault(" ".join(words), [str(cell) for cell in row])
    longest = sorted(rows.values(), key=lambda row: (-int(row[0]), -int(row[1])))[:COPIES]
    yield Table(["different words", "words", "the run", "training document", "setting"], longest)

    yield Heading("## Model size and data (Q4 C)")
    yield Words(
        f"One model was explored: {parameters:,} parameters. How far its coherence reaches is in the table of contexts"
        " above; how its topic and sentiment hold, in drift and sentiment by setting."
    )
    yield from map(Blank, QUESTIONS["C"])


def _extremes(grid: Sequence[Setting], summary: Sequence[dict[str, Estimate]]) -> list[int]:
    """The settings of lowest and highest n-gram loss that are not greedy, and the greedy one."""
    there = [i for i, estimates in enumerate(summary) if estimates]
    order = sorted((i for i in there if not is_greedy(grid[i])), key=lambda i: summary[i]["ngram_loss"].mean)
    return [*(i for i in there if is_greedy(grid[i])), *order[:1], *order[-1:]]


def _worst(samples: Sequence[Sample], kind: str) -> list[Sample]:
    """Texts with the most words marked as this kind, one a prompt."""

    def marked(sample: Sample) -> int:
        return sum(span["end"] - span["start"] for span in sample["failures"] if span["kind"] == kind)

    chosen: dict[str, Sample] = {}
    for sample in sorted(samples, key=marked, reverse=True):
        if marked(sample) and len(chosen) < WORST:
            chosen.setdefault(sample["prompt"], sample)
    return list(chosen.values())


def _percent(estimate: Estimate) -> str:
    return f"{estimate.mean:.1%} [{estimate.low:.0%}, {estimate.high:.0%}]"
