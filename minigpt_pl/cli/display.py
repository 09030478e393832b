"""Texts and records for people: in a terminal, coloured by probability, and as Markdown."""

import itertools
import math
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TextIO

from minigpt_pl.generation.text import Record, stream_words
from minigpt_pl.text_model import TextModel

# Lowest probability of a colour, its name, and its terminal code.
COLOURS = ((0.5, "green", 32), (0.1, "cyan", 36), (0.01, "yellow", 33), (0.0, "red", 31))
LEGEND = "probability of a word: " + ", ".join(
    f"{name} {lowest} or more" if lowest else f"{name} less" for lowest, name, _ in COLOURS
)


def has_colours(stream: TextIO) -> bool:
    """Whether the stream is a terminal with colours, and the user allows them (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def with_probability(word: str, probability: float) -> str:
    """The word, coloured by its probability. Without colours: word(0.12)."""
    if not has_colours(sys.stdout):
        return f"{word}({probability:.2g})"
    code = next(code for lowest, _, code in COLOURS if probability >= lowest)
    return f"\x1b[{code}m{word}\x1b[0m"


def print_words(model: TextModel, prompt: str, show_probabilities: bool, **controls: Any) -> None:
    """Print a text to standard output, word by word.

    Args:
        controls: arguments of `generate_text`. An error comes before any output.
    """
    words = stream_words(model, prompt, with_probabilities=show_probabilities, **controls)
    new = ((word, word if p is None else with_probability(word, p)) for word, p in words)
    try:
        for text in _wrap(itertools.chain(_printable_words(prompt), new)):
            print(text, end="", flush=True)
    finally:  # after Ctrl-C, too
        print(flush=True)


def as_text(record: Record, show_probabilities: bool) -> str:
    """The text, or the prompt and each new word with its probability."""
    shown = map(with_probability, record.tokens, record.probabilities) if show_probabilities else record.tokens
    new = zip(record.tokens, shown, strict=True)
    return "".join(_wrap(itertools.chain(_printable_words(record.prompt), new)))


def as_markdown(record: Record) -> str:
    """A section: the prompt as heading, the text as quotation, unknown words, settings and checkpoint."""
    lines = [f"## {_escape(' '.join(record.prompt.split()))}", "", f"> {_escape(' '.join(record.text.split()))}", ""]
    if record.unknown_words:
        lines += [f"Not in the vocabulary: {_escape(' '.join(record.unknown_words))}", ""]
    settings = settings_text(record.settings | {"seed": record.seed})
    return "\n".join([*lines, f"`` {settings} ``", "", f"`` {record.checkpoint} ``"])


def setting_text(value: Any) -> str:
    """A value as the command line takes it: null for None."""
    return "null" if value is None else str(value)


def settings_text(settings: Mapping[str, Any]) -> str:
    """Settings as the command line takes them: name=value ..."""
    return " ".join(f"{name}={setting_text(value)}" for name, value in settings.items())


def _printable_words(prompt: str) -> Iterator[tuple[str, str]]:
    """The words of the prompt, twice each, as `_wrap` takes them. In a terminal, marks replace control characters.

    A control character could move the cursor or change the terminal's settings.
    """
    if sys.stdout.isatty():
        prompt = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", prompt)
    return ((word, word) for word in re.findall(r"\s*\S+", prompt))


def _wrap(words: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Start a new line before a word that does not fit. A terminal would break the line inside the word.

    Args:
        words: each word with the space before it, first plain, then with its colour or probability.
    """
    columns = shutil.get_terminal_size().columns - 3 if sys.stdout.isatty() else math.inf  # 3: marks after the word
    column = 0
    for plain, shown in words:
        width = len(shown) if shown.endswith(")") else len(plain)  # a colour code has no width
        if plain.startswith(" ") and column + width > columns:
            yield "\n"
            shown, column = shown.replace(" ", "", 1), -1
        column = len(plain.rpartition("\n")[2]) if "\n" in plain else column + width
        yield shown


def _escape(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>#|!~&$])", r"\\\1", text)
