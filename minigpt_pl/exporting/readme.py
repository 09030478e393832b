"""The README.md of an exported folder. On the hub it is the model card."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from minigpt_pl.exporting.card import run_card
from minigpt_pl.text_model import TextModel


def readme(
    model: TextModel, run_folder: Path, license: str, library: str, usage: str, figures: Mapping[str, Mapping[str, str]]
) -> str:
    """Markdown: the fields that the hub reads, the usage, and the sections of `run_card` as tables.

    Args:
        license: licence of the weights, as the hub names it, for example apache-2.0.
        library: name of the library that opens the folder, as the hub names it.
        usage: Markdown that shows how to use the folder.
        figures: more sections of the card.
    """
    card = {**run_card(model, run_folder), **figures}
    fields: dict[str, Any] = {"license": license, "library_name": library, "pipeline_tag": "text-generation"}
    fields["tags"] = ["minigpt_pl"]
    if card["Data"].get("Source", "").startswith("IMDB"):
        fields["datasets"] = ["stanfordnlp/imdb"]
    parts = [f"---\n{yaml.safe_dump(fields, sort_keys=False)}---", f"# {run_folder.name}"]
    parts += ["A miniature GPT that continues texts. It was trained with minigpt_pl.", f"## Usage\n\n{usage.strip()}"]
    for heading, section in card.items():
        rows = [f"| {label} | {_cell(text)} |" for label, text in section.items()]
        if rows:
            parts.append("\n".join([f"## {heading}\n", "| | |", "|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    """Text of the user, such as a file name, as a cell of a Markdown table."""
    for mark in "\\`*_|<>[]":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())
