"""Signals that end a training: Ctrl-C, and the signals of schedulers. The imports of this file take no time."""

import os
import signal
import threading
from collections.abc import Callable, Mapping
from typing import Any

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
SIGNALS = [signal.Signals[name] for name in _NAMES if name in signal.Signals.__members__]  # Windows has only two


# What remains to do before a process ends at once. Returns the exit code. `train` replaces it, for several processes.
before_exit: Callable[[int], int] = lambda number: 128 + number  # noqa: E731


# What the user can do after `exit_at_once`. `fit` replaces it as soon as the run has a folder.
advice = "No run was started."


class Interrupted(BaseException):
    """A signal has stopped the training.

    Args:
        number: the signal.
    """

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def exit_at_once(number: int, frame: Any = None) -> None:
    """Handle a signal: end the process without a checkpoint. No file is damaged, because files are written atomically.

    The exit code is 128 + number, as shells write it.
    """
    set_handlers(dict.fromkeys(SIGNALS, lambda number, frame: os._exit(128 + number)))
    say(f"{signal.Signals(number).name}: stopped at once. {advice}")
    os._exit(before_exit(number))


def ignore(number: int, frame: Any) -> None:
    """Handle a signal: go on. Other programs that this process starts do not ignore it, unlike with SIG_IGN."""


def say(line: str) -> None:
    """Print a line to standard error. In a signal handler, `print` could interrupt another `print` and fail."""
    os.write(2, f"{line}\n".encode())


def set_handlers(handlers: Mapping[signal.Signals, Any]) -> dict[signal.Signals, Any]:
    """Install handlers and return the old ones. Ignored signals stay ignored: `nohup` ignores SIGHUP.

    SIGUSR1 and SIGUSR2 are handled even then: examples/slurm/torchrun.sh ignores them for torchrun itself.

    Does nothing outside the main thread, because Python accepts handlers only there.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    names = ("SIGUSR1", "SIGUSR2")
    used = [n for n in handlers if n.name in names or signal.getsignal(n) is not signal.SIG_IGN]
    return {number: signal.signal(number, handlers[number]) for number in used}
