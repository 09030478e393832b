"""Shows texts and records to people: in a terminal, coloured by probability, or as Markdown."""

import itertools
import json
import math
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TextIO

from minigpt_pl.config import SampleConfig
from minigpt_pl.generation.prompts import encode_prompts, unknown_words
from minigpt_pl.generation.text import BATCH_TEXTS, Record, stream_records, stream_words
from minigpt_pl.measures.repetition import distinct, repeated
from minigpt_pl.notebook import COLOURS
from minigpt_pl.text_model import TextModel


def has_colours(stream: TextIO) -> bool:
    """Whether the stream is a terminal with colours, and the user allows them (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def with_probability(word: str, probability: float) -> str:
    """The word, coloured by its probability. Without colours: word(0.12)."""
    if not has_colours(sys.stdout):
        return f"{word}({probability:.2g})"
    code = next(code for lowest, _, code, _ in COLOURS if probability >= lowest)
    return f"\x1b[{code}m{word}\x1b[0m"


def print_texts(
    model: TextModel, prompts: Sequence[str], config: SampleConfig, combinations: Sequence[dict[str, Any]] = ({},)
) -> None:
    """Print the texts of each prompt with each combination of settings. With `compare`, also a table of measures.

    Unknown words and, for many texts, the progress go to standard error. Errors come before any output.
    """
    encode_prompts(model.tokenizer, prompts, "prompt" if config.prompts_file is None else "prompts_file: prompt")
    for number, prompt in enumerate(prompts, 1):
        if unknown := unknown_words(model.tokenizer, prompt):
            where = f" (prompt {number})" if len(prompts) > 1 else ""
            print(f"not in the vocabulary: {printable(' '.join(unknown), sys.stderr)}{where}", file=sys.stderr)
    show = config.show is not None
    if len(prompts) == config.num_samples == 1 and config.format == "text" and config.compare is None:
        return print_words(model, prompts[0], show, seed=config.seed, **config.arguments())
    seed = secrets.randbelow(2**31 - config.num_samples) if config.seed is None else config.seed
    with_probabilities = show or config.format == "jsonl" or config.compare is not None
    streams = [  # an error in any combination comes before the first text
        stream_records(model, prompts, seed, config.num_samples, with_probabilities, **(config.arguments() | settings))
        for settings in combinations
    ]
    total = len(combinations) * len(prompts) * config.num_samples
    all_measures: list[list[dict[str, float]]] = [[] for _ in combinations]
    separator, done, start = "", 0, time.monotonic()
    for settings, records, measures in zip(combinations, streams, all_measures, strict=True):
        for record in records:
            if config.compare is not None:
                measures.append(_measure(record))
            done += 1
            if done % BATCH_TEXTS == 0:
                left = (time.monotonic() - start) * (total - done) / done
                print(f"{done:,} of {total:,} texts, {left:,.0f} s left", file=sys.stderr)
            if config.format == "jsonl":
                values = asdict(record)
                if measures:  # JSON has no NaN, so write null
                    values["measures"] = {name: None if math.isnan(v) else v for name, v in measures[-1].items()}
                print(printable(json.dumps(values, ensure_ascii=False), sys.stdout))
                continue
            title = f"[{settings_text(settings)}]\n" if settings else ""
            markdown = config.format == "markdown"
            text = printable(as_markdown(record), sys.stdout) if markdown else as_text(record, show)
            print(separator + printable(title, sys.stdout) + text)
            separator = "\n"
    if config.compare is not None and config.format != "jsonl":
        print()
        _print_table(combinations, all_measures)


def _measure(record: Record) -> dict[str, float]:
    """Measures of a text; NaN if the text is too short for a measure."""
    return {
        "entropy": sum(record.entropies) / len(record.entropies) if record.entropies else math.nan,
        **{f"distinct-{n}": distinct(record.tokens, n) for n in (1, 2, 3)},
        "repeated-4": repeated(record.tokens),
    }


def _print_table(combinations: Sequence[Mapping[str, Any]], all_measures: Sequence[list[dict[str, float]]]) -> None:
    """Print a Markdown table: the mean of each measure for each combination. Leave out texts that are too short."""
    rows = [[*combinations[0], *all_measures[0][0]]]
    for settings, measures in zip(combinations, all_measures, strict=True):
        columns = [[m[name] for m in measures if not math.isnan(m[name])] for name in measures[0]]
        means = [f"{sum(values) / len(values):.3f}" if values else "-" for values in columns]
        rows.append([*map(setting_text, settings.values()), *means])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * (width - 1) + ":" for width in widths])
    for row in rows:
        print("| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |")


def print_words(model: TextModel, prompt: str, show_probabilities: bool, **controls: Any) -> None:
    """Print a text to standard output, word by word.

    Args:
        controls: arguments of `generate_text`. An error comes before any output.
    """
    words = stream_words(model, prompt, with_probabilities=show_probabilities, **controls)
    try:
        for text in _wrap(itertools.chain(_words_of(prompt), words)):
            print(text, end="", flush=True)
    finally:  # also after Ctrl-C
        print(flush=True)


def as_text(record: Record, show_probabilities: bool) -> str:
    """The text. With `show_probabilities`, each new word has its probability."""
    probabilities = record.probabilities if show_probabilities else [None] * len(record.tokens)
    new = zip(record.tokens, probabilities, strict=True)
    return "".join(_wrap(itertools.chain(_words_of(record.prompt), new)))


def as_markdown(record: Record) -> str:
    """A Markdown section: the prompt as heading, the text as quotation, unknown words, settings and checkpoint."""
    paragraphs = [f"> {_escape(' '.join(line.split()))}" for line in record.text.splitlines() if line.strip()]
    lines = [f"## {_escape(' '.join(record.prompt.split()))}", "", "\n>\n".join(paragraphs), ""]
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


def printable(text: str, stream: TextIO) -> str:
    """The text. In a terminal, marks replace control characters, which could move the cursor."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text) if stream.isatty() else text


def _words_of(prompt: str) -> Iterator[tuple[str, None]]:
    return ((word, None) for word in re.findall(r"\s*\S+", prompt))


def _wrap(words: Iterable[tuple[str, float | None]]) -> Iterator[str]:
    """Start a new line before a word that does not fit. A terminal would break the line inside the word.

    Args:
        words: each word with the space before it, and the probability to show, if any.
    """
    columns = shutil.get_terminal_size().columns - 3 if sys.stdout.isatty() else math.inf  # 3 for marks after the word
    column = 0
    for word, probability in words:
        plain = printable(word, sys.stdout)
        shown = plain if probability is None else with_probability(plain, probability)
        width = len(shown) if shown.endswith(")") else len(plain)  # a colour code has no width
        if plain.startswith(" ") and column + width > columns:
            yield "\n"
            shown, column = shown.replace(" ", "", 1), -1
        column = len(plain.rpartition("\n")[2]) if "\n" in plain else column + width
        yield shown


def _escape(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>#|!~&$])", r"\\\1", text)
