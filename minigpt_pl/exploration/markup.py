"""The blocks of a report. Its sentences are in report.jinja and compare.jinja, its HTML is in page.html."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from matplotlib.figure import Figure

from minigpt_pl.exploration.charts import INK, Panel
from minigpt_pl.exploration.metrics import METRICS
from minigpt_pl.exploration.samples import Sample, without_nan
from minigpt_pl.files import write_figure, write_text
from minigpt_pl.measures.failures import KINDS

QUESTION = "Question:"
LOADER = jinja2.FileSystemLoader(Path(__file__).parent)


@dataclass
class Text:
    """A heading if it starts with `#`, a question with room for an answer if with `QUESTION`, a command if with
    `python -m`, else a paragraph.
    """

    text: str

    def __post_init__(self) -> None:
        mark, _, text = self.text.partition(" ")
        is_marked = mark == QUESTION or not mark.strip("#")
        self.mark, self.text = (mark, text) if is_marked else ("", self.text)
        self.is_command = self.text.startswith("python -m ")
        self.anchor = re.sub(r"\W+", "-", self.text.lower()).strip("-")  # of a heading

    def markdown(self) -> str:
        if self.is_command:
            return f"```bash\n{self.text}\n```"
        text = escape_markdown(self.text)
        if self.mark == QUESTION:
            return f"> **Your own reasoning.** {text}\n>\n> _(write here)_"
        return f"{self.mark} {text}".lstrip()


class Link(NamedTuple):
    """A table cell that leads to another page."""

    text: str
    url: str


@dataclass
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence[str | Link]]

    def markdown(self) -> str:
        header, *rows = ([_cell(cell) for cell in line] for line in (self.header, *self.rows))
        return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows))


def _cell(cell: str | Link) -> str:
    return f"[{escape_markdown(cell.text)}]({cell.url})" if isinstance(cell, Link) else escape_markdown(cell)


@dataclass
class Steps:
    """A numbered list."""

    items: Sequence[tuple[str, str]]  # title and text of each

    def markdown(self) -> str:
        items = ([escape_markdown(part) for part in item] for item in self.items)
        return "\n".join(f"{i}. **{title}.** {text}" for i, (title, text) in enumerate(items, start=1))


@dataclass
class Chart:
    """Panels: side by side in one PNG for Markdown, and as one SVG each for HTML, where a phone shows one per row."""

    name: str
    title: str
    panels: Sequence[Panel]
    size: tuple[float, float] = (3.4, 2.6)  # of a panel, in inches

    def markdown(self) -> str:
        return f"![{self.title}]({self.name}.png)"

    def figure(self) -> Figure:
        columns = min(3, len(self.panels))
        rows = math.ceil(len(self.panels) / columns)
        figure = Figure(figsize=(columns * self.size[0], rows * self.size[1]), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flat
        for panel, axis in zip(self.panels, axes, strict=False):
            panel(axis)
        for axis in [*axes][len(self.panels) :]:
            axis.remove()
        if legend := _legend(figure):
            per_panel = 2 if max(map(len, legend)) < 18 else 1
            ncols = per_panel * columns
            figure.legend(legend.values(), legend, loc="outside lower center", ncols=ncols, frameon=False)
        return figure

    def svgs(self) -> list[str]:
        figures = [Figure(figsize=self.size, layout="constrained") for _ in self.panels]
        for figure, panel in zip(figures, self.panels, strict=True):
            panel(figure.subplots())
        if legend := {name: line for figure in reversed(figures) for name, line in _legend(figure).items()}:
            columns = 2 if max(map(len, legend)) < 18 else 1
            figure = Figure(figsize=(self.size[0], 0.2 + 0.2 * math.ceil(len(legend) / columns)))
            figure.legend(legend.values(), legend, loc="center left", ncols=columns, frameon=False)
            figures.insert(0, figure)
        return list(map(self._svg, figures))

    def _svg(self, figure: Figure) -> str:
        file = StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        svg = file.getvalue()[file.getvalue().index("<svg") :].replace(INK, "currentColor")
        svg = re.sub(r' id="[a-zA-Z.]*\d*_\d+"', "", svg)  # matplotlib numbers the parts of each figure from 1
        title = " ".join(axis.get_title() for axis in figure.axes) or ("legend" if not figure.axes else self.title)
        return svg.replace("<svg", f'<svg role="img" aria-label="{self.title}: {title}"', 1)


def _legend(figure: Figure) -> dict[str, Any]:
    """The labels of all axes that have no legend themselves, with a line or marker for each."""
    axes = [axis for axis in figure.axes if axis.get_legend() is None]
    handles = (zip(*reversed(axis.get_legend_handles_labels()), strict=True) for axis in axes)
    return {name: line for pairs in handles for name, line in pairs}


@dataclass
class MarkedSample:
    """A text with its failures marked."""

    title: str
    prompt: str
    tokens: Sequence[str]  # the words after the prompt; most start with a space
    failures: Sequence[dict[str, Any]]  # spans as in samples.jsonl

    def markdown(self) -> str:
        text = f"**{escape_markdown(self.title)}**: _{escape_markdown(self.prompt)}_"
        for space, words, kinds in self.parts():
            # <b> instead of **, which Markdown ignores between a word and a punctuation mark.
            marked = f"<b>{escape_markdown(words)}</b> _({', '.join(kinds)})_" if kinds else escape_markdown(words)
            text += space + marked
        return text

    def parts(self) -> Iterator[tuple[str, str, list[str]]]:
        """Split the text where a failure starts or ends: (space before the part, part, kinds of its failures)."""
        ends = (end for span in self.failures for end in (span["start"], min(span["end"], len(self.tokens))))
        for start, end in pairwise(sorted({0, len(self.tokens), *ends})):
            text = "".join(self.tokens[start:end])
            kinds = {span["kind"] for span in self.failures if span["start"] <= start < span["end"]}
            yield " " * text.startswith(" "), text.removeprefix(" "), sorted(kinds)


class NamedText(NamedTuple):
    """A text for the script of page.html."""

    name: str  # of its setting or run
    tokens: Sequence[str]  # the words after the prompt; most start with a space
    sample: Sample  # with metrics


Block = Text | Table | Steps | Chart | MarkedSample


def render(template: str, **values: Any) -> list[Block]:
    """Fill a template, and split it at blank lines into texts and blocks such as `{{ Table(...) }}`."""
    inserted: list[Block] = []

    def finalize(value: Any) -> Any:
        if isinstance(value, Block):
            inserted.append(value)
            return "\0"
        return " ".join(value.split()) if isinstance(value, str) else value

    environment = jinja2.Environment(loader=LOADER, undefined=jinja2.StrictUndefined, finalize=finalize)
    environment.filters["number"] = "{:,}".format
    texts = re.split(
        r"\n\s*\n", environment.get_template(template).render(values, Table=Table, Steps=Steps, Chart=Chart).strip()
    )
    blocks = iter(inserted)
    return [next(blocks) if text.strip() == "\0" else Text(" ".join(text.split())) for text in texts]


def write_markdown(path: Path, blocks: Sequence[Block]) -> None:
    """Write a Markdown report, and its charts as PNG into the same folder."""
    for block in blocks:
        if isinstance(block, Chart):
            write_figure(path.with_name(f"{block.name}.png"), block.figure(), dpi=130)
    write_text(path, "\n\n".join(block.markdown() for block in blocks) + "\n")


def write_html(path: Path, title: str, blocks: Sequence[Block], column: str, texts: Sequence[NamedText]) -> None:
    """Fill page.html with the blocks and with the texts for its script, and write it.

    Args:
        column: what the names of the texts are: "setting" or "run".
        texts: all texts.
    """
    shown = {name: measure.label for name, measure in METRICS.items() if measure.table}  # a table explains each
    samples = [
        {key: text.sample[key] for key in ("prompt", "seed", "failures")}
        | {"name": text.name, "tokens": text.tokens}
        | {"metrics": without_nan([v and round(v, 4) for v in map(text.sample["metrics"].get, shown)])}
        for text in texts
    ]
    data = {"column": column, "labels": [*shown.values()], "samples": samples}
    environment = jinja2.Environment(loader=LOADER, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    # A number in a table cell, with % and interval if it has them. The table is sorted by the number.
    number = re.compile(r"([-+]?[\d.]+)(%?)( \[.*\])?")
    values = {"title": title, "blocks": blocks, "data": data, "kinds": KINDS, "match_number": number.fullmatch}
    write_text(path, environment.get_template("page.html").render(values) + "\n")


def escape_markdown(text: str) -> str:
    """Put text on one line and escape the marks of Markdown. `_` inside a word and `[...]` alone are no marks."""
    marks = r"[\\`*<>#|~&$]|(?<!\w)_|_(?!\w)|\](?=[(\[:])"
    return re.sub(marks, r"\\\g<0>", " ".join(text.split()))
