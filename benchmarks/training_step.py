"""Time of one training step at the notebook's sizes: this project, plain PyTorch, Keras, and a lower bound.

    python benchmarks/training_step.py [--rounds 7] [--only ours,keras_tensorflow] [--json FILE]

Each contender is a process of its own that warms up and then waits. In each round all contenders take four steps in
turn, so a busy machine slows all of them. The first of the four is not counted, because the caches hold the data of
others. Then the first contender takes them again, while other processes keep all cores busy. Prints medians, and the
median over the rounds of each one's ratio to the first contender.
Contenders with a missing package are left out and listed. Token ids are random: the cost does not depend on them.
"""

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from busy import busy_processes

SIZES = {"vocab_size": 20_000, "max_length": 80, "embed_dim": 256, "num_heads": 2, "feed_forward_dim": 256}
BATCH = 128
WARM_UP, STEPS = 3, 4
# GFLOP of all matrix products of a step, forward once and backward twice: output layer, attention, feed-forward.
GFLOP = 6 * BATCH * 80 * (20_000 * 256 + 4 * 256 * 512 + 2 * 256 * 256) / 1e9


def random_ids(count: int) -> "np.ndarray":  # noqa: F821
    import numpy as np

    return np.random.default_rng(0).integers(2, SIZES["vocab_size"], (count, SIZES["max_length"] + 1))


# ------------------------------------------------------------------------------------------------- contenders
# Each one trains in a loop. It calls `turn` with the seconds of the last step, and `turn` waits for its next turn.

Turn = Callable[[float | None], None]


class Stopwatch:
    """Seconds from the start of one step to the start of the next, without the waiting."""

    def __init__(self, turn: Turn):
        self.turn, self.begin = turn, None

    def step_begins(self) -> None:
        self.turn(None if self.begin is None else time.perf_counter() - self.begin)
        self.begin = time.perf_counter()


def ours(turn: Turn, precision: str = "bf16-mixed") -> None:
    """`python -m minigpt_pl.train`, with Lightning's loop and logging."""
    import tempfile

    import numpy as np

    from minigpt_pl.cli import app
    from minigpt_pl.training import fit as fit_module

    watch = Stopwatch(turn)

    class TimedMetrics(fit_module.Metrics):
        def on_train_batch_start(self, *args):
            watch.step_begins()
            super().on_train_batch_start(*args)

    fit_module.Metrics = TimedMetrics
    folder = Path(tempfile.mkdtemp())
    words = np.array([f"w{i}" for i in range(SIZES["vocab_size"] - 3)])
    text = np.concatenate([words, np.random.default_rng(0).choice(words, 81 * BATCH * 4 - len(words))])
    (folder / "text.txt").write_text("\n".join(" ".join(row) for row in text.reshape(-1, 81)))
    options = ["data=text", f"data.path={folder / 'text.txt'}", "data.validation_share=0", "trainer=cpu"]
    options += [f"output_dir={folder}", "trainer.max_epochs=1000", "text_generator.every_n_epochs=0"]
    options += [f"trainer.precision={precision}"]
    config = app.to_settings(app.compose("train", options))
    fit_module.fit(config, "bench", [], None)


def ours_fp32(turn: Turn) -> None:
    """`ours` in fp32, as on a CPU without bf16 units."""
    ours(turn, "32-true")


def ours_without_lightning(turn: Turn) -> None:
    """The same model, loss and optimizer in a bare loop. The difference to `ours` is the cost of Lightning."""
    from minigpt_pl.cpu.allocator import keep_freed_memory
    from minigpt_pl.loss import linear_cross_entropy
    from minigpt_pl.training.optimizers import KerasAdam, SquaresByOccurrence

    keep_freed_memory()

    def loss(model, inputs, targets):
        hidden = model.hidden_states(inputs)
        return linear_cross_entropy(hidden, model.output.weight, model.output.bias, targets) / targets.numel()

    def optimizer(model):
        return KerasAdam(model.parameters(), squares=SquaresByOccurrence(model.token_embedding))

    _bare_loop(turn, loss, optimizer, bf16=True)


def plain_pytorch_fp32(turn: Turn) -> None:
    """All logits at once, `F.cross_entropy`, torch's Adam."""
    _bare_loop(turn, _plain_loss, _plain_adam, bf16=False)


def plain_pytorch_bf16(turn: Turn) -> None:
    """`plain_pytorch_fp32` under bf16 autocast."""
    _bare_loop(turn, _plain_loss, _plain_adam, bf16=True)


def torch_linear_cross_entropy(turn: Turn) -> None:
    """PyTorch's own loss that never holds all logits (new in 2.13, fp32)."""
    import torch.nn.functional as F
    from torch.nn import LinearCrossEntropyOptions

    def loss(model, inputs, targets):
        output, options = model.output, LinearCrossEntropyOptions()
        hidden = model.hidden_states(inputs).flatten(0, 1)
        return F.linear_cross_entropy(
            hidden, output.weight, targets.flatten(), linear_bias=output.bias, options=options
        )

    _bare_loop(turn, loss, _plain_adam, bf16=False)


def _plain_loss(model, inputs, targets):
    import torch.nn.functional as F

    return F.cross_entropy(model(inputs)[0].flatten(0, 1), targets.flatten())


def _plain_adam(model):
    import torch

    return torch.optim.Adam(model.parameters(), 1e-3, fused=True)


