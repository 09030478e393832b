"""Turns every error into one line on standard error and an exit code."""

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

from minigpt_pl.cli.help import choices_of
from minigpt_pl.config import type_words
from minigpt_pl.errors import InputError


def exit_with(*problems: str) -> NoReturn:
    """Print `error: <problem>` for each problem and exit with code 2."""
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    sys.exit(2)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Exit without a traceback after bad input (code 2), a full disk (2), a closed pipe (1) or Ctrl-C (130)."""
    try:
        yield
        sys.stdout.flush()
    except InputError as error:
        exit_with(*error.problems)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EDQUOT):
            raise
        # Python flushes standard output again when it exits, and would report the same error again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:  # the reader has closed the pipe, as `| head` does
            sys.exit(1)
        exit_with(f"{error.filename or 'output'}: no space left on the disk; free some space and start again")


def explain(error: Exception) -> str:
    """Shorten an error of Hydra or OmegaConf to one line with setting, problem and remedy."""
    text = str(error)
    if isinstance(error, OverrideParseException):
        if "=" not in error.override:
            return f"{error.override}: is not a setting; write SETTING=VALUE, as in seed=1 (--help lists the settings)"
        return f"{error.override}: cannot be read; put quotes around the value, as in 'name=\"a, b\"'"
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        choices = ", ".join(choices_of(error.options))
        return f"{group}={choice}: no such choice; choose from {choices}, or add your own files with --config-dir"
    if found := re.match("Ambiguous value for argument '(.*)'", text):
        return f"{found[1]}: has several values; write [a,b] for a list, quote a text, or add -m to sweep"
    cause = error.__cause__ or error.__context__ or error
    if not isinstance(cause, OmegaConfBaseException):
        return " ".join(text.split())
    override = re.search(r"(?:Error merging override|append to your config use) \+*(.*)", text)
    setting = override[1] if override else cause.full_key or getattr(error, "full_key", None)
    file = re.match("In '(.*?)':", text)
    return f"{setting or 'settings'}: {problem_of(cause)}{f' (in {file[1]}.yaml)' if file else ''}"


def problem_of(error: OmegaConfBaseException) -> str:
    """Problem and remedy of an error, without the setting."""
    if isinstance(error, ConfigAttributeError | ConfigKeyError):
        return "no such setting; --help lists them"
    field = getattr(error.object_type, "__dataclass_fields__", {}).get(error.key)
    if isinstance(error, ValidationError) and field is not None and "doc" in field.metadata:
        return f"must be {type_words(field.type)}"
    return str(error).splitlines()[0]
