"""Trains the records of docs/frontier.md, prints their losses, and draws loss against seconds.

    python benchmarks/records.py FOLDER [--experiments fast best] [--seeds 2] [--picture records.png]

FOLDER holds IMDB in the hub's layout. Each seed trains each experiment once, in a process of its own, and times 30
steps of `experiment=keras`. A run has the folder outputs/EXPERIMENT-SEED. If that folder exists, it is not trained
again. The seconds are those of the training steps.
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from frontier import evaluate, read_reviews
from matplotlib.figure import Figure
from mixture import FIRST_WORDS, documents_of, open_reviews

from minigpt_pl import load
from minigpt_pl.files import write_figure
from minigpt_pl.measures.likelihood import document_losses
from minigpt_pl.runs import read_settings
from minigpt_pl.tokenizer import UNKNOWN_ID
from minigpt_pl.training.loss_curve import read_metrics

STEPS_TO_TIME = 30
KERAS_STEPS = 1564  # of four epochs
KERAS_LOSS = 4.528  # of `experiment=keras` after them, held out, with padding
PARTS = {"1 to 1,000": slice(1000), "2,501 to 5,000": slice(2500, 5000)}  # reviews of `unsupervised`
MEASURES = {"fast": ("val/loss", "held-out loss, with padding"), "best": ("val/word_loss", "held-out loss of a word")}
STEPS_BETWEEN_VALIDATIONS = {"fast": 250, "best": 2592}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--experiments", nargs="+", default=list(MEASURES), choices=list(MEASURES))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--picture", type=Path, default=Path("records.png"))
    arguments = parser.parse_args()
    step_seconds, runs = [], {}
    for seed in range(arguments.seeds):
        keras = train(arguments.folder, "keras", seed, f"trainer.max_steps={STEPS_TO_TIME}")
        step_seconds.append(seconds(keras, STEPS_TO_TIME) / STEPS_TO_TIME)
        print(f"experiment=keras: {step_seconds[-1]:.2f} s a step", flush=True)
        for experiment in arguments.experiments:
            every = STEPS_BETWEEN_VALIDATIONS[experiment]
            run = train(arguments.folder, experiment, seed, f"trainer.val_check_interval={every}")
            runs.setdefault(experiment, []).append(run)
    of_keras = KERAS_STEPS * statistics.median(step_seconds)
    write_figure(arguments.picture, draw(runs, of_keras))
    print(f"\nexperiment=keras: {of_keras:,.0f} s for {KERAS_STEPS:,} steps (computed)")
    measures = ("loss with padding", "first 80 words", "all words")
    columns = [f"{name}, {part}" for part in (*PARTS, "1,000 of training") for name in measures]
    print(f"\n| run | seconds | times keras | {' | '.join(columns)} |\n{'|---' * (3 + len(columns))}|")
    for run in sum(runs.values(), []):
        of_run = seconds(run)
        cells = [f"{of_run:,.0f}", f"{of_run / of_keras:.2f}", *measure(run, arguments.folder)]
        print(f"| {run.name} | {' | '.join(cells)} |", flush=True)


def train(folder: str, experiment: str, seed: int, length: str) -> Path:
    """Train a run, unless its folder exists. Returns its folder."""
    run = Path("outputs", f"{experiment}-{seed}")
    if not run.exists():
        command = [sys.executable, "-m", "minigpt_pl.train", f"experiment={experiment}", f"run_name={run.name}"]
        command += [f"data.source={folder}", "data.validation_documents=1000", f"seed={seed}", length]
        subprocess.run(command, check=True)
    return run


def seconds(run: Path, steps: int | None = None) -> float:
    """Seconds of the training steps, until the end or until a step."""
    rows = [row for row in read_metrics(run) if "tokens_per_second" in row]
    speed = rows[-1]["tokens_per_second"]  # the mean since the start
    config = read_settings(run)
    tokens = config["data"]["batch_size"] * config["model"]["max_length"]
    return (steps or rows[-1]["step"] + 1) * tokens / speed


def measure(run: Path, folder: str) -> Iterator[str]:
    """For each part of the reviews: the loss, if the run was trained with padding, and the word perplexities."""
    model = load(run.name)
    network, reviews = model.network, read_reviews(folder, 1000, model.tokenizer)
    with_padding = read_settings(run)["data"]["loss_on_padding"]
    corpus = open_reviews(folder, model)
    held_out = documents_of(corpus.validation)
    parts = [*(held_out[part] for part in PARTS.values()), documents_of(corpus.train)[:1000]]
    for documents, padded in zip(parts, (reviews.held_out, reviews.final, reviews.train[:1000]), strict=True):
        yield f"{evaluate(network.hidden_states, network.output, padded):.3f}" if with_padding else "-"
        losses = document_losses(network, documents, show_progress=True)
        words = np.concatenate([document[1:] for document in documents]) > UNKNOWN_ID
        first = np.concatenate([np.arange(1, len(document)) < FIRST_WORDS for document in documents])
        yield f"{np.exp(losses[words & first].mean()):.1f}"
        yield f"{np.exp(losses[words].mean()):.1f}"


def draw(runs: dict[str, list[Path]], of_keras: float) -> Figure:
    """One panel for each experiment: the held-out loss of its runs against seconds of training."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axis, (experiment, folders) in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs.items(), strict=True):
        name, label = MEASURES[experiment]
        for run in folders:
            rows = [row for row in read_metrics(run) if name in row]
            times = [seconds(run, row["step"] + 1) for row in rows]
            axis.plot(times, [row[name] for row in rows], "o-", label=run.name)
        if experiment == "fast":
            axis.axhline(KERAS_LOSS, color="black", linestyle=":", label=f"experiment=keras after {of_keras:,.0f} s")
        axis.set(title=f"experiment={experiment}", xlabel="seconds of training", ylabel=label)
        axis.grid(alpha=0.3)
        axis.legend()
    return figure


if __name__ == "__main__":
    main()
