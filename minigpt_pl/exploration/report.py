"""The report of an exploration: report.md to hand in, and report.html to browse, also without a network connection.

It contains measurements, and places where the student writes an interpretation. The sentences are in report.jinja. The
functions below prepare the tables and examples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from minigpt_pl.exploration import charts
from minigpt_pl.exploration.findings import MIN_GAIN, five_findings
from minigpt_pl.exploration.markup import Link, MarkedSample, NamedText, render, write_html, write_markdown
from minigpt_pl.exploration.metrics import FAILURES, METRICS, REAL_CONTEXT, REPETITION, TOPIC, USUAL
from minigpt_pl.exploration.samples import Sample, Setting, is_greedy, label, value_text, varied_controls
from minigpt_pl.exploration.summary import (
    bootstrap,
    by_prompt,
    effect,
    estimate_text,
    none_last,
    ranked_settings,
    summarize,
    summarize_real,
)
from minigpt_pl.generation.text import decode_continuation
from minigpt_pl.measures.failures import KINDS, MAX_OPEN
from minigpt_pl.measures.probes import attention_maps
from minigpt_pl.measures.repetition import distinct, longest_loop, repeated
from minigpt_pl.text_model import TextModel

NUM_EXAMPLES = 3  # examples of each failure
NUM_COPIES = 10  # longest copied sequences
MAP_WORDS = 24  # words in an attention map
TABLES = {table: [n for n in METRICS if METRICS[n].table == table] for table in (USUAL, REPETITION, TOPIC)}
CUT = ("ngram_loss", "loss", "repeated_4grams")  # of texts that were generated with a short context
ANY_FAILURE = "failure: any"
LENGTH_MEASURES = ("repeated_4grams", "distinct_2", "loop")
COPYING = {  # the losses of `probes.induction_losses`, by the half that is predicted
    "random, first": "random words, another half",
    "random, again": "random words, the same half again",
    "real, first": "real text, another half",
    "real, again": "real text, the same half again",
}


@dataclass
class Exploration:
    """All results that the report shows."""

    run_name: str
    training_text: str  # its description
    model: TextModel
    grid: Sequence[Setting]  # the settings that have samples
    samples: Sequence[Sample]  # with metrics
    failed: Sequence[str]  # one line for each setting without samples
    real_records: Sequence[dict[str, Any]]  # records of the real texts
    num_calibration: int  # other real texts, which calibrated the detector
    network_study: dict[str, Any]  # the result of `study_network`

    def __post_init__(self) -> None:
        self.summaries, self.real_summary = summarize(self.samples, self.grid), summarize_real(self.real_records)
        self.ranking = ranked_settings(self.summaries, self.real_summary)
        self.varied = varied_controls(self.grid)
        self.names = [label(setting, self.varied) for setting in self.grid]
        self.prompts = list(dict.fromkeys((sample["kind"], sample["prompt"]) for sample in self.samples))
        self.num_parameters = sum(p.numel() for p in self.model.network.parameters())
        self._token = cache(lambda id_: decode_continuation(self.model.tokenizer, [id_]))

    def first_sample(self, setting: int, prompt: str) -> Sample | None:
        return next((s for s in self.samples if s["settings"] == self.grid[setting] and s["prompt"] == prompt), None)

    def tokens(self, sample: Sample) -> list[str]:
        """The words after the prompt. Most start with a space."""
        return [self._token(id_) for id_ in sample["ids"]]

    def marked(self, sample: Sample, title: str, kind: str | None = None) -> MarkedSample:
        """A sample with its failures of one kind, or of all kinds if `kind` is None."""
        failures = [span for span in sample["failures"] if kind in (None, span["kind"])]
        return MarkedSample(title, sample["prompt"], self.tokens(sample), failures)


def report(results: Exploration, folder: Path) -> None:
    """Write report.md, report.html and the charts as PNG into the folder."""
    values = {"results": results, "charts": charts, "real_context": REAL_CONTEXT, "max_open": MAX_OPEN}
    for section in (_findings, _controls, _length, _outputs, _behaviour, _failures, _network, _copying):
        values |= section(results)
    blocks = render("report.jinja", **values)
    write_markdown(folder / "report.md", blocks)
    texts = [NamedText(label(s["settings"], results.varied), results.tokens(s), s) for s in results.samples]
    write_html(folder / "report.html", f"Exploring {results.run_name}", blocks, "setting", texts)


def _findings(results: Exploration) -> dict[str, Any]:
    measured = results.real_records, results.real_summary, results.network_study
    return {"findings": five_findings(results.samples, results.varied, *measured), "min_gain": MIN_GAIN}


def _controls(results: Exploration) -> dict[str, Any]:
    """Texts of one prompt and seed. One control changes, the others stay as in the best setting that draws words."""
    sampled = [i for i in results.ranking if not is_greedy(results.grid[i])]
    prompt, base = results.prompts[0][1], results.grid[sampled[0]] if sampled else {}
    texts = {}
    for control in results.varied:
        changed = [i for i, s in enumerate(results.grid) if s | {control: None} == base | {control: None}]
        samples = [(results.first_sample(i, prompt), results.names[i]) for i in changed]
        texts[control] = [results.marked(text, name) for text, name in samples if text]
    return {"control_texts": texts}


def _length(results: Exploration) -> dict[str, Any]:
    """Measures of the beginnings of all texts. A shorter text is the beginning of a longer one with the same seed."""
    whole = results.samples[0]["num_tokens"]
    rows = []
    for length in sorted({max(whole // 4, 1), max(whole // 2, 1), whole}):
        cut = [
            {
                "prompt": sample["prompt"],
                "failures": [span for span in sample["failures"] if span["end"] <= length],
                "metrics": {
                    "repeated_4grams": repeated(sample["ids"][:length], 4),
                    "distinct_2": distinct(sample["ids"][:length], 2),
                    "loop": longest_loop(sample["words"][:length]).length,
                },
            }
            for sample in results.samples
        ]
        estimates = [estimate_text(bootstrap(by_prompt(cut, name))) for name in LENGTH_MEASURES]
        failing = estimate_text(bootstrap(by_prompt(cut, ANY_FAILURE)), percent=True)
        rows.append([str(length), *estimates, failing])
    return {"lengths": rows, "length_measures": [METRICS[name].label for name in LENGTH_MEASURES]}


def _outputs(results: Exploration) -> dict[str, Any]:
    greedy = [i for i, setting in enumerate(results.grid) if is_greedy(setting)]
    by_loss = sorted(set(range(len(results.grid))) - set(greedy), key=lambda i: results.summaries[i]["ngram_loss"].mean)
    reasons = [(results.ranking[0], "first of the ranking below"), *((i, "no random draw") for i in greedy)]
    reasons += [(i, "most usual words") for i in by_loss[:1]] + [(i, "most unusual words") for i in by_loss[-1:]]
    shown = list(dict.fromkeys(i for i, _ in reasons))
    outputs = {}
    for kind, prompt in results.prompts:
        samples = [(results.first_sample(i, prompt), results.names[i]) for i in shown]
        outputs[f"{prompt} ({kind.replace('_', ' ')})"] = [results.marked(text, name) for text, name in samples if text]
    kinds = []
    for kind in dict.fromkeys(kind for kind, _ in results.prompts):
        of_kind = [sample for sample in results.samples if sample["kind"] == kind]
        estimates = [bootstrap(by_prompt(of_kind, name)) for name in ("ngram_loss", "repeated_4grams", ANY_FAILURE)]
        figures = [estimate_text(estimate, percent=i == 2) for i, estimate in enumerate(estimates)]
        kinds.append([kind.replace("_", " "), str(len({sample["prompt"] for sample in of_kind})), *figures])
    names = [f"{results.names[i]} ({', '.join(reason for j, reason in reasons if j == i)})" for i in shown]
    return {"shown": names, "outputs": outputs, "by_prompt": _prompt_rows(results.samples), "prompt_kinds": kinds}


def _prompt_rows(samples: Sequence[Sample]) -> list[list[str]]:
    """For each prompt: its text, kind and unknown words, the number of its texts, and of those with a failure."""
    rows = []
    for prompt, first in {sample["prompt"]: sample for sample in samples}.items():
        failures = [sample["failures"] for sample in samples if sample["prompt"] == prompt]
        texts = [str(len(failures)), str(sum(map(bool, failures)))]
        rows.append([prompt, first["kind"].replace("_", " "), ", ".join(first["unknown_in_prompt"]) or "–", *texts])
    return rows


def _behaviour(results: Exploration) -> dict[str, Any]:
    summaries = {"real text": results.real_summary, **dict(zip(results.names, results.summaries, strict=True))}
    effects, tables = [], {}
    for control in results.varied:
        names = {name: METRICS[name].label for table in TABLES.values() for name in table}
        names |= {ANY_FAILURE: "texts with a failure"}
        others = [other for other in results.varied if other != control]
        texts_of = {"all texts": results.samples}
        if len(others) == 1:  # also the effect at each value of the other control
            for value in sorted({setting[others[0]] for setting in results.grid}, key=none_last):
                of_value = [sample for sample in results.samples if sample["settings"][others[0]] == value]
                if len({s["settings"][control] for s in of_value if not is_greedy(s["settings"])}) > 1:
                    texts_of[f"{others[0]}={value_text(value)}"] = of_value
        low, high = map(value_text, effect(results.samples, control, "loss")[:2])
        rows = [
            [label, *(estimate_text(effect(texts, control, name)[2], sign=True) for texts in texts_of.values())]
            for name, label in names.items()
        ]
        effects.append((control, low, high, list(texts_of), rows))
    for title, names_ in TABLES.items():
        measures = [METRICS[name] for name in names_]
        meanings = [
            [m.label, m.meaning, m.direction, Link("definition", m.source) if m.source else "–"] for m in measures
        ]
        rows = [[name, *(estimate_text(summary[metric]) for metric in names_)] for name, summary in summaries.items()]
        tables[title] = [m.label for m in measures], meanings, rows
    return {"tables": tables, "effects": effects, "ranking": [results.names[i] for i in results.ranking]}


def _failures(results: Exploration) -> dict[str, Any]:
    found = results.network_study["planted"]
    planted = [[name, *(f"{rates[kind]:.0%}" for kind in KINDS)] for name, rates in found.items() if rates]
    settings = zip(results.names, results.summaries, strict=True)
    worst_first = sorted(settings, key=lambda pair: -pair[1][ANY_FAILURE].mean)
    all_texts = {failure: bootstrap(by_prompt(results.samples, failure)) for failure in FAILURES}
    summaries = [("real text (false alarms)", results.real_summary), ("all your texts", all_texts), *worst_first]
    rows = [[name, *(estimate_text(s[failure], percent=True) for failure in FAILURES)] for name, s in summaries]
    examples = {
        kind: [
            results.marked(sample, f"{label(sample['settings'], results.varied)}, seed {sample['seed']}", kind)
            for sample in _worst(results.samples, kind)
        ]
        for kind in KINDS
    }
    return {"kinds": list(KINDS), "planted": planted, "worst_first": rows, "examples": examples}


def _worst(samples: Sequence[Sample], kind: str) -> list[Sample]:
    """The texts with the most words of this kind of failure. All have different prompts and different words."""

    def marked(sample: Sample) -> int:
        return sum(span["end"] - span["start"] for span in sample["failures"] if span["kind"] == kind)

    worst: list[Sample] = []
    for sample in sorted(filter(marked, samples), key=marked, reverse=True):
        if all(sample["prompt"] != other["prompt"] and sample["ids"] != other["ids"] for other in worst):
            worst.append(sample)
    return worst[:NUM_EXAMPLES]


def _network(results: Exploration) -> dict[str, Any]:
    network_study = results.network_study
    rows = []
    for c in sorted({*network_study["context"], *network_study["cut"]}):
        of_texts = network_study["cut"].get(c, {})
        estimates = [network_study["context"].get(c), network_study["further"].get(c)]
        estimates += [of_texts.get(name) for name in CUT]
        rows.append([str(c), *map(estimate_text, estimates)])
    losses = [[COPYING[name], estimate_text(loss)] for name, loss in network_study["copying"].items()]
    model, best = results.model, results.first_sample(results.ranking[0], results.prompts[0][1])
    looping = max(results.samples, key=lambda sample: sample["metrics"]["loop"])
    onset = longest_loop([str(model.tokenizer.id_to_token(id_)) for id_ in looping["ids"]]).onset
    mapped = {}
    if best:
        mapped["attention_best"] = "a text of the first setting in the ranking", [*best["prompt_ids"], *best["ids"]]
    if looping["metrics"]["loop"]:
        mapped["attention_loop"] = "the longest phrase repeated in a row", looping["ids"][onset:]
    attention = []
    for name, (title, ids) in mapped.items():
        ids = ids[: min(MAP_WORDS, model.network.max_length)]
        words = [str(model.tokenizer.id_to_token(id_)) for id_ in ids]
        attention.append((name, title, charts.attention(attention_maps(model.network, ids).numpy(), words)))
    of_texts = [f"{METRICS[name].label} of texts" for name in CUT]
    return {"contexts": rows, "copying": losses, "attention": attention, "of_texts": of_texts}


def _copying(results: Exploration) -> dict[str, Any]:
    phrases: dict[str, tuple[int, int, str, int, str]] = {}
    for sample in results.samples:
        start, length, document = (sample["copied"][name] for name in ("start", "length", "document"))
        words = results.tokens(sample)[start : start + length]
        phrase, setting = "".join(words).lstrip(), label(sample["settings"], results.varied)
        phrases.setdefault(phrase, (len(set(words)), length, phrase, document, setting))
    rows = sorted(phrases.values(), key=lambda row: (-row[0], -row[1]))[:NUM_COPIES]
    return {
        "copies": [list(map(str, row)) for row in rows],
        "copied_on_average": estimate_text(results.real_summary["copied"]),
        "longest": max(sample["metrics"]["copied"] for sample in results.samples),
        "longest_real": max((record["metrics"]["copied"] for record in results.real_records), default=0),
    }