def _bare_loop(turn: Turn, loss: Callable, make_optimizer: Callable, bf16: bool) -> None:
    import torch

    from minigpt_pl import MiniGPT

    model = MiniGPT(**SIZES)
    optimizer = make_optimizer(model)
    ids = torch.from_numpy(random_ids(BATCH))
    watch = Stopwatch(turn)
    while True:
        watch.step_begins()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            value = loss(model, ids[:, :-1], ids[:, 1:])
        value.backward()
        optimizer.step()
        optimizer.zero_grad()


def keras_torch(turn: Turn) -> None:
    """The notebook's model and `fit` on Keras's torch backend."""
    _keras(turn, "torch")


def keras_tensorflow(turn: Turn) -> None:
    """The notebook's model and `fit` on Keras's TensorFlow backend."""
    _keras(turn, "tensorflow")


def _keras(turn: Turn, backend: str) -> None:
    sys.argv[1:] = [backend]
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "parity"))
    import keras_side  # before Keras: it sets the backend

    keras = keras_side.keras
    watch = Stopwatch(turn)

    class TimedBatches(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            watch.step_begins()

    names = ("vocab_size", "max_length", "embed_dim", "num_heads", "feed_forward_dim")
    model = keras_side.create_model(*(SIZES[name] for name in names))
    ids = random_ids(BATCH * 4).astype("int32")
    model.fit(ids[:, :-1], ids[:, 1:], batch_size=BATCH, epochs=1000, verbose=0, callbacks=[TimedBatches()])


def floor(turn: Turn) -> None:
    """A lower bound: the arithmetic of all matrix products of a step, at the bf16 rate of the output layer's three."""
    import torch

    hidden, weight = torch.randn(512, 256).bfloat16(), torch.randn(20_000, 256).bfloat16()
    logits, grad_weight = hidden @ weight.T, torch.empty_like(weight)
    products = [
        lambda: torch.mm(hidden, weight.T, out=logits),
        lambda: torch.mm(logits, weight),
        lambda: torch.mm(logits.T, hidden, out=grad_weight),
    ]
    seconds = None
    while True:
        turn(seconds)
        start = time.perf_counter()
        for product in products:
            for _ in range(10):
                product()
        seconds = (time.perf_counter() - start) * GFLOP / (30 * 2 * 512 * 256 * 20_000 / 1e9)


CONTENDERS = {
    function.__name__: function
    for function in (
        ours, ours_without_lightning, ours_fp32, torch_linear_cross_entropy, plain_pytorch_bf16, plain_pytorch_fp32,
        keras_tensorflow, keras_torch, floor,
    )
}  # fmt: skip
NEEDS = {"keras_tensorflow": ("keras", "tensorflow"), "keras_torch": ("keras",)}


# ------------------------------------------------------------------------------------------------ the contest


def work(name: str) -> None:
    """A contender's process: takes a step for each input line, and prints its seconds and the peak memory in bytes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of the libraries goes to standard error

    def turn(seconds: float | None) -> None:
        if seconds is not None:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            print(json.dumps([seconds, peak]), file=answers, flush=True)
        if not sys.stdin.readline():
            os._exit(0)

    CONTENDERS[name](turn)


def contest(names: list[str], rounds: int) -> dict:
    """Medians and ratios of the contenders, and the seconds of each round."""
    workers = {}
    for name in names:  # one after the other, so that no warm-up disturbs another
        command = [sys.executable, __file__, "--work", name]
        workers[name] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        for _ in range(WARM_UP):
            _step(workers[name], name)
    seen = []
    for _ in range(rounds):
        seen.append({name: _turn(worker, name) for name, worker in workers.items()})
        with busy_processes(os.cpu_count()):
            seen[-1][f"{names[0]}, busy cores"] = _turn(workers[names[0]], names[0])
    for worker in workers.values():
        worker.kill()
    table = {
        name: {
            "seconds": statistics.median(row[name][0] for row in seen),
            "ratio": statistics.median(row[name][0] / row[names[0]][0] for row in seen),
            "peak_memory_bytes": seen[-1][name][1],
        }
        for name in seen[0]
    }
    return {"table": table, "rounds": [{name: value[0] for name, value in row.items()} for row in seen]}


def _turn(worker: subprocess.Popen, name: str) -> list[float]:
    steps = [_step(worker, name) for _ in range(STEPS)][1:]
    return [statistics.median(seconds for seconds, _ in steps), steps[-1][1]]


def _step(worker: subprocess.Popen, name: str) -> list[float]:
    worker.stdin.write("\n")
    worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        raise SystemExit(f"{name} ended; to see why: yes '' | python {__file__} --work {name}")
    return json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", type=lambda names: names.split(","), default=list(CONTENDERS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        return work(arguments.work)
    missing = {
        name for name in arguments.only if not all(importlib.util.find_spec(package) for package in NEEDS.get(name, ()))
    }
    if missing:
        print(f"left out, because a package is missing: {', '.join(sorted(missing))}")
    result = contest([name for name in arguments.only if name not in missing], arguments.rounds)
    print(f"{'':28}{'s per step':>11}{'ratio':>8}{'peak memory':>14}")
    for name, row in result["table"].items():
        print(f"{name:28}{row['seconds']:11.3f}{row['ratio']:8.2f}{row['peak_memory_bytes'] / 1e9:11.2f} GB")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
