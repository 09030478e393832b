"""A small SLURM on this machine: a controller and two nodes, with four cores and two pretended GPUs each.

It has its own ports, key and folder, and does not touch another SLURM of the machine.
"""

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

# cred_expire is also the number of seconds that a job waits in the queue after `scontrol requeue`; the default is 120.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SchedulerParameters=sched_interval=1
ReturnToService=2
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n/slurmd.pid
SlurmdSpoolDir={folder}/%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n/slurmd.log
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 Gres=gpu:2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 Gres=gpu:2
PartitionName=main Nodes=n1,n2 Default=YES State=UP
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Starts SLURM. Sets the environment variables for its commands and for the jobs."""
    folder, path = tmp_path_factory.mktemp("slurm"), f"{os.environ['PATH']}:/usr/sbin:/sbin"
    commands = ("mungekey", "munged", "slurmctld", "slurmd", "sbatch")
    if missing := [name for name in commands if shutil.which(name, path=path) is None]:
        pytest.skip(f"no SLURM: no command {', '.join(missing)}; on Debian, apt-get install slurm-wlm munge")
    for name in ("n1", "n2", "state"):
        (folder / name).mkdir()
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
    with contextlib.ExitStack() as free:
        sockets = [free.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        ports = [server.getsockname()[1] for server in sockets]
    names = {"folder": folder, "ports": ports, "host": socket.gethostname().split(".")[0], "user": getpass.getuser()}
    (folder / "slurm.conf").write_text(CONFIGURATION.format(**names))
    variables = {
        "PATH": f"{Path(sys.executable).parent}:{path}",  # the jobs call `python`
        "SLURM_CONF": str(folder / "slurm.conf"),
        "MASTER_ADDR": "127.0.0.1",  # the names of the nodes have no address
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    daemons = [
        ["munged", "--foreground", "--force", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket"]
        + [f"--{name}={folder}/munged.{name}" for name in ("pid-file", "seed-file")],
        ["slurmctld", "-D", "-c"],
        ["slurmd", "-D", "-N", "n1"],
        ["slurmd", "-D", "-N", "n2"],
    ]
    with contextlib.ExitStack() as stack:
        environment = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in variables.items():
            environment.setenv(name, value)
        subprocess.run(["mungekey", "--create", f"--keyfile={folder}/munge.key"], check=True)
        output = stack.enter_context((folder / "output.log").open("w"))
        for daemon in daemons:
            process = stack.enter_context(subprocess.Popen(daemon, stdout=output, stderr=output))
            stack.callback(process.terminate)
        deadline = time.monotonic() + 60
        while len(nodes := sinfo()) < 2 and time.monotonic() < deadline:
            time.sleep(0.2)
        if len(nodes) < 2:
            logs = "".join(path.read_text() for path in sorted(folder.rglob("*.log")))
            pytest.skip(f"SLURM does not start: {logs[-2000:]}")
        stack.callback(subprocess.run, ["scancel", "--full", "--signal=KILL", "--me"])
        yield


def sinfo() -> list[str]:
    """The nodes that can run a job."""
    command = ["sinfo", "--noheader", "--Node", "--states=idle", "--format=%N"]
    return subprocess.run(command, capture_output=True, text=True).stdout.split()
