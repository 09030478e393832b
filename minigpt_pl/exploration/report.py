"""The report of an exploration: report.md to hand in, and report.html to browse without a network connection.

It states measurements. Their interpretation is left to the reader, with marked places for the answers.
"""

import html
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from minigpt_pl.exploration import charts
from minigpt_pl.exploration.markup import Block, Chart, Heading, MarkedSample, Paragraph, Question, Table, write_report
from minigpt_pl.exploration.metrics import FAILURES, METRICS, REAL_CONTEXT
from minigpt_pl.exploration.samples import Sample, Setting, is_greedy, label, value_text, varied_controls
from minigpt_pl.exploration.summary import RULE, best_settings, effect, estimate_text, summarize, summarize_real
from minigpt_pl.files import write_text
from minigpt_pl.measures.failures import KINDS
from minigpt_pl.measures.probes import attention_maps
from minigpt_pl.text_model import TextModel

NUM_EXAMPLES = 3  # examples of each failure
NUM_COPIES = 10  # longest copied runs
MAP_WORDS = 40  # words of a sample in an attention map
SHOWN = [name for name in METRICS if name not in ("distinct_1", "distinct_3", "grammar", "nonsense")]


@dataclass
class Exploration:
    """All results that the report shows.

    Attributes:
        run: name of the run.
        text: description of its training text.
        grid: the settings that have samples, which carry their metrics.
        failed: one line for each setting without samples.
        real: records of the real texts; num_calibration: texts that calibrated the detector.
        study: as from `study_network`.
    """

    run: str
    text: str
    model: TextModel
    grid: Sequence[Setting]
    samples: Sequence[Sample]
    failed: Sequence[str]
    real: Sequence[dict[str, Any]]
    num_calibration: int
    study: dict[str, Any]

    def __post_init__(self) -> None:
        self.summaries, self.real_summary = summarize(self.samples, self.grid), summarize_real(self.real)
        self.best = best_settings(self.summaries)
        self.varied = varied_controls(self.grid)
        self.names = [label(setting, self.varied) for setting in self.grid]
        self.prompts = list(dict.fromkeys((sample["kind"], sample["prompt"]) for sample in self.samples))
        self.num_parameters = sum(p.numel() for p in self.model.network.parameters())

    def first_sample(self, setting: Setting, prompt: str) -> Sample | None:
        return next((s for s in self.samples if s["settings"] == setting and s["prompt"] == prompt), None)


def report(exploration: Exploration, folder: Path) -> None:
    """Write report.md, report.html and the charts as PNG into the folder."""
    sections = (_introduction, _outputs, _behaviour, _failures, _network, _copying, _size)
    blocks = [block for section in sections for block in section(exploration)]
    write_report(folder / "report.md", blocks)
    data = [
        {name: sample[name] for name in ("prompt", "kind", "seed", "words", "failures", "copied")}
        | {"setting": label(sample["settings"], exploration.varied), "metrics": _rounded(sample["metrics"])}
        for sample in exploration.samples
    ]
    page = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(f"Exploring {exploration.run}"),
        body="\n".join(block.html() for block in blocks),
        data=json.dumps(data, ensure_ascii=False).replace("</", "<\\/").replace("<!--", "<\\u0021--"),
    )
    write_text(folder / "report.html", page)


def _rounded(metrics: dict[str, float | None]) -> dict[str, float | None]:
    return {name: None if v is None or math.isnan(v) else round(v, 4) for name, v in metrics.items()}


def _introduction(e: Exploration) -> Iterator[Block]:
    network = e.model.network
    yield Heading(1, f"Exploring {e.run}")
    yield Paragraph(
        f"{e.num_parameters:,} parameters, {len(network.blocks)} block(s), {network.vocab_size:,} words, a context of"
        f" {network.max_length}. Trained on {e.text}. {len(e.samples):,} texts of up to {e.samples[0]['num_tokens']}"
        f" words: {len(e.prompts)} prompts, {len(e.grid)} settings. All greedy settings (temperature 0 or top_k 1)"
        f" count as one, with one text per prompt. For comparison, {len(e.real):,} real held-out texts: the words after"
        f" the first {REAL_CONTEXT} of each, cut to the same length. Square brackets hold 95 % bootstrap intervals over"
        " prompts and random seeds. All figures come from samples.jsonl, held_out.jsonl and network.json."
    )
    for line in e.failed:
        yield Paragraph(f"Left out: {line}")


