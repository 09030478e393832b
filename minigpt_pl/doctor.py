"""python -m minigpt_pl.doctor: check this machine, or all machines of a job, before the training."""

import logging
import os
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from minigpt_pl.config import DoctorConfig
from minigpt_pl.diagnosis import drill, machine, processes
from minigpt_pl.diagnosis.machine import Check
from minigpt_pl.errors import InputError

if TYPE_CHECKING:
    from minigpt_pl.training.cluster import Cluster

LIMIT = 60.0  # seconds for each check
WORDS = {True: "ok", False: "mend", None: "info"}

_Check = Callable[[DoctorConfig, "Cluster"], Check]
# The checks, and the remedies if they raise an error or do not end.
REMEDIES: dict[_Check, str] = {
    machine.packages: "install minigpt_pl again, with all its dependencies",
    machine.device: "install a PyTorch that fits the driver",
    machine.precision: "install PyTorch and Lightning again",
    machine.onednn: "install PyTorch again",
    machine.data: "give other data; prepare a large text first (python -m minigpt_pl.prepare)",
    machine.free_space: "give another output_dir and data.cache_dir",
    machine.folder: "give another output_dir",
    machine.network: "unset these variables",
    processes.step: "end other programs, or train on another machine",
    processes.clocks: "start the job again",
    processes.shared_folder: "give an output_dir on a disk that all machines share",
    processes.all_reduce: "name the network between the machines: NCCL_SOCKET_IFNAME, or GLOO_SOCKET_IFNAME on CPUs",
}
OF_MACHINE = (
    *(machine.packages, machine.device, machine.precision, machine.onednn, machine.data, machine.free_space),
    *(machine.folder, machine.network),
)
OF_ALL = (processes.clocks, processes.shared_folder, processes.all_reduce)
MUST_AGREE = (machine.packages, machine.precision, machine.data)  # on all machines


def main() -> None:
    from minigpt_pl.cli import app, errors
    from minigpt_pl.training import cluster

    errors.claims_error = cluster.claims_error

    def meet(overrides: list[str]) -> list[str]:
        cluster.join()  # before the settings are checked, so that only one process prints their errors
        return overrides

    try:
        with cluster.left_together():
            app.run("doctor", doctor, prepare=meet)
    except SystemExit as end:
        if any(thread.name == "check" for thread in threading.enumerate()):  # it hangs, and Python could wait for it
            sys.stdout.flush()
            os._exit(int(end.code or 0))
        raise


def doctor(config: DoctorConfig) -> None:
    """Print a table, one line per check. End with exit code 1 if something must be mended.

    srun or torchrun may start several processes. Then the first process prints one table for all of them.

    Raises:
        InputError: the numbers of processes contradict each other, or a process is missing.
    """
    from minigpt_pl.training import cluster

    group = cluster.join()
    if config.drill and group.world_size > 1:
        raise InputError("drill=true: needs one process; leave out srun and torchrun")
    if not group.is_first:
        logging.getLogger().setLevel(logging.ERROR)
        warnings.filterwarnings("ignore")
    hosts = group.gather("hosts", socket.gethostname())
    rows: list[Check] = []

    def show(*checks: Check) -> None:
        rows.extend(checks)
        for name, ok, text in checks:
            print(f"{WORDS[ok]:4}  {name:13}  {text}", flush=True)

    for check in OF_MACHINE:
        found = _limited(check, config, group) if group.local_rank == 0 else None
        show(*_of_machines(group.gather(check.__name__, found), hosts, check in MUST_AGREE))
    for rank, (_, ok, text) in enumerate(group.gather("step", _limited(processes.step, config, group))):
        show(Check(f"process {rank}", ok, f"{hosts[rank]}, {text}"))
    for check in OF_ALL if group.world_size > 1 else ():
        show(*_of_all(group.gather(check.__name__, _limited(check, config, group)), hosts))
    if config.drill:
        show(drill.drill(config))
    group.decide("end", lambda: sys.exit(1) if any(check.ok is False for check in rows) else None)


def _limited(check: _Check, config: DoctorConfig, group: "Cluster") -> Check:
    """The result of a check. An error, and no result within `LIMIT` seconds, are results too."""
    future: Future[Check] = Future()

    def run() -> None:
        try:
            future.set_result(check(config, group))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="check").start()
    try:
        return future.result(LIMIT)
    except InputError as error:
        problem = "; ".join(error.problems)
    except TimeoutError:
        problem = f"no result within {LIMIT:g} s; {REMEDIES[check]}"
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: of PyTorch and FileLock
        problem = f"{' '.join(str(error).split())[:200]}; {REMEDIES[check]}"
    return Check(check.__name__.replace("_", " "), False, problem)


def _of_machines(found: list[Any], hosts: list[str], must_agree: bool) -> Iterator[Check]:
    """One line if all machines have the same result, else one line per result.

    Args:
        found: the result of each process; None if another process of the same machine has checked it.
        hosts: the machine of each process.
    """
    places: dict[Check, list[str]] = {}
    for host, values in zip(hosts, found, strict=True):
        if values is not None:
            places.setdefault(Check(*values), []).append(host)
    for check, where in places.items():
        if len(places) == 1:
            yield check
        else:
            remedy = "; must be the same on all machines" if must_agree else ""
            text = f"{', '.join(where)}: {check.text}{remedy}"
            yield Check(check.name, False if must_agree else check.ok, text)


def _of_all(found: list[Any], hosts: list[str]) -> Iterator[Check]:
    """The result of the first process if all is well, else one line per process with a problem."""
    checks = [Check(*values) for values in found]
    problems = [
        check._replace(text=f"process {rank} on {hosts[rank]}: {check.text}")
        for rank, check in enumerate(checks)
        if check.ok is False
    ]
    yield from problems or checks[:1]


if __name__ == "__main__":
    main()
