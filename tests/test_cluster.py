"""The processes of a training: their numbers, their decisions, and their common end. tests/slurm has the real SLURM."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN, run_main
from torch.distributed import TCPStore

from minigpt_pl import InputError
from minigpt_pl.config import TrainConfig, TrainerConfig
from minigpt_pl.training import cluster
from minigpt_pl.training.checks import check_machine
from minigpt_pl.training.cluster import Cluster, Numbers, numbers, slurm_job

JOB = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "4"}
STEP = JOB | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2"}
STEP |= {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


@pytest.fixture(autouse=True)
def variables(monkeypatch):
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in TORCHRUN:
            monkeypatch.delenv(name)

    def set_all(values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_all


class TestNumbers:
    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            ({}, Numbers()),
            (STEP, Numbers(3, 4, 1, 2, "srun")),
            (TORCHRUN, Numbers(3, 4, 1, 2, "torchrun")),
            (STEP | TORCHRUN | {"RANK": "2"}, Numbers(2, 4, 1, 2, "torchrun")),  # torchrun inside of srun
            (STEP | {"SLURM_PROCID": "2"}, Numbers(3, 4, 1, 2, "srun")),  # --distribution=cyclic
            (STEP | {"SLURM_JOB_NAME": "interactive"}, Numbers(3, 4, 1, 2, "srun")),  # salloc, then srun
            (STEP | {"SLURM_JOB_NAME": "bash", "SLURM_PTY_PORT": "5000"}, Numbers()),  # a shell on a node
            (JOB | {"SLURM_JOB_NAME": "interactive"}, Numbers()),  # the shell of salloc
            (JOB | {"SLURM_NTASKS": "1"}, Numbers()),  # a job script without srun
        ],
    )
    def test_of_the_variables(self, variables, values, expected):
        variables(values)
        assert numbers() == expected

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            (JOB, "SLURM_NTASKS=4: this job was started without srun; write srun before the command"),
            (
                {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "2"},
                "SLURM_JOB_NUM_NODES=2: this job was started without srun",
            ),
            (
                STEP | {"SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "2,1"},
                "SLURM_STEP_TASKS_PER_NODE=2,1: all",
            ),
            (STEP | {"SLURM_STEP_TASKS_PER_NODE": "3,1"}, "SLURM_STEP_TASKS_PER_NODE=3,1: all nodes must have"),
        ],
    )
    def test_that_do_not_fit_together(self, variables, values, message):
        variables(values)
        with pytest.raises(InputError, match=message.replace("(", r"\(")):
            numbers()

    def test_an_array_element_has_its_own_name(self, variables):
        assert slurm_job() is None
        variables(JOB)
        assert slurm_job() == "4711"
        variables({"SLURM_ARRAY_JOB_ID": "4700", "SLURM_ARRAY_TASK_ID": "3"})
        assert slurm_job() == "4700_3"


def test_steps_of_one_job_have_different_ports(variables):
    ports = set()
    for step in "012":
        variables({"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": step, "MASTER_ADDR": "127.0.0.1"})
        ports.add(Cluster(Numbers())._address()[1])
        del os.environ["MASTER_PORT"]  # `_address` has set it
    assert len(ports) == 3


@pytest.mark.parametrize("line", ["3", "2"])
def test_an_array_element_without_settings(tmp_path, line):
    """Its line of the file is missing or empty. The default model would train for hours."""
    (tmp_path / "settings.txt").write_text("seed=1\n\n")
    array = Path(__file__).parents[1] / "examples" / "slurm" / "array.sh"
    environment = os.environ | {"SLURM_ARRAY_TASK_ID": line, "SLURM_CPUS_PER_TASK": "1"}
    command = ["bash", str(array), "settings.txt"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, f"settings.txt has no settings in line {line}\n")


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "remedy"),
        [
            (TrainerConfig(devices=4), "lower it"),
            (TrainerConfig(), "start fewer tasks, or use --gpus-per-node, not --gpus-per-task"),
        ],
    )
    def test_more_processes_than_gpus(self, monkeypatch, settings, remedy):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(Cluster, "_meet", lambda self: None)
        monkeypatch.setattr(cluster, "join", lambda: Cluster(Numbers(0, 4, 0, 4, "srun")))
        with pytest.raises(InputError, match=f"trainer.devices=4: this process sees only 1 GPUs; {remedy}"):
            check_machine(TrainConfig(trainer=settings))

    @pytest.fixture
    def started(self, monkeypatch):
        monkeypatch.setattr(Cluster, "_meet", lambda self: None)
        return Cluster(Numbers(0, 4, 0, 2, "srun"))

    @pytest.mark.parametrize("settings", [{}, {"devices": 2}, {"num_nodes": 2}, {"devices": 2, "num_nodes": 2}])
    def test_that_agree(self, started, settings):
        started.check(TrainerConfig(**settings))

    @pytest.mark.parametrize(
        ("settings", "problems"),
        [
            ({"devices": 1}, ["trainer.devices=1: srun has started 2 processes per node; leave it out"]),
            ({"num_nodes": 3}, ["trainer.num_nodes=3: srun has started 2 nodes; leave it out"]),
            ({"devices": 4, "num_nodes": 1}, ["trainer.devices=4", "trainer.num_nodes=1"]),
        ],
    )
    def test_that_contradict(self, started, settings, problems):
        with pytest.raises(InputError) as error:
            started.check(TrainerConfig(**settings))
        assert len(error.value.problems) == len(problems)
        assert all(found.startswith(start) for found, start in zip(error.value.problems, problems, strict=True))

    def test_several_nodes_need_a_launcher(self):
        with pytest.raises(InputError, match="trainer.num_nodes=2: start the nodes with srun or torchrun"):
            Cluster(Numbers()).check(TrainerConfig(num_nodes=2))


class TestRequeue:
    @pytest.mark.parametrize(
        ("job", "number", "wanted", "calls"),
        [
            ("4711", signal.SIGUSR1, None, True),
            ("4711", signal.SIGTERM, None, False),  # scancel must end the job
            ("4711", signal.SIGTERM, True, True),
            ("4711", signal.SIGUSR1, False, False),
            (None, signal.SIGUSR1, None, False),
        ],
    )
    def test_scontrol(self, variables, monkeypatch, tmp_path, job, number, wanted, calls):
        if job:
            variables({"SLURM_JOB_ID": job})
        (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/called\n')
        (tmp_path / "scontrol").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        assert Cluster(Numbers()).requeue(number, wanted) == 128 + number
        assert (tmp_path / "called").exists() == calls
        assert not calls or (tmp_path / "called").read_text() == "requeue 4711\n"

    @pytest.mark.parametrize("wanted", [None, True])
    def test_not_of_a_sweep(self, variables, monkeypatch, tmp_path, wanted):
        """The job would start the whole sweep again."""
        variables({"SLURM_JOB_ID": "4711"})
        monkeypatch.setattr(sys, "argv", ["train", "seed=1,2", "-m"])
        monkeypatch.setenv("PATH", str(tmp_path))
        assert (
            Cluster(Numbers()).requeue(signal.SIGUSR1, wanted) == 128 + signal.SIGUSR1
        )  # 75 if it looked for scontrol

    @pytest.mark.parametrize(
        ("job", "script", "line"),
        [
            (None, None, "this is not a SLURM job"),
            ("4711", None, r"scontrol cannot be started \(No such file or directory\)"),
            ("4711", "#!/bin/sh\necho refused >&2; exit 1\n", r"scontrol requeue 4711 has failed \(refused\)"),
        ],
    )
    def test_without_scontrol_the_caller_starts_again(self, variables, monkeypatch, tmp_path, capfd, job, script, line):
        if job:
            variables({"SLURM_JOB_ID": job})
        monkeypatch.setenv("PATH", str(tmp_path))
        if script:
            (tmp_path / "scontrol").write_text(script)
            (tmp_path / "scontrol").chmod(0o755)
        assert Cluster(Numbers()).requeue(signal.SIGUSR1, True) == 75
        (said,) = capfd.readouterr().err.splitlines()
        assert re.search(line, said) and said.endswith("exit code 75 asks the caller to start the command again")


PROGRAM = """
import os, signal, sys, time
from minigpt_pl.cli.errors import one_line_errors
from minigpt_pl.cli import errors
from minigpt_pl import signals
from minigpt_pl.errors import InputError
from minigpt_pl.training import cluster

