"""A folder where the drill runs commands. Its results are compared with those of an undisturbed run."""

import contextlib
import csv
import json
import logging
import os
import random
import re
import select
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

HERE = Path(__file__).parent
TIMEOUT = 600  # seconds; a process that takes longer hangs
EVERY = 5  # steps between checkpoints
SIZES = {"vocab_size": 200, "max_length": 16, "embed_dim": 16, "num_heads": 2, "head_dim": 8, "feed_forward_dim": 16}
SETTINGS = [
    *(f"model.{name}={size}" for name, size in SIZES.items()),
    *("data=text", "data.batch_size=14", "data.validation_share=0.2", "trainer=cpu", "trainer.progress_bar=false"),
    *("trainer.max_epochs=3", "trainer.val_check_interval=8", "trainer.limit_train_batches=16"),
    *("trainer.log_every_n_steps=1", "schedule.warmup_steps=3", "text_generator.num_tokens=30", "run_name=drill"),
]
VARIANTS = {
    "plain": [f"checkpoint.every_n_steps={EVERY}"],  # its last weights are its best
    "mixed": [  # its best weights come early
        *(f"checkpoint.every_n_steps={EVERY}", "optimizer.name=adamw", "optimizer.learning_rate=1"),
        *("trainer.accumulate_grad_batches=2", "trainer.ema_decay=0.9", "trainer.gradient_clip_val=1"),
    ],
    "minutes": ["checkpoint.every_minutes=0.003"],
    "tensorboard": [f"checkpoint.every_n_steps={EVERY}", "logger=tensorboard"],
}


class Failure(Exception):
    """A promise is broken."""


class Ended(NamedTuple):
    """A process that has ended: exit code (-9 after SIGKILL), standard error and output, points reached, time."""

    code: int
    errors: str
    output: str
    trace: list[str]
    time: float


def check(condition: object, problem: str, process: Ended | None = None) -> None:
    if not condition:
        raise Failure(problem + (f"\n(exit code {process.code})\n{process.errors[-1500:]}" if process else ""))


