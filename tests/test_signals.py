"""Signals before, during and after the training, in real processes."""

import os
import signal
import subprocess
import sys
import threading

import pytest
from conftest import TINY_RUN

from minigpt_pl import runs
from minigpt_pl.signals import SIGNALS, exit_at_once, set_handlers

# The process sends a signal to itself when Python begins to import a module.
AT_IMPORT = """
import os, signal, sys

class Finder:
    def find_spec(self, name, *args):
        if name == "{module}":
            os.kill(os.getpid(), signal.{name})

sys.meta_path.insert(0, Finder())
from minigpt_pl import train
train.main()
"""
# The process sends two signals to itself in the third training step.
TWICE = """
import os, signal
from minigpt_pl.training.module import MiniGPTModule

step, calls = MiniGPTModule.training_step, []

def with_signals(*args):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
    return step(*args)

MiniGPTModule.training_step = with_signals
from minigpt_pl import train
train.main()
"""


def run(code, cwd, *arguments):
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize("requeue", [True, False])
def test_a_job_that_has_just_started_goes_into_the_queue_again(story, tmp_path, monkeypatch, requeue):
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/called\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    code = AT_IMPORT.format(module="torch", name="SIGUSR1")
    done = run(code, tmp_path, f"data.path={story}", *TINY_RUN, *([] if requeue else ["cluster.requeue=false"]))
    assert done.returncode == 128 + signal.SIGUSR1
    assert (tmp_path / "called").exists() == requeue
    assert not requeue or (tmp_path / "called").read_text() == "requeue 4711\n"


def test_a_process_ends_before_it_meets_the_first(story, tmp_path):
    code = AT_IMPORT.format(module="torch", name="SIGTERM").replace("if name", "if 'RANK' in os.environ and name")
    (tmp_path / "signalled.py").write_text(code)
    command = [sys.executable, "signalled.py", *TINY_RUN, f"data.path={story}", "trainer.devices=2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 128 + signal.SIGTERM and "Traceback" not in done.stderr


@pytest.mark.parametrize(("module", "name"), [("hydra", "SIGINT"), ("torch", "SIGTERM"), ("datasets", "SIGUSR1")])
def test_before_the_training(story, tmp_path, module, name):
    """The last one comes while the text is encoded."""
    done = run(AT_IMPORT.format(module=module, name=name), tmp_path, *TINY_RUN, f"data.path={story}")
    assert done.returncode == 128 + signal.Signals[name]
    assert "Traceback" not in done.stderr
    has_folder = "To continue the run: python -m minigpt_pl.train resume=outputs/text-001"
    advice = has_folder if module == "datasets" else "No run was started."
    assert done.stderr.splitlines()[-1] == f"{name}: stopped at once. {advice}"


def test_the_second_signal_stops_at_once(story, tmp_path):
    done = run(TWICE, tmp_path, *TINY_RUN, f"data.path={story}", "run_name=mine", "checkpoint.every_n_steps=2")
    assert done.returncode == 128 + signal.SIGUSR1
    assert "SIGUSR1: stopped at once." in done.stderr and "Traceback" not in done.stderr
    folder = tmp_path / "outputs" / "mine"
    assert runs.read_record(folder)["status"] == "running"
    assert [path.name for path in runs.checkpoints_of(folder)] == ["last.ckpt"], "the checkpoint of step 2"


def test_ignored_signals_stay_ignored():
    """nohup starts a process that ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    old = set_handlers(dict.fromkeys(SIGNALS, exit_at_once))
    try:
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert all(signal.getsignal(number) is exit_at_once for number in SIGNALS if number != signal.SIGHUP)
    finally:
        set_handlers(old)
        signal.signal(signal.SIGHUP, before)
    assert not any(signal.getsignal(number) is exit_at_once for number in SIGNALS)


def test_another_thread_changes_no_handlers():
    old = []
    thread = threading.Thread(target=lambda: old.append(set_handlers(dict.fromkeys(SIGNALS, exit_at_once))))
    thread.start()
    thread.join()
    assert old == [{}]
