"""Time of a training step by size: one size changes, the others are the notebook's.

    python benchmarks/step_sizes.py [--rounds 3] [--json FILE]

Runs this project's model, loss and optimizer in a bare loop (training_step.py measures the cost of Lightning), in bf16
if the CPU has units for it. In each round every size takes three steps, and the last two count. The first round is a
warm-up. Prints medians over the rounds, tokens per second, and GFLOP/s of the matrix products.
"""

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path

import torch

from minigpt_pl import MiniGPT
from minigpt_pl.cpu.allocator import keep_freed_memory
from minigpt_pl.loss import linear_cross_entropy
from minigpt_pl.training.optimizers import KerasAdam, SquaresByOccurrence
from minigpt_pl.training.trainer import precision

NOTEBOOK = {"batch_size": 128, "max_length": 80, "embed_dim": 256, "vocab_size": 20_000, "num_blocks": 1}
VALUES = {
    "batch_size": (16, 32, 64, 128, 256),
    "max_length": (20, 40, 80, 160, 320),
    "embed_dim": (64, 128, 256, 512),
    "vocab_size": (2_500, 5_000, 10_000, 20_000, 40_000),
    "num_blocks": (1, 2, 4),
}


def gigaflop(batch_size: int, max_length: int, embed_dim: int, vocab_size: int, num_blocks: int) -> float:
    """GFLOP of a step's matrix products: forward once, backward twice. Leaves out the attention scores."""
    block = 4 * embed_dim * 2 * embed_dim + 2 * embed_dim**2
    return 6 * batch_size * max_length * (vocab_size * embed_dim + num_blocks * block) / 1e9


def step_seconds(sizes: dict[str, int], bf16: bool) -> float:
    width = sizes["embed_dim"]
    model = MiniGPT(**{name: sizes[name] for name in sizes if name != "batch_size"}, feed_forward_dim=width)
    optimizer = KerasAdam(model.parameters(), squares=SquaresByOccurrence(model.token_embedding))
    ids = torch.randint(2, sizes["vocab_size"], (sizes["batch_size"], sizes["max_length"] + 1))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            hidden = model.hidden_states(ids[:, :-1])
            loss = linear_cross_entropy(hidden, model.output.weight, model.output.bias, ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return statistics.mean(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    keep_freed_memory()
    bf16 = precision("auto", "cpu") == "bf16-mixed"
    cases = [(name, value) for name, values in VALUES.items() for value in values]
    seen: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    for _, (name, value) in itertools.product(range(arguments.rounds + 1), cases):
        seen[name, value].append(step_seconds(NOTEBOOK | {name: value}, bf16))
    table = []
    print(f"{torch.get_num_threads()} threads, {'bf16' if bf16 else 'fp32'}")
    print(f"{'':12}{'':>8}{'s per step':>11}{'tokens/s':>10}{'GFLOP/s':>9}")
    for name, value in cases:
        sizes, seconds = NOTEBOOK | {name: value}, statistics.median(seen[name, value][1:])
        tokens = sizes["batch_size"] * sizes["max_length"] / seconds
        table.append({**sizes, "seconds": seconds, "tokens_per_second": tokens})
        print(f"{name:12}{value:8,}{seconds:11.3f}{tokens:10,.0f}{gigaflop(**sizes) / seconds:9,.0f}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"bf16": bf16, "table": table}, indent=2) + "\n")


if __name__ == "__main__":
    main()
