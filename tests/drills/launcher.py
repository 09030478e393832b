"""Starts commands of the package for the drill, each in its own process, and stops them at a chosen point.

The imports of PyTorch, Lightning and datasets take 5 s. So this process imports them once, and forks for each command.
The child imports the package itself. With `fresh`, it starts a new Python instead, as `python -m` in a shell does.

A request is one line of JSON on standard input: the arguments of `run`. The answer is two lines on standard output: the
process id at the start, and the exit code at the end.
"""

import functools
import gc
import importlib
import json
import os
import resource
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

PRELOADED = ("torch.utils.tensorboard", "lightning.pytorch.trainer.call", "hydra", "matplotlib.pyplot", "datasets")


def serve() -> dict[str, Any]:
    """Fork for each request. Returns the request in the child, and never in the parent."""
    sys.modules["tensorflow"] = None  # type: ignore[assignment]  # TensorBoard works without it, and starts faster
    for number in (signal.SIGTERM, signal.SIGHUP):  # `nohup` and a shell's & ignore signals
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # the collector of a child would copy the memory of all these objects
    print("ready", flush=True)
    for line in sys.stdin:
        assert len(os.listdir("/proc/self/task")) == 1, "a fork with several threads can hang"
        if (child := os.fork()) == 0:
            return json.loads(line)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    sys.exit()


def run(module: str, arguments: list[str], cwd: str, log: str, temporary: str, fresh: bool = False, **stop: Any):
    """Run `python -m module arguments`. Standard output, errors and the points that it reaches go to files `log`.*."""
    os.chdir(cwd)
    os.environ["TMPDIR"] = temporary
    for descriptor, path in enumerate((os.devnull, f"{log}.out", f"{log}.err")):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644), descriptor)
    if fresh:
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and a new program inherits that
            signal.signal(number, signal.SIG_DFL)
        os.execv(sys.executable, [sys.executable, "-m", module, *arguments])
    sys.stdin, tempfile.tempdir, sys.path[0], sys.argv = open(0), None, cwd, [module, *arguments]  # noqa: SIM115
    Points(f"{log}.trace", **stop)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


class Points:
    """Writes down the points that this process reaches, such as "before rename last.ckpt", and acts at one of them.

    Args:
        at: number of the point, from 1; 0 for none.
        number: the signal that the process sends to itself there.
        hang: sleep after the signal.
        limit: instead of a signal, the kernel kills the process when it writes more than this many bytes to a file.
    """

    def __init__(self, trace: str, at: int = 0, number: int = 0, hang: bool = False, limit: int | None = None):
        import torch
        from lightning.pytorch.trainer import call

        self.at, self.number, self.hang, self.limit, self.count = at, number, hang, limit, 0
        self.trace = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self.reach("start")
        for name in ("replace", "rename"):
            self.wrap(os, name, lambda source, target, **_: _inside(target, "rename"))
        for name in ("unlink", "remove"):
            self.wrap(os, name, lambda path, **_: _inside(path, "remove"))
        self.wrap(os, "fsync", lambda file: _inside(os.readlink(f"/proc/self/fd/{_descriptor(file)}"), "sync"))
        self.wrap(torch, "save", lambda *_, **__: "save")
        self.wrap(torch, "searchsorted", lambda *_, **__: "token")  # the engine draws each token with it
        self.wrap(call, "_call_callback_hooks", lambda _, name, *__, **___: name)

    def wrap(self, owner: Any, name: str, label: Callable[..., str | None]) -> None:
        """Make the calls of a function points. `label` gets the arguments, and returns None for calls to leave out."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            point = label(*args, **kwargs)
            self.reach(point and f"before {point}")
            result = function(*args, **kwargs)
            self.reach(point and f"after {point}")
            return result

        setattr(owner, name, wrapper)

    def reach(self, point: str | None) -> None:
        if point is None:
            return
        self.count += 1
        os.write(self.trace, f"{point}\n".encode())
        if self.count == self.at and self.limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the kernel sends it; Python ignores it otherwise
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.limit))
        elif self.count == self.at:
            os.kill(os.getpid(), self.number)
            if self.hang:
                os.write(self.trace, b"hangs\n")
                time.sleep(600)


def _inside(path: Any, what: str) -> str | None:
    """What happens to a file in the working directory; None for other files, such as those of libraries."""
    path = os.path.relpath(os.fspath(path))
    return None if path.startswith("..") else f"{what} {path}"


def _descriptor(file: Any) -> int:
    return file if isinstance(file, int) else int(file.fileno())


if __name__ == "__main__":
    run(**serve())
