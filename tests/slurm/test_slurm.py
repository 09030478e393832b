"""Jobs of a real SLURM: the templates of examples/slurm, signals, killed processes, and wrong numbers of processes."""

import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import EVERY_STEP, TINY_RUN, checkpoint, losses

TEMPLATES = Path(__file__).parents[2] / "examples" / "slurm"
TIMEOUT = 300  # seconds; a job that takes longer hangs
SETTINGS = [*TINY_RUN, EVERY_STEP, "trainer.max_epochs=8", "text_generator.num_tokens=5", "checkpoint.every_n_steps=5"]
TWO_TASKS = ["--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2"]
TWO_NODES = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1"]


class Job:
    """A job in the queue. Its run folder has its name."""

    def __init__(self, folder: Path, number: str):
        self.number, self.output = number, folder / f"minigpt-{number}.out"
        self.run_folder = folder / "outputs" / f"slurm-{number}"

    def show(self, name: str) -> str:
        done = subprocess.run(["scontrol", "show", "job", "-o", self.number], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return re.search(rf"\b{name}=(\S*)", done.stdout)[1]

    def log(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def wait_for(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.1)

    def wait_for_steps(self, number: int) -> None:
        self.wait_for(lambda: (self.run_folder / "metrics.csv").exists() and len(losses(self.run_folder)) >= number)
        assert self.show("JobState") == "RUNNING", self.log()

    def wait_for_end(self, state: str = "COMPLETED", code: int = 0) -> str:
        """Returns the output of the job."""
        self.wait_for(lambda: self.show("JobState") not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"))
        assert (self.show("JobState"), self.show("ExitCode")) == (state, f"{code}:0"), self.log()
        return self.log()

    def processes(self, module: str = "minigpt_pl.train") -> dict[int, int]:
        """Rank in the job -> process id."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment, command = (folder / "environ").read_bytes(), (folder / "cmdline").read_bytes()
            except OSError:  # it has ended
                continue
            variables = dict(line.split("=", 1) for line in environment.decode(errors="replace").split("\0") if line)
            if variables.get("SLURM_JOB_ID") == self.number and f"-m\0{module}\0" in command.decode(errors="replace"):
                found[int(variables["SLURM_PROCID"])] = int(folder.name)
        return found


class Cluster:
    def __init__(self, folder: Path, story: Path):
        self.folder, self.settings = folder, [*SETTINGS, f"data.path={story}"]

    def submit(self, template: str, options: list[str], *arguments: str, **variables: str) -> Job:
        command = ["sbatch", "--parsable", "--cpus-per-task=1", *options, str(TEMPLATES / template)]
        done = subprocess.run(
            [*command, *arguments, *self.settings],
            cwd=self.folder, env=os.environ | variables, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return Job(self.folder, done.stdout.strip())


@pytest.fixture(scope="module")
def cluster(slurm, story, tmp_path_factory):
    return Cluster(tmp_path_factory.mktemp("shared"), story)


@pytest.fixture(scope="module")
def undisturbed(cluster):
    """The run folder of two processes."""
    job = cluster.submit("one_node.sh", TWO_TASKS)
    job.wait_for_end()
    return job.run_folder


def assert_same_run(folder: Path, expected: Path) -> None:
    """Weights, optimizer and losses are equal, bit for bit."""
    a, b = checkpoint(folder), checkpoint(expected)
    assert a["global_step"] == b["global_step"]
    assert all(torch.equal(a["state_dict"][name], weight) for name, weight in b["state_dict"].items())
    states = zip(a["optimizer_states"][0]["state"].values(), b["optimizer_states"][0]["state"].values(), strict=True)
    assert all(torch.equal(one[name], other[name]) for one, other in states for name in other)
    assert losses(folder) == losses(expected)


def test_two_nodes_with_two_tasks_train_one_run(cluster):
    four = cluster.submit("several_nodes.sh", ["--ntasks-per-node=2", "--gpus-per-node=2"], "model.dropout=0")
    four.wait_for_end()
    one = cluster.submit("cpu.sh", [], "model.dropout=0")
    one.wait_for_end()
    for name in ("train/loss", "val/loss"):
        assert losses(four.run_folder, name) == pytest.approx(losses(one.run_folder, name), rel=2e-5)


def test_a_signal_puts_the_job_into_the_queue_again(cluster, undisturbed):
    job = cluster.submit("one_node.sh", TWO_TASKS)
    job.wait_for_steps(7)
    subprocess.run(["scancel", "--signal=USR1", job.number], check=True)  # as --signal=USR1@120
    job.wait_for(lambda: job.show("Restarts") == "1")
    log = job.wait_for_end()
    assert log.count(f"SLURM job {job.number} is in the queue again.") == log.count("Resuming from") == 1
    assert "Traceback" not in log and "stopped at once" not in log
    assert_same_run(job.run_folder, undisturbed)
