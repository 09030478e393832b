"""Time per generated token at the notebook's sizes: our engine, full forward passes, and the notebook's own loop.

    python benchmarks/sampling.py [--rounds 5] [--only one,many] [--json FILE]

The weights are random, because the cost does not depend on them. No text ends early. In each round all contenders
continue the same prompts in turn, so a busy machine slows all of them. The first round is not counted. Prints median
times, and the median over the rounds of each time divided by the engine's. OMP_NUM_THREADS sets the threads.
In each round, the engine then repeats its turn while other processes keep one core busy, then all cores.
As in the notebook, Keras's loop calls `model.predict` for each token of one text. Without Keras it is left out.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from busy import busy_processes

PROMPT, TEMPERATURE, TOP_K = 40, 0.8, 20
CASES = {"one": (1, 60), "one-long": (1, 500), "many": (64, 60), "many-long": (64, 200)}  # texts, new tokens
LOOP_TOKENS = 4  # tokens that the slow loops generate; each token costs the same
SIZES = {"vocab_size": 20_000, "max_length": 80, "embed_dim": 256, "num_heads": 2, "feed_forward_dim": 256}
KERAS = {"tensorflow": ("keras", "tensorflow"), "torch": ("keras",)}  # backend -> packages

Write = Callable[[list[list[int]], int], float]  # prompts and number of new tokens -> seconds per token


def engine(prompts: list[list[int]], num_tokens: int) -> float:
    from minigpt_pl.generation.controls import Controls
    from minigpt_pl.generation.engine import generate_ids
    from minigpt_pl.generation.inference import InferenceModel

    if not hasattr(engine, "model"):
        engine.model = InferenceModel(_network())
    controls = Controls(vocab_size=SIZES["vocab_size"], num_tokens=num_tokens, temperature=TEMPERATURE, top_k=TOP_K)
    start = time.perf_counter()
    assert engine.model.is_current()  # as each call from text does
    generate_ids(engine.model, prompts, controls, range(len(prompts)))
    return (time.perf_counter() - start) / num_tokens


def full_forward(prompts: list[list[int]], num_tokens: int) -> float:
    """The notebook's way: for each new token, the logits of all positions of the padded window."""
    import torch

    model, texts, start = _network(), torch.tensor(prompts), time.perf_counter()  # texts (B, L)
    with torch.inference_mode():
        for _ in range(LOOP_TOKENS):
            window = texts[:, -model.max_length :]
            filled = torch.nn.functional.pad(window, (0, model.max_length - window.shape[1]))
            logits = model(filled)[0][:, window.shape[1] - 1]  # (B, max_length, V) -> (B, V)
            values, ids = (logits / TEMPERATURE).topk(TOP_K)  # (B, k) twice
            texts = torch.cat([texts, ids.gather(1, torch.multinomial(values.softmax(-1), 1))], dim=1)
    return (time.perf_counter() - start) / LOOP_TOKENS


def _network():
    import torch

    from minigpt_pl import MiniGPT

    if not hasattr(_network, "made"):
        torch.manual_seed(0)
        _network.made = MiniGPT(**SIZES).eval()
    return _network.made


def keras_loop(backend: str) -> Write:
    """The notebook's loop in a process of its own, because Keras chooses its backend once per process."""
    worker = subprocess.Popen(
        [sys.executable, __file__, "--keras", backend],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip

    def write(prompts: list[list[int]], num_tokens: int) -> float:
        worker.stdin.write(json.dumps(prompts[0]) + "\n")
        worker.stdin.flush()
        return float(worker.stdout.readline())

    return write


def work(backend: str) -> None:
    """Keras's process: reads one prompt per line and prints the seconds per token."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of the libraries goes to standard error
    sys.argv[1:] = [backend]
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "parity"))
    import keras_side  # before Keras: it sets the backend
    import numpy as np

    keras, ops = keras_side.keras, keras_side.ops
    model = keras_side.create_model(*SIZES.values())
    for line in sys.stdin:
        tokens, start = json.loads(line), time.perf_counter()
        for _ in range(LOOP_TOKENS):
            filled = np.array([tokens + [0] * (SIZES["max_length"] - len(tokens))])
            logits, _ = model.predict(filled, verbose=0)
            values, ids = ops.top_k(logits[0][len(tokens) - 1], k=TOP_K, sorted=True)
            shares = np.asarray(keras.activations.softmax(ops.expand_dims(values, 0))[0]).astype("float64")
            tokens.append(int(np.random.choice(np.asarray(ids), p=shares / shares.sum())))
        print((time.perf_counter() - start) / LOOP_TOKENS, file=answers, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", type=lambda names: names.split(","), default=list(CASES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keras", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.keras:
        return work(arguments.keras)

    import torch

    from minigpt_pl.cpu.allocator import keep_freed_memory

    keep_freed_memory()  # as `sample` does
    here = [backend for backend, packages in KERAS.items() if all(map(importlib.util.find_spec, packages))]
    if missing := set(KERAS) - set(here):
        print(f"left out, because a package is missing: Keras on {', '.join(sorted(missing))}")
    loops: dict[str, Write] = {"engine": engine, "full_forward": full_forward}
    for_one_text = {f"keras_{backend}": keras_loop(backend) for backend in here}
    result = {"threads": torch.get_num_threads(), "cases": {}}
    print(f"{result['threads']} threads; prompts of {PROMPT} tokens, temperature={TEMPERATURE}, top_k={TOP_K}")
    print(f"{'':14}{'texts':>6}{'tokens':>8}  {'':18}{'ms a step':>10}{'tokens/s':>10}{'over engine':>13}")
    for case in arguments.only:
        count, num_tokens = CASES[case]
        contenders = loops | (for_one_text if count == 1 else {})
        prompts = torch.randint(2, SIZES["vocab_size"], (count, PROMPT), generator=torch.Generator()).tolist()
        rounds = []
        for _ in range(arguments.rounds + 1):
            rounds.append({name: write(prompts, num_tokens) for name, write in contenders.items()})
            for busy in sorted({1, os.cpu_count()}):
                with busy_processes(busy):
                    rounds[-1][f"engine, {busy} busy"] = engine(prompts, num_tokens)
        rounds = rounds[1:]
        result["cases"][case] = {"texts": count, "new_tokens": num_tokens, "rounds": rounds, "table": {}}
        for name in rounds[0]:
            seconds = statistics.median(row[name] for row in rounds)
            ratio = statistics.median(row[name] / row["engine"] for row in rounds)
            result["cases"][case]["table"][name] = {
                "seconds_a_step": seconds, "tokens_per_second": count / seconds, "over_engine": ratio
            }  # fmt: skip
            print(
                f"{case:14}{count:6}{num_tokens:8}  {name:18}{seconds * 1e3:10.2f}{count / seconds:10,.0f}{ratio:13.1f}"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
