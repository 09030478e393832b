"""The blocks of a report, each with its Markdown and HTML form, from a template that has the report's sentences."""

import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jinja2  # comes with torch
from matplotlib.figure import Figure

from minigpt_pl.exploration.samples import Sample
from minigpt_pl.files import write_figure, write_text

QUESTION = "Question:"


@runtime_checkable
class Block(Protocol):
    def markdown(self) -> str: ...

    def html(self) -> str: ...


@dataclass
class Text:
    """A heading, if the text starts with `#`; a question with room for the answer after `QUESTION`; or a paragraph."""

    text: str

    def markdown(self) -> str:
        mark, text = self._split()
        if mark == QUESTION:
            return f"> **Your own reasoning.** {escape_markdown(text)}\n>\n> _(write here)_"
        return f"{mark} {escape_markdown(text)}".lstrip()

    def html(self) -> str:
        mark, text = self._split()
        if mark == QUESTION:
            question = html.escape(text)
            return f'<div class="question"><b>Your own reasoning.</b> {question}<div contenteditable></div></div>'
        tag = f"h{len(mark)}" if mark else "p"
        return f"<{tag}>{html.escape(text)}</{tag}>"

    def _split(self) -> tuple[str, str]:
        mark, _, text = self.text.partition(" ")
        return (mark, text) if mark == QUESTION or not mark.strip("#") else ("", self.text)


@dataclass
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        header, *rows = ([escape_markdown(cell) for cell in line] for line in (self.header, *self.rows))
        return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows))

    def html(self) -> str:
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in self.header)
        body = "\n".join("<tr>" + "".join(map(_html_cell, row)) + "</tr>" for row in self.rows)
        return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


@dataclass
class Chart:
    name: str
    title: str
    figure: Figure

    def markdown(self) -> str:
        return f"![{self.title}]({self.name}.png)"

    def html(self) -> str:
        file = StringIO()
        self.figure.savefig(file, format="svg", metadata={"Date": None})
        svg = file.getvalue()[file.getvalue().index("<svg") :]
        return f"<figure>{svg}<figcaption>{html.escape(self.title)}</figcaption></figure>"


@dataclass
class MarkedSample:
    """A sample with its failures marked: those of one kind, or all for None."""

    sample: Sample
    title: str
    kind: str | None = None

    def markdown(self) -> str:
        parts = [(escape_markdown(words), kinds) for words, kinds in self._parts()]
        text = " ".join(f"**{words}** _({', '.join(kinds)})_" if kinds else words for words, kinds in parts)
        return f"**{escape_markdown(self.title)}**: _{escape_markdown(self.sample['prompt'])}_ {text}"

    def html(self) -> str:
        parts = [
            f'<mark class="{kinds[0]}" title="{", ".join(kinds)}">{html.escape(words)}</mark>'
            if kinds
            else html.escape(words)
            for words, kinds in self._parts()
        ]
        title, prompt = html.escape(self.title), html.escape(self.sample["prompt"])
        return f'<p class="sample"><b>{title}</b> <i>{prompt}</i> {" ".join(parts)}</p>'

    def _parts(self) -> Iterator[tuple[str, list[str]]]:
        """The words in parts, each with the kinds of its failures."""
        words, spans = self.sample["words"], [s for s in self.sample["failures"] if self.kind in (None, s["kind"])]
        edges = sorted({0, len(words), *(e for s in spans for e in (s["start"], min(s["end"], len(words))))})
        for start, end in zip(edges, edges[1:], strict=False):
            yield " ".join(words[start:end]), sorted({s["kind"] for s in spans if s["start"] <= start < s["end"]})


def render(template: str, **values: Any) -> list[Block]:
    """The blocks of a template of this folder, filled with values.

    Blank lines separate the blocks. A block is a `Text`, or a value that is itself a block.
    """
    inserted: list[Block] = []

    def finalize(value: Any) -> Any:
        if isinstance(value, Block):
            inserted.append(value)
            return "\0"
        return " ".join(value.split()) if isinstance(value, str) else value

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, finalize=finalize)
    environment.filters["number"] = "{:,}".format
    texts = re.split(r"\n\s*\n", environment.get_template(template).render(values).strip())
    blocks = iter(inserted)
    return [next(blocks) if text.strip() == "\0" else Text(" ".join(text.split())) for text in texts]


def write_report(path: Path, blocks: Sequence[Block]) -> None:
    """Write a Markdown report, and its charts as PNG into the same folder."""
    for block in blocks:
        if isinstance(block, Chart):
            write_figure(path.with_name(f"{block.name}.png"), block.figure, dpi=130)
    write_text(path, "\n\n".join(block.markdown() for block in blocks) + "\n")


def escape_markdown(text: str) -> str:
    """One line of text without Markdown's effects. `_` inside words and `[...]` without a link have none."""
    marks = r"[\\`*<>#|~&$]|(?<!\w)_|_(?!\w)|\](?=[(\[:])"
    return re.sub(marks, r"\\\g<0>", " ".join(text.split()))


def _html_cell(text: str) -> str:
    """A table cell. A number, alone or with an interval, also becomes the sort key."""
    number = re.fullmatch(r"([-+]?[\d.]+)(%?)( \[.*\])?", text)
    if number is None:
        return f"<td>{html.escape(text)}</td>"
    value, percent, interval = number.groups(default="")
    return f'<td data-number="{value}">{value}{percent} <small>{interval}</small></td>'