cluster.LOST, cluster.GRACE = 3, 2
errors.claims_error = cluster.claims_error
with cluster.left_together(), one_line_errors():
    group = cluster.join()
    rank = group.rank
    {code}
    print(rank, "ends")
"""


class TestTogether:
    """Three real processes."""

    def _run(self, tmp_path, code: str, **changes: str) -> list[tuple[int, str, str]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        (tmp_path / "program.py").write_text(PROGRAM.format(code=code.replace("\n", "\n    ")))
        shared = {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} | changes
        processes = [
            subprocess.Popen(
                [sys.executable, "program.py"], cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(3)
        ]  # fmt: skip
        outputs = [process.communicate(timeout=120) for process in processes]
        return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]

    def test_the_first_decides_for_all(self, tmp_path):
        code = "print(group.decide('number', lambda: 7 + rank), group.decide('node', lambda: [rank], of_node=True))"
        done = self._run(tmp_path, code)
        assert done == [(0, f"7 [0]\n{rank} ends\n", "") for rank in range(3)]

    def test_all_end_if_nothing_is_left_to_do(self, tmp_path):
        assert self._run(tmp_path, "group.decide('what', lambda: sys.exit())") == [(0, "", "")] * 3

    @pytest.mark.parametrize("rank", [0, 2])
    def test_an_error_of_one_ends_all_with_one_line(self, tmp_path, rank):
        code = f"if rank == {rank}: raise InputError('seed=x: wrong; mend it')\ntime.sleep(30)"
        done = self._run(tmp_path, code)
        assert [code for code, _, _ in done] == [2, 2, 2]
        assert "".join(error for *_, error in done) == "error: seed=x: wrong; mend it\n"

    def test_the_same_error_of_all_is_one_line(self, tmp_path):
        done = self._run(tmp_path, "raise InputError('seed=x: wrong; mend it')")
        assert [code for code, _, _ in done] == [2, 2, 2]
        assert "".join(error for *_, error in done) == "error: seed=x: wrong; mend it\n"

    def test_different_values_are_refused(self, tmp_path):
        done = self._run(tmp_path, "group.must_agree('text', {'seed': 7, 'data': rank // 2}, 'give all the same')")
        assert [code for code, _, _ in done] == [2, 2, 2]
        (line,) = "".join(error for *_, error in done).splitlines()
        assert line == f"error: data=0: process 2 on {socket.gethostname()} has 1; give all the same"

    @pytest.mark.parametrize(("number", "rank"), [("SIGKILL", 2), ("SIGSTOP", 1)])
    def test_a_lost_process_is_named(self, tmp_path, rank, number):
        code = f"if rank == {rank}: os.kill(os.getpid(), signal.{number})\nif rank == 0: time.sleep(20)\n"
        if number == "SIGSTOP":  # somebody must end it at last
            code = (
                f"os.system(f'(sleep 12; kill -9 {{os.getpid()}}) > /dev/null 2>&1 &') if rank == {rank} else 0\n"
                + code
            )
        done = self._run(tmp_path, code + "group.decide('never', lambda: time.sleep(20))")
        assert [code for code, _, _ in done] == [-9 if each == rank else 1 for each in range(3)]
        (line,) = "".join(error for *_, error in done).splitlines()
        assert line.startswith(f"Process {rank} on {socket.gethostname()} is lost, so all processes end.")

    @pytest.mark.parametrize("killed", [False, True])
    def test_a_traceback_comes_at_once_and_ends_all(self, tmp_path, killed):
        """srun may kill the process while it waits for the others."""
        code = "group.gather('all have met', 1)\n"
        code += "if rank == 0: os.system(f'(sleep 1; kill -9 {os.getpid()}) > /dev/null 2>&1 &')\n" * killed
        done = self._run(tmp_path, code + "if rank == 0: 1 / 0\ntime.sleep(9)")
        assert [code for code, _, _ in done] == [-9 if killed else 1, 1, 1]
        assert (
            done[0][2].count("ZeroDivisionError: division by zero") == 1 and "Traceback" not in done[1][2] + done[2][2]
        )

    def test_suspended_processes_go_on(self, tmp_path):
        """As after `scontrol suspend`. Process 1 stops first and goes on last, so process 0 sees no sign of it."""
        code = """cluster.LOST = 8
