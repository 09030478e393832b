"""As many threads as there are free cores."""

import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

INTERVAL = 0.1  # seconds of a measurement; the system counts in steps of 0.01
FREE = 0.7  # share of the time for which a free core is idle, at least


class FreeCores(threading.local):
    """Chooses the number of threads for each step of a loop.

    Each product waits for its slowest thread. If another program uses the core of this thread, a step of 1 ms can take
    100 ms. So a step uses at most as many threads as there are free cores.

    Only Linux tells how long its cores are idle. On other systems a step uses all threads.
    """

    def __init__(self) -> None:
        self.free = 1
        self.is_estimate = True  # until the loop has run for one interval
        self.last_step = -math.inf  # the end of the last step
        self.start = self.idle = 0.0  # of the measurement

    @contextmanager
    def step(self) -> Iterator[None]:
        """Compute one step on the free cores. Afterwards the number of threads is as before."""
        threads = used = torch.get_num_threads()
        if threads > 1:
            with suppress(OSError, ValueError):  # not Linux
                used = min(threads, self._free_cores(threads))
        try:
            if used < threads:
                torch.set_num_threads(used)
            yield
        finally:
            if used < threads:
                torch.set_num_threads(threads)
            self.last_step = time.monotonic()

    def _free_cores(self, enough: int) -> int:
        """The cores that other programs leave free, at least 1."""
        now = time.monotonic()
        if now - self.last_step > INTERVAL:  # a new loop
            self.free, self.is_estimate, self.start, self.idle = 1, True, now, _idle_seconds()
        elif (seconds := now - self.start) > INTERVAL:
            before, self.idle = self.idle, _idle_seconds()
            self.free = max(1, math.floor((self.idle - before) / seconds + 1 - FREE))
            self.is_estimate, self.start = False, now
        if self.is_estimate and self.free < enough:
            running = int(Path("/proc/loadavg").read_text().split()[3].split("/")[0])  # threads, with this one
            self.free = max(self.free, (os.cpu_count() or 1) - running + 1)
        return self.free


def _idle_seconds() -> float:
    """The seconds since some moment for which the cores, added up, were idle or computed for this process."""
    idle, waiting = map(int, Path("/proc/stat").read_text().split(maxsplit=6)[4:6])
    return (idle + waiting) / os.sysconf("SC_CLK_TCK") + time.process_time()
