"""The drill for several processes: signals at random moments of a training with two processes.

    python tests/drills/cluster.py             # 20 signals
    python tests/drills/cluster.py --short     # 3 signals

One process or both get the signal: while they start, in the first epoch, in a validation, at any time. Both must end
within 30 s, because SLURM kills them then, and no step may be lost. The same command continues the run, until it is
finished. Then it is compared with an undisturbed run: the weights and the optimizer bit by bit, each logged number.
Exits with 1 if anything differs.
"""

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from box import HERE, Failure, check, read, rows, same

SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU, signal.SIGHUP, signal.SIGINT]
SETTINGS = [  # a few seconds in all
    *("model.vocab_size=200", "model.max_length=16", "model.head_dim=64", "model.num_blocks=2"),
    *("data=text", "data.path=story.txt", "data.batch_size=64", "data.validation_share=0.4", "trainer=cpu"),
    *("trainer.devices=2", "trainer.max_epochs=4", "trainer.val_check_interval=8", "trainer.log_every_n_steps=1"),
    *("trainer.progress_bar=false", "text_generator.num_tokens=200", "run_name=drill", "resume=auto"),
]
MOMENTS = ["start", "first epoch", "validation", "any", "any"]


class Processes:
    """The two processes of a training. Its results are in `folder`."""

    def __init__(self, folder: Path):
        self.run_folder = folder / "outputs" / "drill"
        self.began, self.log = time.monotonic(), folder / "log.txt"
        environment = os.environ | {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "minigpt_pl.train", *SETTINGS]
        with self.log.open("w") as log:
            self.first = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)

    def children(self) -> list[int]:
        """The processes that the first one has started."""
        try:
            return [
                int(number)
                for number in Path(f"/proc/{self.first.pid}/task/{self.first.pid}/children").read_text().split()
            ]
        except FileNotFoundError:  # the first one has ended
            return []

    def wait(self, seconds: float) -> int:
        """The exit code."""
        try:
            return self.first.wait(seconds)
        except subprocess.TimeoutExpired as error:
            for process in [self.first.pid, *self.children()]:
                os.kill(process, signal.SIGKILL)
            raise Failure(f"no end after {seconds} s\n{self.log.read_text()[-3000:]}") from error

    def wait_for(self, moment: str, rng: random.Random, expected: list[dict[str, str]]) -> None:
        """Wait until this moment, or until the end. `expected`: the rows of an undisturbed run."""
        if moment == "start":  # the first process starts the other one after its imports
            end = self.began + rng.uniform(1, 12)
            while time.monotonic() < end and self.first.poll() is None:
                time.sleep(0.01)
            return
        done = len(rows(self.run_folder))
        epochs = ["0"] if moment == "first epoch" else {row["epoch"] for row in expected}
        last = len([row for row in expected if row["epoch"] in epochs])
        wanted = rng.randint(min(done + 1, last), last)
        validations = [number for number, row in enumerate(expected) if number > wanted and "val/loss" in row]
        if moment == "validation" and validations:
            wanted = validations[0]  # all steps before the validation are logged
        while len(rows(self.run_folder)) < wanted and self.first.poll() is None:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))


def wait_for_handlers(process: int) -> None:
    """Wait until the process handles signals, or has ended. Before, Python starts, and any signal kills it."""
    caught = "0"
    while not int(caught, 16) >> (signal.SIGTERM - 1) & 1:
        try:
            status = Path(f"/proc/{process}/status").read_text()
        except FileNotFoundError:
            return
        found = re.search(r"SigCgt:\t(\w+)", status)
        if found is None or re.search(r"State:\tZ", status):
            return
        caught = found[1]
        time.sleep(0.005)


