"""How models, texts and words look in a notebook, and the colours of probabilities there and in a terminal."""

import html
from collections.abc import Iterable, Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

from minigpt_pl.errors import InputError

# Lowest probability of a colour, its name, its terminal code, and its background in a notebook, light or dark.
COLOURS = (
    (0.5, "green", 32, "#2ca02c55"),
    (0.1, "cyan", 36, "#17becf55"),
    (0.01, "yellow", 33, "#dfc50055"),
    (0.0, "red", 31, "#d6272855"),
)
LEGEND = "probability of a word: " + ", ".join(
    f"{name} {lowest} or more" if lowest else f"{name} less" for lowest, name, *_ in COLOURS
)


def table(rows: Mapping[str, Any]) -> str:
    """An HTML table with two columns."""
    texts = [(html.escape(name), html.escape(str(value))) for name, value in rows.items()]
    return f"<table>{''.join(f'<tr><th>{name}</th><td>{value}</td></tr>' for name, value in texts)}</table>"


def coloured(text: str, probability: float | None, rank: int | None) -> str:
    """A word as HTML, with the space before it. Its probability is its background, and a tooltip with its rank."""
    word = text.lstrip()
    space, word = html.escape(text[: len(text) - len(word)]), html.escape(word)
    if probability is None:
        return space + word
    background = next(background for lowest, *_, background in COLOURS if probability >= lowest)
    title = f"probability {probability:.2g}, rank {rank:,}"
    return f'{space}<span style="background: {background}" title="{title}">{word}</span>'


def paragraph(parts: Iterable[str], note: str = "") -> str:
    """HTML words as a paragraph, with a small note below."""
    return f'<p style="white-space: pre-wrap">{"".join(parts)}<br><small>{html.escape(note)}</small></p>'


def to_frame(records: Iterable[Any]) -> Any:
    """The records of `generate`, or the words of `score`, as a pandas DataFrame: one row each.

    The settings of a record are columns of their own.

    Raises:
        InputError: pandas is not installed, or the records are something else.
    """
    try:
        import pandas
    except ImportError as error:
        raise InputError("pandas is not installed, and to_frame needs it; pip install pandas") from error
    records = list(records) if isinstance(records, Iterable) else [records]
    if wrong := [record for record in records if not is_dataclass(record)]:
        raise InputError(f"records: must be the result of generate or score, not {wrong[0]!r:.60}")
    rows = [asdict(record) for record in records]
    return pandas.DataFrame([row | row.pop("settings", {}) for row in rows])
