"""`python -m minigpt_pl.doctor`: its lines, its exit code, and its table for several processes."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import run_main
from filelock import FileLock

from minigpt_pl import checkpoints, doctor
from minigpt_pl.cli import app
from minigpt_pl.config import DoctorConfig, ModelConfig, TextConfig
from minigpt_pl.diagnosis import drill, machine, processes
from minigpt_pl.diagnosis.machine import Check
from minigpt_pl.errors import InputError
from minigpt_pl.training import cluster

ALONE = SimpleNamespace(rank=0, local_rank=0, world_size=1, local_world_size=1, is_first=True)
TINY = ModelConfig(vocab_size=50, max_length=8, embed_dim=8, feed_forward_dim=8)


@pytest.fixture
def config(story, tmp_path):
    return DoctorConfig(str(tmp_path / "outputs"), data=TextConfig(path=str(story), cache_dir=str(tmp_path / "cache")))


def table(output: str) -> list[tuple[str, ...]]:
    """State, name and text of each line."""
    return [tuple(re.split("  +", line, maxsplit=2)) for line in output.splitlines()]


class TestCommand:
    def test_all_is_well(self, story, tmp_path, monkeypatch):
        monkeypatch.setattr(processes, "ModelConfig", lambda: TINY)
        done = run_main("doctor", "data=text", f"data.path={story}", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert [row[:2] for row in table(done.stdout)] == [
            *(("ok", "packages"), ("ok", "device"), ("info", "precision"), ("info", "oneDNN"), ("ok", "data")),
            *(("ok", "free space"), ("ok", "folder"), ("info", "network"), ("ok", "process 0")),
        ]
        assert not list((tmp_path / "outputs").iterdir())

    def test_no_text_and_no_folder(self, tmp_path, monkeypatch):
        monkeypatch.setattr(processes, "ModelConfig", lambda: TINY)
        (tmp_path / "outputs").write_text("a file")
        done = run_main("doctor", "data=text", "data.path=missing.txt", cwd=tmp_path)
        assert done.returncode == 1
        assert {name: text for state, name, text in table(done.stdout) if state == "mend"} == {
            "data": "data.path=missing.txt: no such file or folder; give a path, or a hub id such as owner/name",
            "folder": "output_dir=outputs: cannot be created (File exists); give another folder",
        }

    def test_two_processes(self, story, tmp_path):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["-m", "minigpt_pl.doctor", "data=text", f"data.path={story}"]
        environment = os.environ | {"NCCL_DEBUG": "WARN", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout
        rows = {name: (state, text) for state, name, text in table(done.stdout)}
        assert len(rows) == done.stdout.count("\n") == 13
        assert rows["network"] == ("info", "NCCL_DEBUG=WARN")
        for rank in (0, 1):
            assert rows[f"process {rank}"][1].startswith(f"{socket.gethostname()}, cpu: a training step takes ")
        assert rows["clocks"][0] == "ok"
        assert rows["shared folder"] == ("ok", "all processes write into output_dir, and see its locks")
        assert re.fullmatch(r"gloo: 43.8 MB of gradients in [\d,.]+ ms \([\d.]+ GB/s\)", rows["all-reduce"][1])

    def test_one_process_prints_errors(self, tmp_path, monkeypatch):
        meetings = []
        monkeypatch.setattr(cluster, "join", lambda: meetings.append(1))
        monkeypatch.setattr(cluster, "left_together", contextlib.nullcontext)
        monkeypatch.setattr(cluster, "claims_error", lambda: not meetings)
        done = run_main("doctor", "nope=1", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (2, "")

    def test_drill_needs_one_process(self, monkeypatch):
        monkeypatch.setattr(cluster, "join", lambda: SimpleNamespace(world_size=2))
        with pytest.raises(InputError, match="drill=true: needs one process"):
            doctor.doctor(DoctorConfig(drill=True))

    def test_drill_is_a_line(self, config, monkeypatch, capsys):
        monkeypatch.setattr(cluster, "join", lambda: cluster.Cluster(cluster.Numbers()))
        monkeypatch.setattr(processes, "ModelConfig", lambda: TINY)
        monkeypatch.setattr(drill, "drill", lambda config: Check("drill", False, "the weights differ"))
        config.drill = True
        with pytest.raises(SystemExit, match="1"):
            doctor.doctor(config)
        assert capsys.readouterr().out.endswith("mend  drill          the weights differ\n")


class TestLimit:
    def test_a_check_that_hangs(self, config, monkeypatch):
        end = threading.Event()

        def hangs(*_):
            end.wait()

        monkeypatch.setattr(doctor, "LIMIT", 0.05)
        monkeypatch.setitem(doctor.REMEDIES, hangs, "give another folder")
        text = "no result within 0.05 s; give another folder"
        assert doctor._limited(hangs, config, ALONE) == Check("hangs", False, text)
        end.set()

    def test_a_check_that_hangs_does_not_keep_the_process(self, monkeypatch, capfd):
        """A library may keep Python from ending while its thread waits."""
        end, codes = threading.Event(), []

        def run(*_, prepare):
            threading.Thread(target=end.wait, name="check").start()
            sys.exit(1)

        monkeypatch.setattr(app, "run", run)
        monkeypatch.setattr(os, "_exit", codes.append)
        with pytest.raises(SystemExit):
            doctor.main()
        end.set()
        assert codes == [1]

    @pytest.mark.parametrize("error", [ImportError("no\nfile"), OSError("no file"), RuntimeError("no file")])
    def test_a_check_that_fails(self, config, monkeypatch, error):
        def it_fails(*_):
            raise error

        monkeypatch.setitem(doctor.REMEDIES, it_fails, "give another folder")
        assert doctor._limited(it_fails, config, ALONE) == Check("it fails", False, "no file; give another folder")

    def test_a_fault_of_the_program_is_not_hidden(self, config):
        def fails(*_):
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            doctor._limited(fails, config, ALONE)


class TestRows:
    def test_of_machines(self):
        same, other = ["data", True, "a"], ["data", True, "b"]
        assert list(doctor._of_machines([same, None, same, None], ["n1", "n1", "n2", "n2"], True)) == [Check(*same)]
        rows = list(doctor._of_machines([same, same, other], ["n1", "n2", "n3"], must_agree=False))
        assert rows == [Check("data", True, "n1, n2: a"), Check("data", True, "n3: b")]
        rows = list(doctor._of_machines([same, other], ["n1", "n2"], must_agree=True))
        remedy = "must be the same on all machines"
        assert rows == [Check("data", False, f"n1: a; {remedy}"), Check("data", False, f"n2: b; {remedy}")]
        assert {machine.packages, machine.precision, machine.data} <= {*doctor.MUST_AGREE}

    def test_of_all(self):
        well, problem = ["clocks", True, "a"], ["clocks", False, "b"]
        assert list(doctor._of_all([well, well], ["n1", "n2"])) == [Check(*well)]
        assert list(doctor._of_all([well, problem], ["n1", "n2"])) == [Check("clocks", False, "process 1 on n2: b")]


class TestMachine:
    def test_gpus(self, config, monkeypatch, tmp_path):
        monkeypatch.setattr(machine, "NVIDIA_DRIVER", tmp_path)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        assert not machine.device(config, ALONE).ok and "install PyTorch for CUDA" in machine.device(config, ALONE).text
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"GPU{number}")
        assert machine.device(config, ALONE).ok and machine.device(config, ALONE).text.endswith("cores, GPU0, GPU1")
        of_three = machine.device(config, SimpleNamespace(local_world_size=3))
        assert not of_three.ok and of_three.text.endswith(
            "GPU1 for 3 processes; each needs a GPU and must see all (--gpus-per-node)"
        )

    def test_data(self, config, tmp_path):
        before = machine.data(config, ALONE)
        assert before.ok and before.text.startswith("story.txt; fingerprint ")
        assert machine.data(config, ALONE) == before
        other = tmp_path / "story.txt"
        other.write_text(Path(config.data.path).read_text() + "one more\n")
        config.data.path = str(other)
        assert machine.data(config, ALONE) != before

    def test_free_space(self, config, monkeypatch):
        found = machine.free_space(config, ALONE)
        assert found.ok and re.fullmatch(r"[\d,]+ GB in output_dir, [\d,]+ GB in data.cache_dir", found.text)
        monkeypatch.setattr(machine, "FREE_SPACE", 2**70)
        found = machine.free_space(config, ALONE)
        assert not found.ok and f"data.cache_dir={config.data.cache_dir}: has only" in found.text

    def test_locks_that_do_nothing(self, config, monkeypatch):
        text = "output_dir: rename and lock work, a flush takes less than 10* ms"
        assert re.fullmatch(text, machine.folder(config, ALONE).text)
        monkeypatch.setattr(machine, "FileLock", lambda path: contextlib.nullcontext())
        found = machine.folder(config, ALONE)
        assert not found.ok and "another process does not see a lock" in found.text

    def test_a_rename_that_does_nothing(self, config, monkeypatch):
        monkeypatch.setattr(Path, "replace", lambda *_: None)
        found = machine.folder(config, ALONE)
        assert not found.ok and "a file does not replace another" in found.text


class TestProcesses:
    def test_a_loader_that_is_slower_than_the_step(self, config, monkeypatch):
        monkeypatch.setattr(processes, "ModelConfig", lambda: TINY)
        assert processes.step(config, ALONE).ok
        times = iter([0.01, 0.2])
        monkeypatch.setattr(processes, "_seconds", lambda *_: next(times))
        found = processes.step(config, ALONE)
        assert not found.ok
        assert found.text.startswith("cpu: a training step takes 10 ms, its batch 200 ms; end other programs")

    def test_the_first_call_is_not_measured(self, monkeypatch):
        clock = [0, 100, 101, 103, 106]
        monkeypatch.setattr(processes, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
        assert processes._seconds(lambda: clock.pop(0), 3, torch.device("cpu")) == (106 - 100) / 3

    def test_clock_of_another_process(self, config):
        """It is 5 s ahead of the first process."""
        sent = {}
        group = SimpleNamespace(
            rank=1,
            world_size=2,
            is_first=False,
            store=SimpleNamespace(set=sent.setdefault, get=lambda key: str(time.time() - 5).encode()),
            gather=lambda key, value: sent.setdefault(key, value),
        )
        assert processes.clocks(config, group).ok is None
        difference, error, _ = sent["clock"]
        assert abs(difference - 5) <= error

    @pytest.mark.parametrize(("difference", "ok"), [(1.5, True), (3.0, False)])  # the error is 0.6 s
    def test_clocks(self, config, difference, ok):
        found = [
            [0, float("inf"), "process 0 on n1"],
            [0.1, 0.1, "process 1 on n1"],
            [difference, 0.6, "process 2 on n2"],
        ]
        group = SimpleNamespace(rank=0, world_size=1, is_first=True, gather=lambda *_: found)
        check = processes.clocks(config, group)
        assert check.ok is ok and ("process 2 on n2" in check.text) is not ok
        assert check.text.startswith(f"at most {1000 * difference:,.0f} ms apart (error 600 ms)")

    def test_shared_folder_of_another_process(self, config, tmp_path):
        group = SimpleNamespace(rank=1, is_first=False, decide=lambda *_: str(tmp_path), gather=lambda *_: [])
        with FileLock(tmp_path / "lock"):
            assert processes.shared_folder(config, group).ok
        found = processes.shared_folder(config, group)
        assert not found.ok and "a lock of the first process cannot be seen" in found.text
        group.decide = lambda *_: str(tmp_path / "missing")
        found = processes.shared_folder(config, group)
        assert not found.ok and "cannot be written (No such file or directory); give a folder that all" in found.text

    def test_shared_folder_of_the_first_process(self, config):
        group = SimpleNamespace(rank=0, is_first=True, decide=lambda _, make: make(), gather=lambda *_: [True, False])
        assert processes.shared_folder(config, group).ok
        group.gather = lambda *_: [True, True]
        found = processes.shared_folder(config, group)
        assert not found.ok and "the files of the processes [1] cannot be seen" in found.text
        assert not list(Path(config.output_dir).iterdir())

    def test_shared_folder_that_cannot_be_made(self, config):
        Path(config.output_dir).write_text("a file")
        group = SimpleNamespace(rank=0, is_first=True, decide=lambda _, make: make())
        assert processes.shared_folder(config, group).ok is None


class TestDrill:
    @pytest.mark.slow
    def test_a_real_one(self, config):
        found = drill.drill(config)
        assert found.ok and re.fullmatch(
            r"killed after \d+ of 400 steps and continued: the weights are the same", found.text
        )
        assert not list(Path(config.output_dir).iterdir())

    @pytest.mark.slow
    def test_a_training_that_fails(self, config, monkeypatch):
        monkeypatch.setattr(drill, "SETTINGS", (*drill.SETTINGS, "seed=-1"))
        found = drill.drill(config)
        assert not found.ok and found.text.startswith("the training has failed: error: seed=-1: must be at least 0")

    def test_other_weights(self, config, monkeypatch):
        values = {"undisturbed": 1.0, "killed": 2.0}
        contents = lambda path: {"global_step": 20, "state_dict": {"a": torch.tensor(values[path.parts[-3]])}}  # noqa: E731
        monkeypatch.setattr(drill, "_train", lambda *_: None)
        monkeypatch.setattr(drill, "_is_killed", lambda *_: True)
        monkeypatch.setattr(checkpoints, "read_checkpoint", contents)
        assert drill.drill(config) == Check(
            "drill", False, "killed after 20 steps and continued: the weights differ; report this"
        )
        monkeypatch.setattr(drill, "_is_killed", lambda *_: False)
        assert "ended before it could be killed" in drill.drill(config).text

    def test_kill(self, tmp_path):
        checkpoint = tmp_path / "last.ckpt"
        hangs = f"import pathlib, time; pathlib.Path({str(checkpoint)!r}).touch(); time.sleep(60)"
        assert drill._is_killed([sys.executable, "-c", hangs], os.environ, checkpoint)
        checkpoint.unlink()
        assert not drill._is_killed([sys.executable, "-c", ""], os.environ, checkpoint)

    def test_no_checkpoint_in_time(self, tmp_path, monkeypatch):
        monkeypatch.setattr(drill, "LIMIT", 0.1)
        with pytest.raises(subprocess.TimeoutExpired):
            drill._is_killed([sys.executable, "-c", "import time; time.sleep(60)"], os.environ, tmp_path / "last.ckpt")
