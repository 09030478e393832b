"""The offline page: one HTML file that contains the network, its words, and JavaScript that runs it.

`page/` has the parts of the file. page.html is the frame. `engine.js` computes, the other scripts are the interface.

The file contains one JSON object, which the scripts read:

    name                    name of the run
    vocabulary              the words in the order of their ids
    padding_id, unknown_id, end_id, banned_ids
    network                 the arguments of `MiniGPT`
    tensors, weights, bytes the index and the bytes of `quantization.pack`, in base64, and the number of bytes
    settings                all sampling controls with their defaults, as `sample format=jsonl` writes them
    prompt                  an example
    checkpoint              run and file of the weights
    epochs                  [{epoch, step, prompt, text}], the texts that the run wrote while it trained
    losses                  {train: [[step, loss]], val: [[step, loss]]}, in nats per token
    card                    {heading: {label: text}}, from `card.run_card`
"""

import base64
import hashlib
import html
import json
import math
import re
from pathlib import Path
from typing import Any

from minigpt_pl.errors import InputError
from minigpt_pl.exporting.card import run_card
from minigpt_pl.exporting.quantization import pack
from minigpt_pl.files import complete_lines
from minigpt_pl.generation.prompts import controls_on_ids
from minigpt_pl.text_model import TextModel
from minigpt_pl.tokenizer import NOTEBOOK, PADDING_ID, UNKNOWN_ID, list_vocabulary, rules_of
from minigpt_pl.training.loss_curve import read_metrics

PARTS = Path(__file__).with_name("page")
MARK = "<!-- Written by minigpt_pl. -->\n"  # the first line of each page
MAX_MB = 100
# The page may run its own scripts and use its own styles, and nothing else. It cannot send anything.
POLICY = (
    "default-src 'none'; script-src {scripts}; style-src {style}; img-src data:; base-uri 'none'; form-action 'none'"
)


def is_page(path: Path) -> bool:
    """Whether the path is a file that `write` wrote."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MARK)) == MARK.encode()


def write(path: Path, model: TextModel, folder: Path, confirm: bool = False) -> None:
    """Write the page of a run.

    Args:
        folder: the run folder.
        confirm: allow more than `MAX_MB`.

    Raises:
        InputError: the run has another tokenizer, the page would be too large, or a file of the run is damaged.
    """
    if (rules := rules_of(model.tokenizer)) != NOTEBOOK:
        raise InputError(
            f"run={folder.name}: the page knows the words of the notebook only, not {rules}; use `export"
            " transformers` or `export onnx`"
        )
    data = json.dumps(page_data(model, folder), allow_nan=False).replace("<", r"\u003c")  # no text can end the script
    if len(data) > MAX_MB * 1e6 and not confirm:
        raise InputError(
            f"confirm=false: the page would have {len(data) / 1e6:,.0f} MB, and a browser may not open more than"
            f" {MAX_MB} MB; give confirm=true to write it, or train with a smaller model.vocab_size"
        )
    style = (PARTS / "page.css").read_text(encoding="utf-8")
    # engine.js is the first script, page.js is the last.
    names = sorted(PARTS.glob("*.js"), key=lambda file: (file.name != "engine.js", file.name == "page.js", file.name))
    scripts = [name.read_text(encoding="utf-8") for name in names]
    parts = {
        "policy": POLICY.format(scripts=" ".join(map(_hash, scripts)), style=_hash(style)),
        "title": html.escape(folder.name),
        "style": style,
        "data": data,
        "scripts": "\n".join(f"<script>{script}</script>" for script in scripts),
    }
    frame = (PARTS / "page.html").read_text(encoding="utf-8")
    page = re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], frame)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(MARK + page)


def _hash(text: str) -> str:
    """The name of an inline script or style in a Content Security Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def page_data(model: TextModel, folder: Path) -> dict[str, Any]:
    """The JSON object of the page. The arguments and errors are those of `write`."""
    network, attention = model.network, model.network.blocks[0].attention
    vocabulary = list_vocabulary(model.tokenizer)
    controls, settings = controls_on_ids(model, {})
    tensors, weights = pack(network)
    epochs = _samples(folder)
    rows = read_metrics(folder)
    return {
        "name": folder.name,
        "vocabulary": vocabulary,
        "padding_id": PADDING_ID,
        "unknown_id": UNKNOWN_ID,
        "end_id": model.end_id,
        "banned_ids": controls.banned_ids,
        "network": {
            "vocab_size": network.vocab_size,
            "max_length": network.max_length,
            "embed_dim": network.token_embedding.embedding_dim,
            "num_heads": attention.num_heads,
            "head_dim": attention.head_dim,
            "feed_forward_dim": network.blocks[0].feed_forward[0].out_features,
            "num_blocks": len(network.blocks),
            "tie_embeddings": network.output.weight is network.token_embedding.weight,
            "shifted_channels": attention.shifted_channels,
        },
        "tensors": tensors,
        "bytes": len(weights),
        "settings": settings,
        "prompt": epochs[0]["prompt"] if epochs else vocabulary[UNKNOWN_ID + 1],
        "checkpoint": model.checkpoint and f"{folder.name}/checkpoints/{model.checkpoint.name}",
        "epochs": epochs,
        "losses": {
            name: [
                [row["step"], row[f"{name}/loss"]] for row in rows if math.isfinite(row.get(f"{name}/loss", math.nan))
            ]
            for name in ("train", "val")
        },
        "card": run_card(model, folder),
        "weights": base64.b64encode(weights).decode(),
    }


def _samples(folder: Path) -> list[dict[str, Any]]:
    """The texts of samples.jsonl: epoch, step, prompt and text of each. Empty if there is no file."""
    path = folder / "samples.jsonl"
    if not path.exists():
        return []
    try:
        records = [json.loads(line) for line in complete_lines(path)]
        return [{name: record[name] for name in ("epoch", "step", "prompt", "text")} for record in records]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not the texts of a run; restore it, or remove it") from error
