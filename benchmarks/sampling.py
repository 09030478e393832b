"""Tokens per second of writing at the seed's sizes: this project's engine and the seed's full forward for each token.

    python benchmarks/sampling.py [--rounds 5] [--only one,many] [--json FILE]

Random weights: the cost does not depend on them, nor does the length, as nothing ends a text. In each round engine and
loop write the same prompts in turn, so that a busy machine slows both; the first round is not counted. Prints medians,
the best round's, and the median over the rounds of the loop's time over the engine's. Threads: OMP_NUM_THREADS.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from minigpt_pl import MiniGPT
from minigpt_pl.generation.controls import Controls
from minigpt_pl.generation.engine import generate_ids

PROMPT, TEMPERATURE, TOP_K = 40, 0.8, 20
CASES = {"one": (1, 60), "one, long": (1, 500), "many": (64, 60), "many, long": (64, 200)}  # texts, new tokens
LOOP_TOKENS = 4  # what the loop writes: each costs the same


def engine(model: MiniGPT, prompts: list[list[int]], num_tokens: int) -> None:
    controls = Controls(vocab_size=model.vocab_size, num_tokens=num_tokens, temperature=TEMPERATURE, top_k=TOP_K)
    generate_ids(model, prompts, controls, range(len(prompts)))


@torch.inference_mode()
def full_forward(model: MiniGPT, prompts: list[list[int]], num_tokens: int) -> None:
    """As the seed does it: all positions, filled up with padding, and the logits of each, for one more token."""
    texts = torch.tensor(prompts)  # (B, L)
    for _ in range(num_tokens):
        window = texts[:, -model.max_length :]
        filled = torch.nn.functional.pad(window, (0, model.max_length - window.shape[1]))
        logits = model(filled)[0][:, window.shape[1] - 1]  # (B, max_length, V) -> (B, V)
        values, ids = (logits / TEMPERATURE).topk(TOP_K)  # (B, k) twice
        texts = torch.cat([texts, ids.gather(1, torch.multinomial(values.softmax(-1), 1))], dim=1)


def seconds(write: Callable, *arguments) -> float:
    start = time.perf_counter()
    write(*arguments)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", type=lambda names: names.split(","), default=list(CASES))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = MiniGPT().eval()
    result = {"threads": torch.get_num_threads(), "cases": {}}
    print(f"{result['threads']} threads; prompts of {PROMPT} tokens, temperature={TEMPERATURE}, top_k={TOP_K}")
    print(f"{'':12}{'texts':>6}{'tokens':>8}{'tokens/s':>10}{'best':>9}{'ms a step':>11}{'best':>8}{'loop/engine':>13}")
    for name in arguments.only:
        count, num_tokens = CASES[name]
        prompts = torch.randint(2, model.vocab_size, (count, PROMPT)).tolist()
        rounds = [
            (
                seconds(engine, model, prompts, num_tokens) / num_tokens,
                seconds(full_forward, model, prompts, LOOP_TOKENS) / LOOP_TOKENS,
            )
            for _ in range(arguments.rounds + 1)
        ][1:]
        step, best = statistics.median(ours for ours, _ in rounds), min(ours for ours, _ in rounds)
        ratio = statistics.median(loop / ours for ours, loop in rounds)
        result["cases"][name] = {
            "texts": count, "new_tokens": num_tokens, "tokens_per_second": count / step, "seconds_a_step": step,
            "best_seconds_a_step": best, "loop_over_engine": ratio, "rounds": rounds,
        }  # fmt: skip
        print(
            f"{name:12}{count:6}{num_tokens:8}{count / step:10,.0f}{count / best:9,.0f}"
            f"{step * 1e3:11.2f}{best * 1e3:8.2f}{ratio:13.1f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
