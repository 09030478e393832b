"""The processes of a training: who they are, what one of them decides for all, and how they end together.

SLURM (`srun`) or torchrun starts the processes. Without them, the first process starts the others of its machine
(`Cluster.launch`). All processes run the same command, and meet at a key-value store before they read any file. The
store belongs to the first process or to torchrun.
"""

import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple

from minigpt_pl import signals
from minigpt_pl.config import TrainerConfig
from minigpt_pl.errors import InputError
from minigpt_pl.signals import say

MEET = timedelta(seconds=60)  # in which all processes must start
LOST = 40  # seconds without a sign of life, after which a process is lost
GRACE = 10  # seconds for a process to end by itself after another one has failed
LEFT = 2**40  # a process adds it to its signs of life when it ends as planned


class Numbers(NamedTuple):
    """Which of the processes this is.

    Attributes:
        started_by: srun or torchrun; None if the processes start each other.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    started_by: str | None = None


def numbers() -> Numbers:
    """Read the variables of torchrun or SLURM.

    Raises:
        InputError: SLURM has reserved several tasks but not started them, or their number differs between nodes.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if all(name in os.environ for name in names):  # torchrun, or `Cluster.launch`
        rank, world_size, local_rank, local_world_size = (int(os.environ[name]) for name in names)
        return Numbers(rank, world_size, local_rank, local_world_size, "torchrun")
    if "SLURM_JOB_ID" not in os.environ or "SLURM_PTY_PORT" in os.environ:  # a shell that `srun --pty` has started
        return Numbers()
    if "SLURM_STEP_ID" not in os.environ:
        for name in ("SLURM_NTASKS", "SLURM_JOB_NUM_NODES"):
            if slurm_job() is not None and (number := os.environ.get(name, "1")) != "1":
                raise InputError(f"{name}={number}: this job was started without srun; write srun before the command")
        return Numbers()
    if "," in (tasks := os.environ["SLURM_STEP_TASKS_PER_NODE"]):
        raise InputError(
            f"SLURM_STEP_TASKS_PER_NODE={tasks}: all nodes must have the same number; set --ntasks-per-node"
        )
    local_rank, node = (int(os.environ[f"SLURM_{name}"]) for name in ("LOCALID", "NODEID"))
    world_size, nodes = (int(os.environ[f"SLURM_STEP_NUM_{name}"]) for name in ("TASKS", "NODES"))
    local_world_size = world_size // nodes
    # SLURM_PROCID is in another order with --distribution=cyclic.
    return Numbers(node * local_world_size + local_rank, world_size, local_rank, local_world_size, "srun")


def slurm_job() -> str | None:
    """The id of this SLURM job or array element, as `scontrol` takes it. None outside of jobs, and in a shell."""
    job, array = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_ARRAY_JOB_ID")
    if job is None or os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive"):  # the rule of Lightning
        return None
    return job if array is None else f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"


@functools.cache
def join() -> "Cluster":
    """The processes of this training. The first call meets the other processes, if there are any.

    Raises:
        InputError: as `numbers`, or they do not find each other.
    """
    return Cluster(numbers())


@contextmanager
def left_together() -> Iterator[None]:
    """Around the whole command: all processes end at the same time, and with the same exit code."""
    # PyTorch warns of each lost connection with a stack trace in C++. Our line says which process is lost.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    error: BaseException | None = None
    try:
        yield
    except BaseException as raised:
        error = raised
        together = join.cache_info().currsize and join().store is not None
        if together and not isinstance(error, SystemExit) and not _is_of_communication(error):
            # At once: srun may kill this process while it waits for the others.
            sys.excepthook(type(error), error, error.__traceback__)
            raise SystemExit(1) from None
        raise
    finally:
        if join.cache_info().currsize:
            join().leave(error)


def _is_of_communication(error: BaseException) -> bool:
    """Whether another process has broken the connection."""
    return isinstance(error, RuntimeError) and bool(re.search("gloo|nccl|connection", str(error), re.IGNORECASE))


