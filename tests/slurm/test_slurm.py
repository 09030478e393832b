"""Jobs of a real SLURM: the templates of examples/slurm, signals, killed processes, and wrong numbers of processes."""

import contextlib
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
SETTINGS = [*TINY_RUN, EVERY_STEP, "trainer.max_epochs=16", "text_generator.num_tokens=5", "checkpoint.every_n_steps=5"]
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

    def signal_and_wait_for_queue(self, name: str = "USR1") -> None:
        subprocess.run(["scancel", f"--signal={name}", self.number], check=True)  # as --signal=USR1@120
        self.wait_for(lambda: self.show("Restarts") == "1")

    def kill(self, rank: int) -> None:
        """Kill one of the processes that train."""
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # a process has just ended
                variables, command = ((folder / name).read_text().split("\0") for name in ("environ", "cmdline"))
                trains = ["-m", "minigpt_pl.train"] in (command[1:3], command[2:4])  # torchrun adds -u
                if trains and {f"SLURM_JOB_ID={self.number}", f"SLURM_PROCID={rank}"} <= {*variables}:
                    os.kill(int(folder.name), signal.SIGKILL)


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
    job.signal_and_wait_for_queue()
    log = job.wait_for_end()
    assert log.count(f"SLURM job {job.number} is in the queue again.") == log.count("Resuming from") == 1
    assert "Traceback" not in log and "stopped at once" not in log
    assert_same_run(job.run_folder, undisturbed)


def test_a_killed_process_ends_the_others_and_a_new_job_goes_on(cluster, undisturbed):
    job = cluster.submit("several_nodes.sh", TWO_NODES)
    job.wait_for_steps(7)
    job.kill(rank=1)
    began = time.monotonic()
    log = job.wait_for_end("FAILED", code=137)
    assert time.monotonic() - began < 60 and "task 1: Killed" in log and "Traceback" not in log
    again = cluster.submit("several_nodes.sh", TWO_NODES, f"resume=slurm-{job.number}")
    assert "Resuming from" in again.wait_for_end()
    assert_same_run(job.run_folder, undisturbed)


def test_torchrun_starts_killed_processes_again(cluster, undisturbed):
    job = cluster.submit("torchrun.sh", TWO_NODES)
    job.wait_for_steps(7)
    job.kill(rank=1)
    job.wait_for(lambda: "Resuming from" in job.log())
    assert job.log().count("failed (exitcode: ") == 1, "they meet at the first restart"
    job.signal_and_wait_for_queue("URG")
    assert job.wait_for_end().count("Resuming from") == 2
    assert_same_run(job.run_folder, undisturbed)


def test_scontrol_that_fails(cluster, tmp_path):
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho no answer >&2\nexit 1\n")
    (tmp_path / "scontrol").chmod(0o755)
    job = cluster.submit("cpu.sh", [], PATH=f"{tmp_path}:{os.environ['PATH']}")
    job.wait_for_steps(7)
    subprocess.run(["scancel", "--signal=USR1", job.number], check=True)
    log = job.wait_for_end("FAILED", code=75)
    assert f"cluster.requeue: scontrol requeue {job.number} has failed (no answer); exit code 75 asks" in log


def test_an_array_with_an_element_that_gets_a_signal(cluster):
    (cluster.folder / "settings.txt").write_text("seed=1 model.dropout=0.2\n" * 2)
    number = cluster.submit("array.sh", ["--array=1-2"], "settings.txt").number
    jobs = [Job(cluster.folder, f"{number}_{element}") for element in (1, 2)]
    jobs[0].wait_for_steps(7)
    jobs[0].signal_and_wait_for_queue()
    assert "Resuming from" in jobs[0].wait_for_end()
    assert "Resuming from" not in jobs[1].wait_for_end()
    assert_same_run(jobs[0].run_folder, jobs[1].run_folder)


@pytest.mark.parametrize(
    ("command", "settings", "error"),
    [
        ("srun --ntasks=2", "trainer.devices=1", "trainer.devices=1: srun has started 2 processes per node"),
        ("salloc --ntasks=2 srun", "trainer.devices=1", "trainer.devices=1: srun has started 2 processes per node"),
        ("srun --nodes=2 --ntasks=2", "trainer.num_nodes=3", "trainer.num_nodes=3: srun has started 2 nodes"),
        ("srun --nodes=2 --ntasks=3", "", "SLURM_STEP_TASKS_PER_NODE=2,1: all nodes must have the same number"),
        ("env MASTER_ADDR=nowhere.invalid srun --ntasks=2", "", "MASTER_ADDR=nowhere.invalid: no address found"),
        ("srun --ntasks=2", "data.path=nothing.txt", "data.path=nothing.txt: no such file"),
        ("srun --nodes=2 --ntasks=2", "model.embed_dim=0", "model.embed_dim=0: must be at least 1"),
        ("srun --ntasks=2", "seed=$SLURM_PROCID", "seed=0: process 1 on "),
    ],
)
def test_all_processes_end_with_the_same_error(cluster, tmp_path, command, settings, error):
    line = f"python -m minigpt_pl.train {shlex.join(cluster.settings)} {settings}; echo exit $?"
    done = subprocess.run([*command.split(), "bash", "-c", line], cwd=tmp_path, capture_output=True, text=True)
    assert set(done.stdout.splitlines()) == {"exit 2"}, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith(f"error: {error}") and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("outputs/*/run.json"))


@pytest.mark.parametrize("option", ["--ntasks=2", "--nodes=2"])
def test_a_job_without_srun(slurm, tmp_path, option):
    command = ["sbatch", "--wait", option, "--output=log", "--wrap=python -m minigpt_pl.train data=text"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 2
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert re.match(r"error: SLURM_\w+=2: this job was started without srun; write srun before the command", line)
    assert not (tmp_path / "outputs").exists()