def _outputs(e: Exploration) -> Iterator[Block]:
    greedy = [i for i, setting in enumerate(e.grid) if is_greedy(setting)]
    by_loss = sorted(set(range(len(e.grid))) - set(greedy), key=lambda i: e.summaries[i]["ngram_loss"].mean)
    shown = list(dict.fromkeys([e.best[0], *greedy, *by_loss[:1], *by_loss[-1:]]))
    yield Heading(2, "Prompts and outputs (Q3)")
    yield Paragraph(
        "samples.jsonl has all texts with their settings and random seeds. This section has the first text of each"
        f" prompt at {', '.join(e.names[i] for i in shown)}. The failures found are marked."
    )
    for kind, prompt in e.prompts:
        yield Heading(3, f"{prompt} ({kind.replace('_', ' ')})")
        for i in shown:
            if sample := e.first_sample(e.grid[i], prompt):
                yield MarkedSample(sample, e.names[i])


def _behaviour(e: Exploration) -> Iterator[Block]:
    yield Heading(2, "Sampling behaviour (Q4 A)")
    yield Table(["measure", "meaning"], [[name, METRICS[name]] for name in SHOWN])
    summaries = [("real text", e.real_summary), *zip(e.names, e.summaries, strict=True)]
    rows = [[name, *(estimate_text(summary[metric]) for metric in SHOWN)] for name, summary in summaries]
    yield Table(["setting", *SHOWN], rows)
    title = "Measures by setting, with their intervals; dotted: real text"
    yield Chart("behaviour", title, charts.behaviour(e.summaries, e.grid, e.real_summary))
    for control in e.varied:
        effects = {name: effect(e.samples, control, name) for name in [*SHOWN, "failure: any"]}
        low, high, _ = effects["loss"]
        yield Paragraph(
            f"The effect of {control}: the mean at {value_text(high)} minus the mean at {value_text(low)}, over all"
            " other controls, prompt by prompt. If the interval contains 0, the figures show no difference."
        )
        rows = [[name, estimate_text(difference, sign=True)] for name, (*_, difference) in effects.items()]
        yield Table(["measure", f"{control}: {value_text(low)} to {value_text(high)}"], rows)
    yield Heading(3, "The best settings, by a stated rule")
    yield Paragraph(f"{RULE} The result: {'; '.join(e.names[i] for i in e.best)}.")
    title = "Coherence against diversity: low is good in both"
    yield Chart("trade_off", title, charts.trade_off(e.summaries, e.grid, e.real_summary, e.best))
    yield Paragraph(f"Examples: the texts at {e.names[e.best[0]]} under Prompts and outputs.")
    yield Question("How does increasing temperature affect coherence?")
    yield Question("How does changing top-k affect repetition or diversity?")
    yield Question("Which settings produced the best outputs, and why? Do you agree with the rule?")


def _failures(e: Exploration) -> Iterator[Block]:
    yield Heading(2, "Failure modes (Q4 B)")
    yield Paragraph(
        "loop: repeated words, from the first repeated word. bracket: closed but not opened, or not closed. grammar,"
        " nonsense: 6 words whose order (grammar) or combination (nonsense) has a higher n-gram loss than the worst 6"
        " words of 19 in 20 real texts. drift: the topic and the words of the second half differ more from the text"
        " before than in 19 of 20 real texts. sentiment: the praise or blame of 20 words differs more from the words"
        " before than in 19 of 20 real texts. A text that is too short for a detector (6 or 40 words) is never marked."
        f" The thresholds come from {e.num_calibration} other held-out texts, so the row of real text shows the rate of"
        " false alarms."
    )
    yield Chart("failures", "Texts with a failure, by setting", charts.failures(e.summaries, e.grid, e.real_summary))
    planted = {name: rates for name, rates in e.study["planted"].items() if rates}
    if planted:
        yield Paragraph("Test of the detectors: the share of real texts marked after a failure was put into them.")
        rows = [[name, *(f"{rates[kind]:.0%}" for kind in KINDS)] for name, rates in planted.items()]
        yield Table(["put into real text", *KINDS], rows)
    worst_first = sorted(zip(e.names, e.summaries, strict=True), key=lambda pair: -pair[1]["failure: any"].mean)
    summaries = [("real text (false alarms)", e.real_summary), *worst_first]
    rows = [[name, *(estimate_text(s[failure], percent=True) for failure in FAILURES)] for name, s in summaries]
    yield Table(["setting, worst first", *(name.removeprefix("failure: ") for name in FAILURES)], rows)
    for kind in KINDS:
        yield Heading(3, f"{kind}: the worst examples")
        examples = _worst(e.samples, kind)
        if not examples:
            yield Paragraph("No text was marked.")
        for sample in examples:
            yield MarkedSample(sample, f"{label(sample['settings'], e.varied)}, seed {sample['seed']}", kind)


