"""Other programs on the machine, for the rows "busy cores"."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

# A busy process ends with its benchmark, even if the benchmark is killed.
BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    sum(range(10**6))"


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        time.sleep(0.5)  # until all of them are busy
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()
        time.sleep(0.5)  # until the engine knows that they have ended
