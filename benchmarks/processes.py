"""Two processes with one thread each against one process with two threads, with the same batches.

    python benchmarks/processes.py [--rounds 5] [--json FILE]

In each round both train for some steps in turn, so a busy machine slows both. The first steps are not counted. Prints
median times of a step and the median of the ratios. Then it prints what the processes exchange in a step, and which
share of the rows of the token embedding has a zero gradient: what a sparse exchange would save.
Token ids are random, but their frequencies follow Zipf's law, as words do.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

WORDS, LENGTH, BATCH = 20_000, 80, 128
STEPS, NOT_COUNTED = 16, 4
CONTENDERS = {"1 process, 2 threads": (1, 2), "2 processes, 1 thread each": (2, 1)}  # processes, threads of each


def write_text(path: Path) -> None:
    """Every word once, then random words."""
    random, words = np.random.default_rng(0), np.array([f"w{i}" for i in range(WORDS - 3)])
    size = (LENGTH + 1) * BATCH * STEPS - len(words)
    shares = 1 / np.arange(1, len(words) + 1)
    text = np.concatenate([words, random.choice(words, size, p=shares / shares.sum())])
    path.write_text("\n".join(" ".join(row) for row in text.reshape(-1, LENGTH + 1)))


def step_seconds(folder: Path, name: str, processes: int, threads: int) -> float:
    """The median time of a step of a real run."""
    options = ["data=text", "data.path=text.txt", "data.validation_share=0", "trainer=cpu", "trainer.precision=auto"]
    options += ["trainer.max_epochs=1", "trainer.log_every_n_steps=1", "text_generator.every_n_epochs=0"]
    options += [f"trainer.devices={processes}", f"run_name={name}", "trainer.progress_bar=false"]
    command = [sys.executable, "-m", "minigpt_pl.train", *options]
    subprocess.run(command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, check=True)
    with (folder / "outputs" / name / "metrics.csv").open() as file:
        speeds = [float(row["tokens_per_second"]) for row in csv.DictReader(file) if row["tokens_per_second"]]
    ends = [BATCH * LENGTH * number / speed for number, speed in enumerate(speeds, start=1)]  # speeds since the start
    return statistics.median(
        end - start for start, end in zip(ends[NOT_COUNTED:], ends[NOT_COUNTED + 1 :], strict=False)
    )


def zero_rows(folder: Path, batch: int) -> float:
    """The mean share of words that a batch does not contain."""
    rows = [line.split() for line in (folder / "text.txt").read_text().splitlines()[WORDS // LENGTH + 1 :]]
    starts = range(0, len(rows) - batch + 1, batch)
    return 1 - statistics.mean(len({word for row in rows[i : i + batch] for word in row[:-1]}) for i in starts) / WORDS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_text(folder / "text.txt")
        rounds = [
            {
                contender: step_seconds(folder, f"{numbers[0]}-{number}", *numbers)
                for contender, numbers in CONTENDERS.items()
            }
            for number in range(arguments.rounds)
        ]
        empty = {batch: zero_rows(folder, batch) for batch in (32, 128, 512)}
    first = next(iter(CONTENDERS))
    for contender in CONTENDERS:
        seconds = statistics.median(row[contender] for row in rounds)
        ratio = statistics.median(row[contender] / row[first] for row in rounds)
        print(f"{contender:28} {seconds:.3f} s a step   ratio {ratio:.2f}")
    from minigpt_pl import MiniGPT

    model = MiniGPT()
    gradients = 4 * sum(parameter.numel() for parameter in model.parameters())
    squares = 4 * model.token_embedding.weight.numel()
    print(f"each step: {gradients / 1e6:.1f} MB of gradients, {squares / 1e6:.1f} MB of squares")
    for batch, share in empty.items():
        print(f"batches of {batch}: {share:.0%} of the rows of the token embedding have a zero gradient")
    if arguments.json:
        arguments.json.write_text(json.dumps({"rounds": rounds, "zero_rows": empty}, indent=2))


if __name__ == "__main__":
    main()