def disturb(folder: Path, moment: str, number: int, both: bool, rng: random.Random, expected: list) -> bool:
    """Start or continue the run, and send the signal. Returns whether it came before the end."""
    processes = Processes(folder)
    processes.wait_for(moment, rng, expected)
    everyone = [processes.first.pid, *processes.children()]
    for process in everyone if both else [rng.choice(everyone)]:
        wait_for_handlers(process)
        if processes.first.poll() is None:
            os.kill(process, number)
    began, before = time.monotonic(), read(processes.run_folder / "checkpoints" / "last.ckpt")
    code, log = processes.wait(120), processes.log.read_text()
    seconds, logged = time.monotonic() - began, len([row for row in rows(processes.run_folder) if "train/loss" in row])
    last = read(processes.run_folder / "checkpoints" / "last.ckpt")
    what = f"{signal.Signals(number).name} to {'both' if both else 'one'}, {moment}: "
    check(code in (0, 128 + number), f"{what}exit code {code}\n{log[-3000:]}")
    check("Traceback" not in log, f"{what}a traceback\n{log[-3000:]}")
    check(seconds < 30 or code == 0, f"{what}{seconds:.0f} s until the end\n{log[-3000:]}")
    at_once = "stopped at once" in log
    check(at_once or (last or {}).get("global_step") == logged, f"{what}steps are lost\n{log[-3000:]}")
    check(not at_once or same(before, last), f"{what}stopped at once, after a checkpoint")
    state = "it was finished" if code == 0 else "stopped at once" if at_once else "saved"
    print(f"{what}{state} after {seconds:.1f} s, {logged} steps logged", flush=True)
    return code != 0


def compare(run_folder: Path, expected: Path) -> None:
    for name in ("last", "best"):
        found, wanted = ({**(read(folder / "checkpoints" / f"{name}.ckpt") or {})} for folder in (run_folder, expected))
        for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
            check(key in wanted and same(found.get(key), wanted[key]), f"{name}.ckpt: {key} differs")
    check(rows(run_folder) == rows(expected), "metrics.csv differs")
    check((run_folder / "samples.jsonl").read_bytes() == (expected / "samples.jsonl").read_bytes(), "a text differs")


def finish(folder: Path, expected: Path) -> None:
    """Continue the run until its end, compare it, and remove it."""
    processes = Processes(folder)
    code = processes.wait(300)
    check(code == 0, f"the run does not continue\n{processes.log.read_text()[-3000:]}")
    compare(processes.run_folder, expected)
    shutil.rmtree(processes.run_folder)
    print("the run is finished and equal", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="3 signals")
    parser.add_argument("--seed", type=int, default=0, help="decides the random moments")
    options = parser.parse_args()
    rng, began, wanted = random.Random(options.seed), time.monotonic(), 3 if options.short else 20
    work = Path(tempfile.mkdtemp(prefix="drill-"))
    words = [f"{a}{b}" for a in ("da", "ki", "mo", "ne", "ru") for b in ("bel", "dim", "fa", "go", "lis", "tun")]
    sentences = [" ".join(["the", *rng.choices(words, k=rng.randint(8, 16))]) for _ in range(2000)]
    for name in ("undisturbed", "disturbed"):
        (work / name).mkdir()
        (work / name / "story.txt").write_text("\n".join(sentences) + "\n")
    undisturbed = Processes(work / "undisturbed")
    check(undisturbed.wait(300) == 0, f"the undisturbed run fails\n{undisturbed.log.read_text()[-3000:]}")
    print(f"undisturbed: {time.monotonic() - began:.0f} s", flush=True)
    expected, sent = rows(undisturbed.run_folder), 0
    moments = (MOMENTS * 4)[:wanted]
    rng.shuffle(moments)
    in_first, folder = len([row for row in expected if row["epoch"] == "0"]), work / "disturbed"
    while sent < wanted:
        done, limits = len(rows(folder / "outputs" / "drill")), {"first epoch": in_first, "start": len(expected) + 1}
        if done >= limits.get(moments[sent], len(expected)):  # this moment is over
            finish(folder, undisturbed.run_folder)
        number, both = SIGNALS[sent % len(SIGNALS)], rng.random() < 0.5
        stopped = disturb(folder, moments[sent], number, both, rng, expected)
        sent += stopped
        if not stopped or sent == wanted:
            finish(folder, undisturbed.run_folder)
    print(f"{sent} signals, {time.monotonic() - began:.0f} s")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