def claims_error() -> bool:
    """Tell the other processes to end with code 2. Returns whether this process prints the error.

    The others may have the same error. Only the first one prints it.
    """
    if not join.cache_info().currsize:
        # The processes have not met. All of them see wrong numbers, but each node sees its own network.
        return os.environ.get("LOCAL_RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
    group = join()
    if group.store is None:
        return True
    with suppress(RuntimeError):  # the first process has ended
        group.end_all(2)
        return bool(group.store.add("errors", 1) == 1)
    return False


def end_at_once(number: int) -> int:
    """After a signal that ends this process at once: all others end with the same exit code. Returns it.

    They need up to `GRACE` seconds. The job goes into the queue again as after a checkpoint.
    """
    group, code = join() if join.cache_info().currsize else None, 128 + number
    values = [value for name, _, value in (word.partition("=") for word in sys.argv) if name == "cluster.requeue"]
    wanted = _wants_requeue(number, {"true": True, "false": False}.get(values[-1].lower()) if values else None)
    if group is None or group.store is None:
        is_first = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
        for child in group.children if group is not None else []:
            child.send_signal(number)
        return _requeue() or code if wanted and is_first else code
    with suppress(RuntimeError):  # the first process has ended
        if wanted and group.store.add("requeue", 1) > 1:  # another process has got the same signal
            group.store.wait(["end"], timedelta(seconds=GRACE))
        else:
            group.end_all(_requeue() or code if wanted else code)
        code = int(group.store.get("end"))
    group.leave(SystemExit(code))
    return code


def _wants_requeue(number: int, setting: bool | None) -> bool:
    """Whether the SLURM job goes into the queue again after this signal."""
    if {"-m", "--multirun"} & {*sys.argv}:
        return False  # the job would start the whole sweep again
    return slurm_job() is not None and number in (signal.SIGUSR1, signal.SIGUSR2) if setting is None else setting


def _requeue() -> int:
    """Call `scontrol`. Returns 0, or the exit code 75 (EX_TEMPFAIL of sysexits.h), which asks for a new start."""
    if (job := slurm_job()) is None:
        problem = "this is not a SLURM job"
    else:
        try:
            subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True, timeout=20)
            say(f"SLURM job {job} is in the queue again.")
            return 0
        except subprocess.TimeoutExpired:  # SLURM kills the job 30 s after its signal
            problem = f"scontrol requeue {job} has not answered for 20 seconds"
        except OSError as error:
            problem = f"scontrol cannot be started ({error.strerror})"
        except subprocess.CalledProcessError as error:
            problem = f"scontrol requeue {job} has failed ({error.stderr.strip()})"
    say(f"cluster.requeue: {problem}; exit code 75 asks the caller to start the command again")
    return 75


