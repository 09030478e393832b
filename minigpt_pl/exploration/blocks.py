"""What a report is made of, and how each piece looks in Markdown and in HTML."""

import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from minigpt_pl.exploration.samples import Sample


@dataclass
class Heading:
    text: str


@dataclass
class Words:
    text: str


@dataclass
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class Chart:
    name: str
    title: str
    svg: str


@dataclass
class Marked:
    """A sample, with what was found marked on its words."""

    sample: Sample
    title: str
    only: str | None = None  # this kind; None: all


@dataclass
class Blank:
    question: str


Block = Heading | Words | Table | Chart | Marked | Blank


def estimate_text(estimate: Sequence[float] | None, sign: bool = False, digits: int | None = None) -> str:
    """An estimate with its interval; `digits` after the point, None: by its size."""
    if estimate is None or estimate[0] != estimate[0]:
        return "–"
    size = max(abs(number) for number in estimate)
    if digits is None:
        digits = 4 if size < 0.1 else 2 if size < 10 else 1
    mean, low, high = (f"{number:{'+' if sign else ''}.{digits}f}" for number in estimate)
    return f"{mean} [{low}, {high}]"


def as_markdown(block: Block) -> str:
    match block:
        case Heading(text) | Words(text):
            return text
        case Table(header, rows):
            lines = [header, ["---"] * len(header), *rows]
            return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        case Chart(name, title, _):
            return f"![{title}]({name}.png)"
        case Marked(sample, title, only):
            parts = [
                (" ".join(_escape_markdown(word) for word in words), kinds) for words, kinds in _stretches(sample, only)
            ]
            text = " ".join(f"**{words}** _({', '.join(kinds)})_" if kinds else words for words, kinds in parts)
            return f"**{title}**: _{_escape_markdown(sample['prompt'])}_ {text}"
        case Blank(question):
            return f"> **Your own reasoning.** {question}\n>\n> _(write here)_"


def _escape_markdown(text: str) -> str:
    return "".join(f"\\{mark}" if mark in "\\`*_[]<>#|" else mark for mark in text)


def as_html(block: Block) -> str:
    match block:
        case Heading(text):
            level, _, title = text.partition(" ")
            return f"<h{len(level)}>{html.escape(title)}</h{len(level)}>"
        case Words(text):
            return f"<p>{html.escape(text)}</p>"
        case Table(header, rows):
            head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
            body = "\n".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in rows)
            return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        case Chart(_, title, svg):
            return f"<figure>{svg}<figcaption>{html.escape(title)}</figcaption></figure>"
        case Marked(sample, title, only):
            text = " ".join(
                f'<mark class="{kinds[0]}" title="{", ".join(kinds)}">{html.escape(" ".join(words))}</mark>'
                if kinds else html.escape(" ".join(words))
                for words, kinds in _stretches(sample, only)
            )  # fmt: skip
            return f'<p class="sample"><b>{html.escape(title)}</b> <i>{html.escape(sample["prompt"])}</i> {text}</p>'
        case Blank(question):
            question = html.escape(question)
            return f'<div class="blank"><b>Your own reasoning.</b> {question}<div contenteditable></div></div>'


def _cell(text: str) -> str:
    """With the number to sort by, where the cell is one: alone, or with an interval after it."""
    number = re.fullmatch(r"([-+]?[\d.]+)(%?)( \[.*\])?", text)
    if number is None:
        return f"<td>{html.escape(text)}</td>"
    value, percent, interval = number.groups(default="")
    return f'<td data-number="{value}">{value}{percent} <small>{interval}</small></td>'


def _stretches(sample: Sample, only: str | None) -> Iterator[tuple[list[str], list[str]]]:
    """The words in stretches, each with the kinds of failure that mark it."""
    spans = [span for span in sample["failures"] if only in (None, span["kind"])]
    words = sample["words"]
    edges = sorted({0, len(words), *(e for span in spans for e in (span["start"], min(span["end"], len(words))))})
    for start, end in zip(edges, edges[1:], strict=False):
        yield words[start:end], sorted({s["kind"] for s in spans if s["start"] <= start < s["end"]})