group.gather('all have met', 1)
time.sleep(0 if rank == 1 else 2)
os.system(f'(sleep {12 if rank == 1 else 8.5}; kill -CONT {os.getpid()}) > /dev/null 2>&1 &')
os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(4)"""
        done = self._run(tmp_path, code)
        assert done == [(0, f"{rank} ends\n", "") for rank in range(3)]

    def test_a_signal_before_the_training_ends_all(self, tmp_path):
        code = """signals.before_exit = cluster.end_at_once
signals.set_handlers({signal.SIGTERM: signals.exit_at_once})
if rank == 1: os.kill(os.getpid(), signal.SIGTERM)
group.decide('never', lambda: time.sleep(20))"""
        done = self._run(tmp_path, code)
        assert [code for code, _, _ in done] == [128 + signal.SIGTERM] * 3
        (line,) = "".join(error for *_, error in done).splitlines()
        assert line.startswith("SIGTERM: stopped at once.")

    def test_the_first_process_is_lost(self, tmp_path):
        code = "group.gather('all have met', 1)\nif rank == 0: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(20)"
        done = self._run(tmp_path, code)
        assert [code for code, _, _ in done] == [-9, 1, 1]
        (line,) = "".join(error for *_, error in done).splitlines()
        assert line.startswith("The first process is lost, so all processes end.")

    def test_an_address_without_a_host(self, tmp_path):
        done = self._run(tmp_path, "", MASTER_ADDR="no-such-host.invalid")
        assert [code for code, _, _ in done] == [2, 2, 2]
        (line,) = "".join(error for *_, error in done).splitlines()
        assert line.startswith("error: MASTER_ADDR=no-such-host.invalid: no address found for this name")

    def test_a_process_that_does_not_start(self, tmp_path, monkeypatch):
        code = PROGRAM.replace(
            "with cluster", "cluster.MEET = __import__('datetime').timedelta(seconds=2)\nwith cluster"
        )
        monkeypatch.setattr(sys.modules[__name__], "PROGRAM", code)
        done = self._run(tmp_path, "", WORLD_SIZE="4", LOCAL_WORLD_SIZE="4")
        assert [code for code, _, _ in done] == [2, 2, 2]
        (line,) = "".join(error for *_, error in done).splitlines()
        assert line.startswith("error: MASTER_ADDR=127.0.0.1 MASTER_PORT=") and "of 4 does not meet the others" in line


def test_processes_that_start_again_do_not_meet_those_before(monkeypatch):
    """torchrun keeps the store."""
    monkeypatch.setattr(Cluster, "_meet", lambda self: None)
    store = TCPStore("127.0.0.1", 0, is_master=True)

    def start(rank: int, seconds: float) -> str:
        time.sleep(seconds)
        return Cluster(Numbers(rank, 2, rank, 2))._agree_on_name(store.clone())

    with ThreadPoolExecutor(2) as pool:
        names = [list(pool.map(start, (0, 1), late)) for late in ((0, 0), (0.3, 0), (0, 0.3))]
    assert [len({*pair}) for pair in names] == [1, 1, 1] and len({pair[0] for pair in names}) == 3


def test_claims_error_alone():
    assert cluster.claims_error()


class TestJobOfSlurm:
    """The run has the name of the job."""

    @pytest.fixture
    def train(self, variables, story, tmp_path):
        variables({"SLURM_JOB_ID": "4711"})
        settings = [*TINY_RUN, f"data.path={story}", "text_generator.every_n_epochs=0"]

        def train(*arguments, code=0):
            done = run_main("train", *settings, *arguments, cwd=tmp_path)
            assert done.returncode == code, done.stderr
            return done.stderr

        return train

    def test_started_again(self, train, tmp_path):
        train("trainer.max_steps=2")
        train("trainer.max_steps=2")
        assert [path.parent.name for path in tmp_path.glob("outputs/*/run.json")] == ["slurm-4711"]

    def test_another_command(self, train):
        train("trainer.max_steps=2")
        error = train("trainer.max_steps=2", "seed=2", code=2)
        assert error.startswith("error: run_name=slurm-4711: another command of this job has this run; give each")

    @pytest.mark.parametrize("restarts", ["SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"])
    def test_of_a_given_name(self, train, variables, tmp_path, restarts):
        train("trainer.max_steps=2", "run_name=mine")
        assert "run_name=mine: outputs/mine exists" in train("trainer.max_steps=2", "run_name=mine", code=2)
        variables({restarts: "1"})
        train("trainer.max_steps=2", "run_name=mine")
        assert [path.parent.name for path in tmp_path.glob("outputs/*/run.json")] == ["mine"]
