"""Texts and records for people to read: in a terminal, with the probability of each word, and as Markdown."""

import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, TextIO

from minigpt_pl.generation.text import Record, TextModel, stream_words
from minigpt_pl.measures.repetition import distinct, repeated

# The least probability of a colour, its name, and the terminal's code for it.
COLOURS = ((0.5, "green", 32), (0.1, "cyan", 36), (0.01, "yellow", 33), (0.0, "red", 31))
LEGEND = "probability of a word: " + ", ".join(f"{name} {least} or more" for least, name, _ in COLOURS)


def has_colours(stream: TextIO) -> bool:
    """Whether it is a terminal that shows colours, and the person has not asked for none (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def with_probability(word: str, probability: float) -> str:
    """The word in the colour of its probability; as word(0.12) where standard output has no colours."""
    if not has_colours(sys.stdout):
        return f"{word}({probability:.2g})"
    code = next(code for least, _, code in COLOURS if probability >= least)
    return f"\x1b[{code}m{word}\x1b[0m"


def print_words(model: TextModel, prompt: str, show: bool, **controls) -> None:
    """Print a text to standard output while it is written.

    Args:
        show: each word with its probability.
        controls: of `generate_text`, which gives the errors too; nothing is printed before they are found.
    """
    words = stream_words(model, prompt, with_probabilities=show, **controls)
    print(_asked(prompt), end="", flush=True)
    try:
        for word, probability in words:
            print(with_probability(word, probability) if show else word, end="", flush=True)
    finally:  # Ctrl-C, too, leaves a whole line behind
        print(flush=True)


def as_text(record: Record, show: bool) -> str:
    """The text; with `show` each new word with its probability."""
    words = map(with_probability, record.tokens, record.probabilities) if show else record.tokens
    return _asked(record.prompt) + "".join(words)


def as_markdown(record: Record) -> str:
    """A section: the prompt as its heading, the text as a quotation, where it is from, and what was unknown."""
    lines = [f"## {_escape(' '.join(record.prompt.split()))}", "", f"> {_escape(' '.join(record.text.split()))}", ""]
    if record.unknown_words:
        lines += [f"Not in the vocabulary: {_escape(' '.join(record.unknown_words))}", ""]
    settings = settings_text(record.settings | {"seed": record.seed})
    return "\n".join([*lines, f"`` {settings} ``", "", f"`` {record.checkpoint} ``"])


def setting_text(value: Any) -> str:
    """A setting's value as it is given: null for None."""
    return "null" if value is None else str(value)


def settings_text(settings: Mapping[str, Any]) -> str:
    """As they are given: name=value ..."""
    return " ".join(f"{name}={setting_text(value)}" for name, value in settings.items())


def measure(record: Record) -> dict[str, float]:
    """What the settings do to a text, as numbers; nan where it is too short for them."""
    return {
        "entropy": sum(record.entropies) / len(record.entropies) if record.entropies else math.nan,
        **{f"distinct-{n}": distinct(record.tokens, n) for n in (1, 2, 3)},
        "repeated-4": repeated(record.tokens),
    }


def as_json(record: Record, measures: Mapping[str, float]) -> str:
    """One line; the measures are left out if there are none, and null where they are nan."""
    values = asdict(record)
    if measures:
        values["measures"] = {name: None if math.isnan(value) else value for name, value in measures.items()}
    return json.dumps(values, ensure_ascii=False)


def as_table(rows: Sequence[tuple[Mapping[str, Any], Sequence[Mapping[str, float]]]]) -> str:
    """A Markdown table: for each of the settings the mean of each measure, texts that are too short for it left out.

    Args:
        rows: settings, and what `measure` gives for the texts that they made.
    """
    table = []
    for settings, measures in rows:
        columns = {name: [m[name] for m in measures if not math.isnan(m[name])] for name in measures[0]}
        means = {name: f"{sum(values) / len(values):.3f}" if values else "-" for name, values in columns.items()}
        table.append({name: setting_text(value) for name, value in settings.items()} | means)
    widths = {name: max(len(name), *(len(row[name]) for row in table)) for name in table[0]}
    head = {name: name for name in widths}, {name: "-" * (width - 1) + ":" for name, width in widths.items()}
    lines = [" | ".join(line[name].rjust(width) for name, width in widths.items()) for line in (*head, *table)]
    return "\n".join(f"| {line} |" for line in lines)


def _asked(prompt: str) -> str:
    """The prompt as it is written again; what would move a terminal's cursor, or worse, stands as a mark there."""
    prompt = prompt.rstrip()
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", prompt) if sys.stdout.isatty() else prompt


def _escape(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>#|!~&$])", r"\\\1", text)
