"""python -m minigpt_pl.evaluate: loss and perplexity of a model on held-out text, next to n-gram models."""

import json
import logging
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from minigpt_pl.cli import app
from minigpt_pl.config import EvaluateConfig
from minigpt_pl.errors import InputError
from minigpt_pl.files import write_figure, write_text

log = logging.getLogger(__name__)

SPECIAL = ("[UNK]", "[END]")  # rows of by_frequency without a rank
BANDS = {"by_position": "by number of tokens before", "by_frequency": "by frequency rank of the word"}


def main() -> None:
    app.run("evaluate", evaluate)


def evaluate(config: EvaluateConfig) -> None:
    """Print the measures, and write evaluation.json and the chart evaluation.png into the run folder.

    If `text` or `num_documents` is given, the file names contain it.

    Raises:
        InputError: a file is missing or unreadable, or there is no text to evaluate on.
    """
    from minigpt_pl.checkpoints import choose_checkpoint
    from minigpt_pl.measures.evaluation import MODELS, evaluate_texts
    from minigpt_pl.text_model import load

    checkpoint = choose_checkpoint(Path(config.output_dir), config.run)
    model, run_folder = load(checkpoint), checkpoint.parent.parent
    description, texts, train = _read_texts(config, model, run_folder)
    counts = f"{len(texts):,}", f"{len(train.tokens):,}"
    log.info("Evaluating on %s documents, with n-grams of %s training tokens.", *counts)
    result = evaluate_texts(model, texts, train, description)
    _print(result, MODELS)
    parts = ["evaluation", config.text and Path(config.text).stem, config.num_documents]
    name = "-".join(str(part) for part in parts if part is not None)
    write_text(run_folder / f"{name}.json", json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    log.info("Wrote %s.json", run_folder / name)
    try:
        write_figure(run_folder / f"{name}.png", _draw(result, MODELS))
        log.info("Wrote %s.png", run_folder / name)
    except ImportError:
        log.info("No %s.png: pip install 'minigpt_pl[show]' draws it.", name)


def _read_texts(config: EvaluateConfig, model: Any, run_folder: Path) -> tuple[str, list[str], Any]:
    """Description and documents of the text to evaluate on, and the ids of the run's training text."""
    from minigpt_pl.data.corpus import held_out_texts, open_run_corpus
    from minigpt_pl.data.sources import text_documents
    from minigpt_pl.tokenizer import rules_of

    texts = []
    if config.text is not None:  # before the training text, which can take long to open
        documents, *_ = text_documents("text", config.text, "text", config.document)
        texts = list(islice(filter(rules_of(model.tokenizer).split, documents()), config.num_documents))
        if not texts:
            raise InputError(f"text={config.text}: has no words; give a file with text")
    data, corpus = open_run_corpus(run_folder, model.tokenizer, config.source)
    if config.text is not None:
        return f"text={config.text}", texts, corpus.train
    if corpus.validation is None:
        raise InputError(f"run={run_folder.name}: has no held-out text; give text=FILE with text unknown to the model")
    texts = list(islice(held_out_texts(data, model.tokenizer), config.num_documents))
    return f"held-out text of {corpus.record['source']}", texts, corpus.train


def _print(result: dict[str, Any], models: Sequence[str]) -> None:
    print(f"checkpoint: {result['checkpoint']}")
    print(f"{result['text']}: {result['documents']:,} documents, {result['bytes']:,} bytes")
    beginning = f"tokens 2 to {result['max_length'] + 1} of each document"
    for part, heading in (("beginning", beginning), ("whole", "all tokens")):
        means = result[part]
        print(f"\n{heading}: {means['tokens']:,}, with {means['words']:,} known words")
        last = "  bits per byte" if part == "whole" else ""
        print(f"{'':9}{'loss':>8}{'perplexity':>12}{'word perplexity':>16}{last}")
        for name in models:
            row = means[name]
            last = f"{row['bits_per_byte']:15.4f}" if part == "whole" else ""
            word_perplexity = "-" if row["word_perplexity"] is None else f"{row['word_perplexity']:,.2f}"
            print(f"{name:9}{row['loss']:8.4f}{row['perplexity']:12,.2f}{word_perplexity:>16}{last}")
    spelling, unknown = result["spelling_bits_per_byte"], result["unknown_words"]
    print(f"\n({spelling:.4f} of the bits per byte spell {unknown:,} unknown words)")
    for part, heading in BANDS.items():
        print(f"\nloss {heading}\n{'':14}{'tokens':>10}" + "".join(f"{name:>9}" for name in models))
        for row in result[part]:
            print(f"{row['band']:14}{row['tokens']:10,}" + "".join(f"{row[name]:9.4f}" for name in models))


def _draw(result: dict[str, Any], models: Sequence[str]) -> Any:
    """Draw three charts with matplotlib: word perplexity, loss by position, loss by frequency."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    first, *others = figure.subplots(1, 3)
    colours = [f"C{i}" for i in range(len(models))]
    bars = first.bar(models, [result["whole"][name]["word_perplexity"] for name in models], color=colours)
    first.bar_label(bars, fmt="{:,.1f}")
    first.set(ylabel="word perplexity", title="all tokens")
    for axes, (part, title) in zip(others, BANDS.items(), strict=True):
        ordered = [row for row in result[part] if row["band"] not in SPECIAL]  # only these are joined by a line
        special = [row for row in result[part] if row["band"] in SPECIAL]
        for name, colour in zip(models, colours, strict=True):
            axes.plot([row["band"] for row in ordered], [row[name] for row in ordered], "o-", color=colour, label=name)
            axes.plot([row["band"] for row in special], [row[name] for row in special], "D", color=colour)
        axes.set(title=title, ylabel="loss (nats per token)")
        axes.tick_params(axis="x", rotation=45)
        axes.grid(alpha=0.3)
    others[-1].legend()
    figure.suptitle(f"{result['checkpoint']}: {result['text']}", fontsize="medium", wrap=True)
    return figure


if __name__ == "__main__":
    main()
