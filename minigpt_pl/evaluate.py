"""python -m minigpt_pl.evaluate: how likely a model finds held-out text, beside n-gram models of its training text."""

import json
import logging
import math
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from minigpt_pl import runs
from minigpt_pl.cli import app
from minigpt_pl.config import EvaluateConfig
from minigpt_pl.errors import InputError
from minigpt_pl.files import write_aside, write_figure

log = logging.getLogger(__name__)

LADDER = {"unigram": 1, "bigram": 2, "5-gram": 5}  # their orders; all are modified Kneser-Ney
NETWORK = "network"


def main() -> None:
    app.run("evaluate", evaluate)


def evaluate(config: EvaluateConfig) -> None:
    """Print the measures; write them into the run folder as evaluation.json, with a picture, evaluation.png.

    With `text` the files are evaluation-<its name>.json and .png; with `num_documents` that number stands there too.

    Raises:
        InputError: a file is missing or unreadable, or there is nothing to evaluate on.
    """
    from minigpt_pl.generation.text import load

    model = load(runs.choose_checkpoint(Path(config.output_dir), config.run))
    result = _measure(config, model)
    _print(result)
    parts = [config.text and Path(config.text).stem, config.num_documents]
    name = "-".join(["evaluation", *(str(part) for part in parts if part is not None)])
    target = model.checkpoint.parent.parent / name
    write_aside(target.with_name(f"{name}.json"), json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    try:
        figure = _draw(result)
    except ImportError:
        log.info("No %s.png: pip install 'minigpt_pl[show]' draws it.", name)
    else:
        write_figure(target.with_name(f"{name}.png"), figure)
    log.info("Wrote %s.json", target)


def _measure(config: EvaluateConfig, model: Any) -> dict[str, Any]:
    from minigpt_pl.measures.likelihood import document_losses, spelling_nats, summarise
    from minigpt_pl.tokenizer import NUM_SPECIAL, UNKNOWN_ID, list_vocabulary, split_words

    description, texts, train = _read_texts(config, model)
    vocabulary = list_vocabulary(model.tokenizer)
    ids = {word: id_ for id_, word in enumerate(vocabulary[NUM_SPECIAL - 1 : -1], start=NUM_SPECIAL - 1)}
    end = [] if model.end_id is None else [model.end_id]
    documents, unknown = [], Counter()
    for text in texts:
        words = split_words(text)
        unknown.update(word for word in words if word not in ids)
        documents.append(np.array([*(ids.get(word, UNKNOWN_ID) for word in words), *end]))
    if not any(np.isin(document[1:], list(ids.values())).any() for document in documents):
        raise InputError(f"{description}: no document has a second word that the model knows; give other text")

    network_losses = document_losses(model.network, documents, show_progress=True)
    ladder, first_words_nats = _ladder(documents, train, len(vocabulary), model.end_id)
    losses = ladder | {NETWORK: network_losses}
    summary = summarise(losses, documents, model.network.max_length, model.end_id)

    bits = math.log(2) * sum(len(text.encode()) for text in texts)  # nats to bits a byte
    spelling = spelling_nats(unknown, list(ids))
    for name, values in losses.items():
        total = float(values.sum(dtype=np.float64)) + first_words_nats + spelling
        summary["whole"][name]["bits_per_byte"] = total / bits
    return {
        "checkpoint": str(model.checkpoint),
        "text": description,
        "documents": len(documents),
        "bytes": sum(len(text.encode()) for text in texts),
        "unknown_words": unknown.total(),
        "spelling_bits_per_byte": spelling / bits,
        "max_length": model.network.max_length,
        **summary,
    }


def _read_texts(config: EvaluateConfig, model: Any) -> tuple[str, list[str], Any]:
    """What to evaluate on, its name and its documents; and the ids of the run's training split."""
    from minigpt_pl.data.corpus import held_out_texts, open_run_corpus
    from minigpt_pl.data.sources import text_documents
    from minigpt_pl.tokenizer import split_words

    texts = []
    if config.text is not None:  # before the long way to the training text
        documents, _ = text_documents("text", config.text, "text", config.document)
        texts = list(islice(filter(split_words, documents()), config.num_documents))
        if not texts:
            raise InputError(f"text={config.text}: holds no words; give a file with text")

    folder = model.checkpoint.parent.parent
    data, corpus = open_run_corpus(folder, model.tokenizer, config.source)
    if config.text is not None:
        return f"text={config.text}", texts, corpus.train
    if corpus.validation is None:
        raise InputError(f"run={folder.name}: held no text out; give text=FILE with text that it has not seen")
    documents = list(islice(held_out_texts(data), config.num_documents))
    return f"held-out text of {corpus.record['source']}", documents, corpus.train


def _ladder(
    documents: list[np.ndarray], train: Any, vocab_size: int, end_id: int | None
) -> tuple[dict[str, np.ndarray], float]:
    """The n-gram models' losses, as `document_losses`; and the documents' first words' under the unigram model."""
    from minigpt_pl.measures.ngrams import NGramModel

    tokens, offsets = train.tokens, train.offsets
    if end_id is None:
        tokens, offsets = np.delete(tokens, offsets[1:] - 1), offsets - np.arange(len(offsets))
    log.info("Counting the 1-, 2- and 5-grams of %s training tokens.", f"{len(tokens):,}")
    losses, first_nats = {}, 0.0
    for name, order in LADDER.items():
        model = NGramModel.fit(tokens, offsets, vocab_size, order)
        nats = [-model.log_probabilities(document) for document in documents]
        losses[name] = np.concatenate([values[1:] for values in nats])
        if order == 1:
            first_nats = float(sum(values[0] for values in nats))
    return losses, first_nats


def _print(result: dict[str, Any]) -> None:
    first = result["max_length"]
    print(f"checkpoint: {result['checkpoint']}")
    print(f"{result['text']}: {result['documents']:,} documents, {result['bytes']:,} bytes")
    models = [*LADDER, NETWORK]
    for part, heading in (("beginning", f"the first {first} tokens after a document's first"), ("whole", "all tokens")):
        means = result[part]
        print(f"\n{heading}: {means['tokens']:,}, of them known words {means['words']:,}")
        last = "  bits a byte" if part == "whole" else ""
        print(f"{'':9}{'loss':>8}{'perplexity':>13}{'a word':>11}{last}")
        for name in models:
            row = means[name]
            last = f"{row['bits_per_byte']:13.4f}" if part == "whole" else ""
            print(f"{name:9}{row['loss']:8.4f}{row['perplexity']:13,.2f}{row['word_perplexity']:11,.2f}{last}")
    print(
        f"\n(of the bits a byte, {result['spelling_bits_per_byte']:.4f} spell out {result['unknown_words']:,} unknown"
        " words)"
    )
    for part, heading in (("by_position", "loss by tokens before it"), ("by_frequency", "loss by rank of the word")):
        print(f"\n{heading}")
        print(f"{'':14}{'tokens':>10}" + "".join(f"{name:>9}" for name in models))
        for row in result[part]:
            print(f"{row['band']:14}{row['tokens']:10,}" + "".join(f"{row[name]:9.4f}" for name in models))


def _draw(result: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    ladder, by_position, by_frequency = figure.subplots(1, 3)
    models = [*LADDER, NETWORK]
    colours = [f"C{i}" for i in range(len(models))]
    bars = ladder.bar(models, [result["whole"][name]["word_perplexity"] for name in models], color=colours)
    ladder.bar_label(bars, fmt="{:,.1f}")
    ladder.set(ylabel="word perplexity", title="all tokens")
    for axes, part, title in (
        (by_position, "by_position", "by the tokens before it in its document"),
        (by_frequency, "by_frequency", "by the rank of the word's frequency"),
    ):
        for name in models:
            axes.plot([row["band"] for row in result[part]], [row[name] for row in result[part]], "o-", label=name)
        axes.set(title=title, ylabel="loss (nats a token)")
        axes.tick_params(axis="x", rotation=45)
        axes.grid(alpha=0.3)
    by_frequency.legend()
    figure.suptitle(f"{result['checkpoint']}: {result['text']}", fontsize="medium", wrap=True)
    return figure


if __name__ == "__main__":
    main()