def _network(e: Exploration) -> Iterator[Block]:
    study, network = e.study, e.model.network
    yield Heading(2, "Why this network does it")
    yield Paragraph(
        f"The loss of {study['windows']:,} held-out words if the network sees only the last words before them, and how"
        " much the words further back would lower it. Then texts that were generated with the shorter context"
        " (temperature 0.8, top_k 20), measured with the whole network and the n-grams."
    )
    metrics = ("ngram_loss", "loss", "repeated_4grams")
    rows = []
    for c in sorted({*study["context"], *study["cut"]}):
        of_texts = [estimate_text(study["cut"][c][name]) if c in study["cut"] else "" for name in metrics]
        rows.append([str(c), estimate_text(study["context"].get(c)), estimate_text(study["further"].get(c)), *of_texts])
    header = ["words of context", "loss", "gain from words further back", "n-gram loss of texts", "own loss"]
    yield Table([*header, "repeated_4grams"], rows)
    yield Chart("context", "The effect of the words further back", charts.context(study))
    if study["copying"]:
        yield Paragraph(
            "Does the network continue a sequence that occurred before? The loss of the second half of"
            f" {study['copied_texts']} sequences, after another first half and after the same one, for random words and"
            " for held-out text. A network with an induction head predicts the repeated half far better; this takes at"
            " least two layers of attention (Olsson et al., arXiv 2209.11895)."
        )
        names = [name.replace("first", "after another").replace("again", "after itself") for name in study["copying"]]
        losses = map(estimate_text, study["copying"].values())
        yield Table(["second half", "loss"], list(zip(names, losses, strict=True)))
    mapped = [("a text of the best setting", "attention_best", e.first_sample(e.grid[e.best[0]], e.prompts[0][1]))]
    looping = max(e.samples, key=lambda sample: sample["metrics"]["loop"])
    if looping["metrics"]["loop"]:
        mapped.append(("the longest loop", "attention_loop", looping))
    for title, name, sample in mapped:
        if sample is not None:
            ids = [*sample["prompt_ids"], *sample["ids"]][: min(MAP_WORDS, network.max_length)]
            words = [str(e.model.tokenizer.id_to_token(id_)) for id_ in ids]
            figure = charts.attention(attention_maps(network, ids).numpy(), words)
            yield Chart(name, f"Attention in {title}: each row is one word (darker: more attention)", figure)
    yield Question("Which failure mode do you find most telling, and in which texts do you see it?")
    yield Question("Why does this happen in a small, single-block GPT model?")


def _copying(e: Exploration) -> Iterator[Block]:
    yield Heading(2, "Copying")
    longest = max(sample["metrics"]["copied"] for sample in e.samples)
    longest_real = max((record["metrics"]["copied"] for record in e.real), default=0)
    yield Paragraph(
        "The longest run of words of each text that occurs in the training text. Real held-out text shows how long such"
        f" runs are by chance: {estimate_text(e.real_summary['copied'])} words on average, at most {longest_real}. In"
        f" the samples: at most {longest}."
    )
    runs: dict[str, tuple[int, int, str, int, str]] = {}
    for sample in e.samples:
        start, length, document = (sample["copied"][name] for name in ("start", "length", "document"))
        words = sample["words"][start : start + length]
        run, setting = " ".join(words), label(sample["settings"], e.varied)
        runs.setdefault(run, (len(set(words)), length, run, document, setting))
    rows = sorted(runs.values(), key=lambda row: (-row[0], -row[1]))[:NUM_COPIES]
    header = ["different words", "words", "the run", "training document", "setting"]
    yield Table(header, [list(map(str, row)) for row in rows])


def _size(e: Exploration) -> Iterator[Block]:
    yield Heading(2, "Model size and data (Q4 C)")
    yield Paragraph(
        f"This report is about one model with {e.num_parameters:,} parameters. The table of contexts above shows how"
        " far its coherence reaches. The figures of drift and sentiment show how well it keeps topic and sentiment."
    )
    yield Question("Long-range coherence: how do model size and training data limit it?")
    yield Question("Semantic consistency?")
    yield Question("Real-world usability?")


def _worst(samples: Sequence[Sample], kind: str) -> list[Sample]:
    """The texts with the most words marked as this kind, one per prompt."""

    def marked(sample: Sample) -> int:
        return sum(span["end"] - span["start"] for span in sample["failures"] if span["kind"] == kind)

    worst: dict[str, Sample] = {}
    for sample in sorted(filter(marked, samples), key=marked, reverse=True):
        worst.setdefault(sample["prompt"], sample)
    return list(worst.values())[:NUM_EXAMPLES]