class Cluster:
    """The processes of a training, seen from one of them.

    Each process gives a sign of life every second, and watches the next process. If a process fails or is lost, all
    others end within a minute, and one line says why.
    """

    def __init__(self, of_this_process: Numbers):
        self.rank, self.world_size, self.local_rank, self.local_world_size, self.started_by = of_this_process
        self.decisions: dict[str, str] = {}  # key -> JSON
        self.children: list[subprocess.Popen[bytes]] = []
        self.store: Any = None  # None while this process is alone
        self.leaving, self.end = threading.Event(), threading.Event()
        self.exit_code = 1  # after another process has failed
        if self.world_size > 1:
            self._meet()

    @property
    def is_first(self) -> bool:
        """Whether this process has rank 0. Only this process writes into the run folder."""
        return self.rank == 0

    def check(self, settings: TrainerConfig) -> None:
        """Compare the numbers of processes with the settings.

        Raises:
            InputError: they contradict each other.
        """
        if self.started_by is None:
            if (settings.num_nodes or 1) > 1:
                raise InputError(f"trainer.num_nodes={settings.num_nodes}: start the nodes with srun or torchrun")
            return
        nodes = self.world_size // self.local_world_size
        found = {"devices": (self.local_world_size, "processes per node"), "num_nodes": (nodes, "nodes")}
        if problems := [
            f"trainer.{name}={getattr(settings, name)}: {self.started_by} has started {number} {what}; leave it out"
            for name, (number, what) in found.items()
            if getattr(settings, name) not in (None, number)
        ]:
            raise InputError(*problems)

    # ------------------------------------------------------------------------------------------------ meeting

    def launch(self, processes: int) -> None:
        """Start the other processes of this machine, unless SLURM or torchrun has started them."""
        if self.started_by is not None or processes == 1:
            return
        self.world_size = self.local_world_size = processes
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        os.environ |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        spec = sys.modules["__main__"].__spec__
        program = [sys.argv[0]] if spec is None else ["-m", spec.name.removesuffix(".__main__")]
        for rank in range(1, processes):
            environment = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.children.append(subprocess.Popen([sys.executable, *program, *sys.argv[1:]], env=environment))
        self._meet()
        for key, value in self.decisions.items():
            self.store.set(key, value)

    def _meet(self) -> None:
        from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

        # Lightning's TorchElasticEnvironment reads these variables.
        node = self.rank // self.local_world_size
        ranks = {"RANK": self.rank, "LOCAL_RANK": self.local_rank, "GROUP_RANK": node, "WORLD_SIZE": self.world_size}
        os.environ |= {name: str(number) for name, number in ranks.items()}
        host, port = self._address()
        of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        try:
            store: Any = TCPStore(host, port, None, self.is_first and not of_torchrun, MEET, wait_for_workers=False)
            store = PrefixStore(f"minigpt_pl/{self._agree_on_name(store)}", store)
            store.set(f"host/{self.rank}", socket.gethostname())
            store_of_thread = store.clone()
        except RuntimeError as error:
            raise InputError(
                f"MASTER_ADDR={host} MASTER_PORT={port}: process {self.rank} of {self.world_size} does not meet the"
                " others within a minute; start all of them, and give an address that all reach"
            ) from error
        self.store = store
        threading.Thread(target=self._watch, args=[store_of_thread], daemon=True).start()

    def _agree_on_name(self, store: Any) -> str:
        """Wait for all processes. Returns a name that this start of them has, and no other one.

        torchrun keeps its store when it starts the processes again, and each of its nodes counts the starts otherwise.
        So the first process gives the name, and answers with the names that all processes have given themselves.
        """
        mine, name, deadline = uuid.uuid4().hex, "", time.monotonic() + MEET.total_seconds()
        if self.is_first:
            store.set("name", mine)
        while time.monotonic() < deadline:
            if store.check(["name"]) and name != (name := store.get("name").decode()):
                store.set(f"{name}/{self.rank}", mine)
            everyone = [f"{name}/{rank}" for rank in range(self.world_size)]
            if self.is_first and store.check(everyone):
                store.set(f"{name}/all", b" ".join(map(store.get, everyone)))
            if store.check([f"{name}/all"]) and mine in store.get(f"{name}/all").decode():
                return name
            if ended := [child.returncode for child in self.children if child.poll() is not None]:
                for child in self.children:
                    child.kill()
                sys.exit(max(ended[0], 1))
            time.sleep(0.1)
        raise RuntimeError

    def _address(self) -> tuple[str, int]:
        """Host and port of the first process."""
        host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        if host is None:
            from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

            host = SLURMEnvironment.resolve_root_node_address(os.environ["SLURM_STEP_NODELIST"])
        if port is None:
            job, step = int(os.environ["SLURM_JOB_ID"]), int(os.environ["SLURM_STEP_ID"])
            port = str(15_000 + (job + 1009 * step) % 10_000)  # several steps of a job can run at the same time
        os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": port}
        try:
            socket.getaddrinfo(host, None)
        except OSError as error:
            raise InputError(
                f"MASTER_ADDR={host}: no address found for this name; set it to the address of the first node"
            ) from error
        return host, int(port)

    # ----------------------------------------------------------------------------------------------- deciding

    def decide(self, key: str, function: Callable[[], Any], of_node: bool = False) -> Any:
        """Call a function in the first process, and return its result in all processes.

        If the function ends the process, all of them end.

        Args:
            key: name of the decision.
            function: returns a value that JSON can hold.
            of_node: call the function in the first process of each node, for the processes of this node.
        """
        decides, node = self.is_first, 0
        if of_node:
            decides, node = self.local_rank == 0, self.rank // self.local_world_size
        key = f"decision/{key}/{node}"
        if not decides:
            value, code = json.loads(self._wait_for(key))
        else:
            value = code = None
            try:
                value = function()
            except SystemExit as planned:  # nothing is left to do
                code = planned.code or 0
            self.decisions[key] = json.dumps([value, code])
            if self.store is not None:
                self.store.set(key, self.decisions[key])
        if code is not None:
            sys.exit(code)
        return value

    def gather(self, key: str, value: Any) -> list[Any]:
        """Collect a value of every process, by rank, in the first process. The others get an empty list.

        Args:
            key: name of the value.
            value: a value that JSON can hold.
        """
        if self.store is None:
            return [value]
        self.store.set(f"values/{key}/{self.rank}", json.dumps(value))
        ranks = range(self.world_size) if self.is_first else ()
        return [json.loads(self._wait_for(f"values/{key}/{rank}")) for rank in ranks]

    def must_agree(self, key: str, values: dict[str, Any], remedy: str) -> None:
        """Compare values of all processes.

        Args:
            values: by the name of their setting; JSON can hold them.

        Raises:
            InputError: a process has another value than the first. The message ends with `remedy`.
        """
        if self.store is None:
            return
        found = self.gather(key, values)

        def compare() -> None:
            for rank, others in enumerate(found):
                for name, value in others.items():
                    if value != found[0][name]:
                        where = f"process {rank} on {self._host(rank)}"
                        raise InputError(f"{name}={found[0][name]}: {where} has {value}; {remedy}")

        self.decide(key, compare)

    def _wait_for(self, key: str) -> str:
        while not self.end.is_set():
            with suppress(RuntimeError):  # the first process is lost
                if self.store.check([key]):
                    return str(self.store.get(key).decode())
            time.sleep(0.1)
        sys.exit(self.exit_code)

    def _host(self, rank: int) -> str:
        return str(self.store.get(f"host/{rank}").decode())

    def init_process_group(self, backend: str) -> None:
        """Start `torch.distributed`, before Lightning would do it with a second store."""
        import torch.distributed as dist
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]

        if self.store is not None:
            # No time limit: `_watch` notices lost processes, and the first process may generate texts for long.
            options: dict[str, Any] = {"rank": self.rank, "world_size": self.world_size, "timeout": timedelta(days=365)}
            dist.init_process_group(backend, store=PrefixStore("group", self.store), **options)

    # ------------------------------------------------------------------------------------------------- ending

    def requeue(self, number: int, wanted: bool | None) -> int:
        """Put the SLURM job into the queue again, if this is wanted after a signal.

        Args:
            number: the signal.
            wanted: as `cluster.requeue`.

        Returns:
            The exit code: 128 + number, or 75 if the caller must start the command again.
        """
        if not _wants_requeue(number, wanted):
            return 128 + number
        return int(self.decide("requeue", _requeue) or 128 + number)

    def end_all(self, code: int) -> None:
        """Tell all processes to end with this exit code, unless they have been told another one."""
        self.store.compare_set("end", "", str(code))

    def _watch(self, store: Any) -> None:
        """Give signs of life, and end this process if another one has failed."""
        watched = (self.rank + 1) % self.world_size
        count, seen = 0, time.monotonic()
        line, before = "", seen
        while not self.leaving.wait(1):
            if (now := time.monotonic()) - before > LOST / 2:
                seen = now  # all processes were suspended
            before = now
            try:
                store.add(f"life/{self.rank}", 1)
                if store.check(["end"]):
                    self.exit_code = int(store.get("end"))
                    break
                if (life := store.add(f"life/{watched}", 0)) != count:
                    count, seen = life, now
                elif count < LEFT and now - seen > LOST:
                    line = f"Process {watched} on {self._host(watched)} is lost, so all processes end."
                    self.end_all(1)
                    break
            except RuntimeError:  # the store belongs to the first process
                line = "The first process is lost, so all processes end."
                speaker = 1 if self.rank < self.local_world_size else 0  # local rank; the first node has lost its 0
                line = line if self.local_rank == speaker else ""
                break
        else:
            return
        self.end.set()
        if line:
            say(f"{line} {signals.advice}")
        if not self.leaving.wait(GRACE):
            for child in self.children:
                child.kill()
            with suppress(RuntimeError):
                store.add(f"life/{self.rank}", LEFT)
            os._exit(self.exit_code)

    def leave(self, error: BaseException | None) -> None:
        """Wait until all processes have done their work. The first process leaves last, because it has the store.

        Args:
            error: the exception that ends this process. A SystemExit may be planned, as after a signal.
        """
        if self.store is None:
            return
        with suppress(RuntimeError):  # the first process has ended
            if not (error is None or isinstance(error, SystemExit)):
                if _is_of_communication(error):
                    self.end.wait(LOST + GRACE)  # until `_watch` knows which process is lost
                self.end_all(1)  # a traceback follows
            else:  # a signal would change the exit code of this process only
                signals.set_handlers(dict.fromkeys(signals.SIGNALS, signals.ignore))
            self.store.add(f"life/{self.rank}", LEFT)
            self.leaving.set()
            others = range(1, self.world_size) if self.is_first else [] if self.store.check(["end"]) else [0]
            # With "end", the others need at most `GRACE`, and this process may have only 30 s until it is killed.
            deadline = time.monotonic() + (2 if self.store.check(["end"]) else 3) * GRACE
            while any(self.store.add(f"life/{other}", 0) < LEFT for other in others) and time.monotonic() < deadline:
                time.sleep(0.05)
        self.leaving.set()
