"""The number of threads beside other programs."""

import os
import subprocess
import sys
import time

import pytest
import torch

from minigpt_pl.cpu import threads
from minigpt_pl.cpu.threads import FreeCores


@pytest.fixture(autouse=True)
def four_threads():
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(1)


class Machine:
    """Four cores on which other programs use some, and a clock. Stands for /proc and `time`."""

    def __init__(self, monkeypatch, tmp_path):
        self.now, self.idle, self.others, self.loadavg = 1000.0, 50.0, 0.0, tmp_path / "loadavg"
        monkeypatch.setattr(threads.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(threads, "_idle_seconds", lambda: self.idle)
        monkeypatch.setattr(threads, "Path", lambda _: self.loadavg)
        monkeypatch.setattr(threads.os, "cpu_count", lambda: 4)

    def compute(self, seconds: float) -> None:
        self.now += seconds
        self.idle += seconds * (4 - self.others)

    def used(self, cores: FreeCores) -> int:
        self.loadavg.write_text(f"1.50 1.20 1.10 {1 + round(self.others)}/300 4711")
        with cores.step():
            return torch.get_num_threads()


@pytest.fixture
def machine(monkeypatch, tmp_path):
    return Machine(monkeypatch, tmp_path)


def test_as_many_as_there_are_free_cores(machine):
    cores = FreeCores()
    for machine.others, expected in [(0, 4), (1, 3), (3, 1), (4, 1), (0.2, 4), (0.4, 3), (9, 1), (0, 4)]:
        machine.used(cores)
        for _ in range(30):  # more than two intervals
            machine.compute(0.01)
            used = machine.used(cores)
        assert used == expected, machine.others
        assert torch.get_num_threads() == 4


def test_the_first_steps_of_a_loop_count_the_running_threads(machine):
    cores, machine.others = FreeCores(), 2
    assert machine.used(cores) == 2
    machine.others = 1  # the other program was still finishing
    machine.compute(0.001)
    assert machine.used(cores) == 3
    machine.others = 0
    machine.compute(60)  # the user reads the text
    assert machine.used(cores) == 4


def test_a_measurement_replaces_the_first_count(machine):
    cores, machine.others = FreeCores(), 0
    assert machine.used(cores) == 4
    machine.others = 3
    for _ in range(9):
        machine.compute(0.01)
        assert machine.used(cores) == 4
    for _ in range(15):
        machine.compute(0.01)
        used = machine.used(cores)
    assert used == 1


def test_a_limit_of_the_user_stays(machine):
    cores = FreeCores()
    torch.set_num_threads(2)
    assert machine.used(cores) == 2


def test_an_error_restores_the_number(machine):
    cores, machine.others = FreeCores(), 3
    machine.used(cores)
    with pytest.raises(KeyError), cores.step():
        raise KeyError
    assert torch.get_num_threads() == 4


def test_without_the_files_of_linux_all_are_used(monkeypatch, tmp_path):
    monkeypatch.setattr(threads, "Path", lambda _: tmp_path / "missing")
    with FreeCores().step():
        assert torch.get_num_threads() == 4


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="only Linux tells how long its cores are idle")
def test_real_busy_processes():
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * os.cpu_count())]
    try:
        time.sleep(0.5)
        cores, end, used = FreeCores(), time.monotonic() + 1.0, []
        while time.monotonic() < end:
            with cores.step():
                used.append(torch.get_num_threads())
                sum(range(10_000))
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert used[-1] == 1 and used.count(1) > 0.9 * len(used)