class Launcher:
    """Runs processes, one after the other (launcher.py)."""

    pid: int
    code: int | None  # exit code; None while it runs

    def __init__(self) -> None:
        environment = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE.parents[1])}
        environment |= {
            "OMP_NUM_THREADS": "1",
            "JE_ARROW_MALLOC_CONF": "background_thread:false",
        }  # no threads at a fork
        self.server: Any = subprocess.Popen(
            [sys.executable, str(HERE / "launcher.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # otherwise `select` would miss lines that are already read
            env=os.environ | environment,
            start_new_session=True,
        )
        check(self.server.stdout.readline() == b"ready\n", "the launcher does not start")

    def run(self, log: Path, disturb: Callable[["Launcher"], None], **request: Any) -> Ended:
        """Run a command until it ends. `disturb` is called while it runs."""
        self.server.stdin.write(json.dumps(request | {"log": str(log)}).encode() + b"\n")
        self.pid, self.code, self.log = int(self.server.stdout.readline()), None, log
        disturb(self)
        hangs = not self.ended(TIMEOUT)
        if hangs:
            self.send(signal.SIGKILL)
            self.ended(TIMEOUT)
        now = time.time()
        process = Ended(int(self.code or 0), self.read("err"), self.read("out"), self.read("trace").splitlines(), now)
        check(not hangs, "the process hangs", process)
        return process

    def ended(self, seconds: float = 0) -> bool:
        """Wait for the end of the process, at most this time."""
        if self.code is None and select.select([self.server.stdout], [], [], seconds)[0]:
            self.code = int(self.server.stdout.readline())
        return self.code is not None

    def send(self, number: int) -> None:
        if not self.ended():
            os.kill(self.pid, number)

    def read(self, kind: str) -> str:
        path = Path(f"{self.log}.{kind}")
        return path.read_text(errors="replace") if path.exists() else ""

    def handles_signals(self) -> bool:
        """Whether the process has a handler for SIGTERM, or has ended."""
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            process = Path(f"/proc/{self.pid}")
            is_new, maps = b"-m" in (process / "cmdline").read_bytes(), (process / "maps").read_text()
            caught = int(re.search(r"SigCgt:\s*(\w+)", (process / "status").read_text())[1], 16)  # type: ignore[index]
            if not caught >> (signal.SIGTERM - 1) & 1:
                check(not is_new or "libtorch" not in maps, "PyTorch is imported before signals are handled")
                return self.ended(0.001)
        return True


class Box:
    """The folder of one case or of an undisturbed run. Its commands run there."""

    start_seconds: float  # from the start of a new Python to the first step

    def __init__(self, folder: Path, variant: str, launcher: Launcher, reference: "Box | None" = None, seed: str = ""):
        self.folder, self.variant, self.launcher, self.rng = folder, variant, launcher, random.Random(seed)
        self.reference = reference or self
        self.outputs, self.run_folder = folder / "outputs", folder / "outputs" / "drill"
        self.checkpoints, self.temporary = self.run_folder / "checkpoints", folder / "tmp"
        self.temporary.mkdir(parents=True)
        self.settings = [*SETTINGS, *VARIANTS[variant], f"data.path={folder.parent / 'story.txt'}"]
        self.commands, self.lost = 0, list[tuple[int, float]]()  # steps and seconds that each kill has cost

    def run(self, command: str, *arguments: str, disturb: Any = lambda launcher: None, **how: Any) -> Ended:
        """Run `python -m minigpt_pl.<command>`. For `disturb` see `Launcher.run`, for `how` launcher.py."""
        self.commands += 1
        how = {"cwd": str(self.folder), "temporary": str(self.temporary), "arguments": arguments} | how
        log = self.folder / f"{self.commands}-{command}"
        process = self.launcher.run(log, disturb, module=f"minigpt_pl.{command}", **how)
        check("Traceback" not in process.errors, "there is a traceback", process)
        return process

    def train(self, **how: Any) -> Ended:
        """Start the run or go on with it: as a person does, or as a job script does that always says resume=auto."""
        if self.status() is None:
            return self.run("train", *self.settings, *self.rng.choice([[], ["resume=auto"]]), **how)
        return self.run("train", *self.rng.choice([[], self.settings]), "resume=auto", **how)

    def status(self) -> str | None:
        record = self.run_folder / "run.json"
        return str(json.loads(record.read_text())["status"]) if record.exists() else None

    def finish(self, leave_out: tuple[str, ...] = ()) -> Ended:
        """Go on until the end, and compare. No step that a checkpoint has may be computed again."""
        to_do = self.reference.batches - self.newest()[0] * (2 if self.variant == "mixed" else 1)
        process = self.train()
        check(process.code == 0, "the run does not go on", process)
        done = process.trace.count("after on_train_batch_end")
        check(done == to_do, f"the resumed run computes {done} batches; {to_do} are missing", process)
        self.compare(leave_out)
        return process

    def newest(self) -> tuple[int, float]:
        """Step and time of the newest checkpoint that can be read; 0 without one."""
        older = sorted(self.checkpoints.glob("step-*.ckpt"), reverse=True)
        for path in (self.checkpoints / "last.ckpt", *older, self.checkpoints / "best.ckpt"):
            if (contents := read(path)) is not None:
                return int(contents["global_step"]), path.stat().st_mtime
        return 0, 0

    def count_lost(self, process: Ended, at_most: int = EVERY) -> None:
        """Check the checkpoints after a kill, and count the steps that metrics.csv has and the newest of them lacks."""
        damaged = [path.name for path in self.checkpoints.glob("*.ckpt") if read(path) is None]
        check(not damaged, f"damaged: {damaged}", process)
        step, written = self.newest()
        lost = max([0, *(int(row["step"]) + 1 - step for row in rows(self.run_folder) if row["step"].isdigit())])
        check(lost <= at_most or self.variant == "minutes", f"{lost} steps after step {step} are lost", process)
        if step and at_most:  # a signal that saves first costs nothing
            self.lost.append((lost, process.time - written))

    # ---- results

    @cached_property
    def results(self) -> dict[str, Any]:
        last, best = (read(self.checkpoints / f"{name}.ckpt") or {} for name in ("last", "best"))
        sample = self.run("sample", "prompt=the", "num_tokens=10", "seed=1")
        check(sample.code == 0, "sample fails", sample)
        files = [path.relative_to(self.outputs).as_posix() for path in self.outputs.rglob("*")]
        return {
            "last.ckpt": {
                key: last.get(key) for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step")
            },
            "best.ckpt": {key: best.get(key) for key in ("state_dict", "global_step")},
            "metrics.csv": rows(self.run_folder),
            "events": events(self.run_folder) if self.variant == "tensorboard" else [],
            "samples.jsonl": (self.run_folder / "samples.jsonl").read_text().split("\n"),
            "status": self.status(),
            "files": sorted(re.sub(r"\d+", "N", name) for name in files if not re.search("damaged|tfevents", name)),
            "cache": {path.name: zlib.crc32(path.read_bytes()) for path in self.outputs.glob("cache/*/*")},
            "temporary files": [path.name for path in self.temporary.rglob("*")],
            "sample": sample.output,
        }

    def compare(self, leave_out: tuple[str, ...] = ()) -> None:
        for name, expected in self.reference.results.items():
            found = self.results[name]
            if name not in leave_out and not same(found, expected):
                if isinstance(found, list):
                    first = next(
                        (i for i, pair in enumerate(zip(found, expected, strict=False)) if not same(*pair)), len(found)
                    )
                    found, expected = found[first : first + 2], expected[first : first + 2]
                elif isinstance(found, dict):
                    found, expected = [key for key in found if not same(found[key], expected.get(key))], list(expected)
                raise Failure(f"{name} differs from the undisturbed run: {found} instead of {expected}")

    @cached_property
    def trace(self) -> list[str]:
        """The points of an undisturbed run. The first call trains it."""
        process = self.train()
        check(process.code == 0, "the undisturbed run fails", process)
        steps = [int(row["step"]) for row in rows(self.run_folder) if "train/loss" in row]
        check(steps == list(range(self.newest()[0])), "the undisturbed run does not log every step once")
        return process.trace

    def points(self, pattern: str) -> list[int]:
        """Numbers of the points of the undisturbed run that match."""
        return [number for number, point in enumerate(self.reference.trace, start=1) if re.search(pattern, point)]

    @property
    def batches(self) -> int:
        return self.trace.count("after on_train_batch_end")

    # ---- moments: arguments `disturb` of `run`

    def after_start(self, number: int) -> Any:
        """Send a signal at a random time between the start, or the first handler of signals, and the first step."""

        def disturb(launcher: Launcher) -> None:
            while number != signal.SIGKILL and not launcher.handles_signals():
                pass
            launcher.ended(self.rng.uniform(0, self.reference.start_seconds))
            launcher.send(number)

        return disturb

    def after_rows(self, number: int) -> Any:
        """Send a signal after a random number of new rows in metrics.csv, and a random part of a step."""

        def disturb(launcher: Launcher) -> None:
            while not launcher.handles_signals():
                pass
            wanted = self.rng.randint(len(rows(self.run_folder)), len(self.reference.results["metrics.csv"]) - 1)
            while len(rows(self.run_folder)) < wanted and not launcher.ended(0.002):
                pass
            launcher.ended(self.rng.uniform(0, 0.03))
            launcher.send(number)

        return disturb


def read(path: Path) -> dict[str, Any] | None:
    """A checkpoint; None if it is damaged or missing."""
    with contextlib.suppress(Exception):
        if zipfile.ZipFile(path).testzip() is None:  # PyTorch does not check the checksums
            return dict(torch.load(path, weights_only=True))
    return None


def rows(run_folder: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv, without empty values and times."""
    with contextlib.suppress(FileNotFoundError), (run_folder / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
        return [{key: row[key] for key in row if row[key] and not re.search("second|time", str(key))} for row in table]
    return []


def events(run_folder: Path) -> list[Any]:
    """TensorBoard's numbers and texts: (name, step, value)."""
    sys.modules["tensorflow"] = None  # type: ignore[assignment]  # TensorBoard starts faster without it
    # As TensorBoard itself reads them. The older event_accumulator keeps texts that a resumed run has written again.
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    board = EventAccumulator(str(run_folder)).Reload()
    found = [
        (tag, event.step, str(event.tensor_proto)) for tag in board.Tags()["tensors"] for event in board.Tensors(tag)
    ]
    return [event for event in found if "second" not in event[0]]


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal, tensors bit by bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)
