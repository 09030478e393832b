"""What a reader should know of a run: its network, data, training, held-out figures and limits."""

import json
from pathlib import Path
from typing import Any

from minigpt_pl import runs
from minigpt_pl.errors import InputError
from minigpt_pl.text_model import TextModel
from minigpt_pl.tokenizer import rules_of
from minigpt_pl.training.loss_curve import read_metrics

SETTINGS = {  # in config.yaml -> in the card
    ("data", "batch_size"): "Sequences per step",
    ("data", "cut"): "Cut of the documents",
    ("optimizer", "name"): "Optimizer",
    ("optimizer", "learning_rate"): "Learning rate",
    ("schedule", "name"): "Schedule",
    ("model", "dropout"): "Dropout",
}
COUNTS = {  # in `text` of run.json -> in the card
    "train_documents": "Documents",
    "train_tokens": "Tokens",
    "distinct_words": "Different words",
    "validation_documents": "Held-out documents",
}


UNITS = {"word": ("words", "word"), "bpe": ("tokens", "character"), "char": ("characters", "character")}


def run_card(model: TextModel, folder: Path) -> dict[str, dict[str, str]]:
    """Sections by heading, each with texts by label. A value that the run does not know is left out.

    The card has no path of the machine that trained the run.

    Args:
        folder: the run folder.
    """
    network, record, settings = model.network, runs.read_record(folder), runs.read_settings(folder)
    text, attention = record.get("text", {}), network.blocks[0].attention
    unit, other = UNITS[rules_of(model.tokenizer).kind]
    parameters = sum(parameter.numel() for parameter in network.parameters())
    card: dict[str, dict[str, Any]] = {
        "Network": {
            "Parameters": parameters,
            unit.capitalize(): network.vocab_size,
            f"Context, in {unit}": network.max_length,
            "Blocks": len(network.blocks),
            "Heads": attention.num_heads,
            "Width": network.token_embedding.embedding_dim,
            "Head width": attention.head_dim,
        },
        "Data": {"Source": text.get("source")} | {label: text.get(name) for name, label in COUNTS.items()},
        "Training": {
            "Epochs": record.get("epochs"),
            "Steps": record.get("steps"),
            **{label: settings.get(group, {}).get(name) for (group, name), label in SETTINGS.items()},
            "Precision": record.get("precision"),
            "Random seed": settings.get("seed"),
        },
        "Held-out text": _held_out(folder),
        "Limits": {
            "Memory": f"The network reads the last {network.max_length} {unit}. It does not know earlier ones.",
            "Unknown": f"It knows {network.vocab_size:,} {unit}. Every other {other} is the same to it: [UNK].",
            "Truth": "It continues texts in the style of its training text. It does not know what is true.",
            "Opinions": "It repeats the opinions and prejudices of its training text.",
        },
    }
    return {
        heading: {
            label: f"{value:,}" if isinstance(value, int) else str(value)
            for label, value in section.items()
            if value is not None
        }
        for heading, section in card.items()
    }


def _held_out(folder: Path) -> dict[str, Any]:
    """The lowest validation loss, and the measures of `evaluate`, if there are any."""
    losses = [row["val/loss"] for row in read_metrics(folder) if "val/loss" in row]
    figures: dict[str, Any] = {"Lowest loss, in nats per token": f"{min(losses):.4f}" if losses else None}
    path = folder / "evaluation.json"
    if not path.exists():
        return figures
    try:
        measures = json.loads(path.read_text(encoding="utf-8"))["whole"]
        models = {name: values for name, values in measures.items() if isinstance(values, dict)}
        for name, values in models.items():
            if values["word_perplexity"] is not None:
                figures[f"Word perplexity, {name}"] = f"{values['word_perplexity']:,.2f}"
                figures[f"Bits per byte, {name}"] = f"{values['bits_per_byte']:.4f}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a file of evaluate; remove it, or run evaluate again") from error
    return figures
