"""Turns every error into one line on standard error and an exit code."""

import difflib
import errno
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from itertools import zip_longest
from typing import Any, NoReturn

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import ListConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    ConfigTypeError,
    InterpolationResolutionError,
    OmegaConfBaseException,
    ValidationError,
)

from minigpt_pl.cli.help import choices_of, each_setting
from minigpt_pl.config import type_words
from minigpt_pl.errors import InputError

# Whether this process prints its errors. `train` replaces it, because several processes can have the same error.
claims_error: Callable[[], bool] = lambda: True  # noqa: E731


def exit_with(*problems: str) -> NoReturn:
    """Print `error: <problem>` for each problem and exit with code 2."""
    if claims_error():
        for problem in problems:
            print_problem("error", problem)
    sys.exit(2)


def print_problem(kind: str, problem: object) -> None:
    """Print one short line to standard error. Escapes control characters, which could move a terminal's cursor.

    Problems are written for Python. On the command line, None is null.
    """
    line = re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], str(problem))
    line = re.sub(r"(?<=\bor )None\b|\bNone(?= means\b)", "null", line)
    line = line if len(line) < 1000 else f"{line[:300]} ... {line[-300:]}"
    print(f"{kind}: {line}", file=sys.stderr)


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
        if error.override.endswith(","):
            return f"{error.override}: ends with a comma; write several values without spaces, as in [a,b] or a,b"
        return f"{error.override}: cannot be read; put quotes around the value, as in 'name=\"a, b\"'"
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        choices = choices_of(error.options)
        similar = "".join(f"did you mean {name}? " for name in difflib.get_close_matches(choice, choices, 1))
        remedy = f"{similar}choose from {', '.join(choices)}, or add your own files with --config-dir"
        return f"{group}={choice}: no such choice; {remedy}"
    if isinstance(error, OSError) and error.filename:
        return f"hydra: cannot create {error.filename} ({error.strerror}); give another hydra.run.dir"
    if found := re.match("Could not delete from config. '(.*)' does not exist", text):
        return f"~{found[1]}: has no value to delete; set one, as in {found[1]}=VALUE (--help lists the settings)"
    if found := re.match("Could not override '(.*)'. No match in the defaults list", text):
        return f"{found[1]}: is not a setting of this command; leave it out (--help lists the settings)"
    if found := re.match("Ambiguous value for argument '(.*)'", text):
        name, _, value = found[1].partition("=")
        remedy = "0.5 instead of 0,5" if re.fullmatch(r"\d+,\d+", value) else f"'{name}=[{value}]' for a list"
        return f"{found[1]}: has several values; write {remedy}, or add -m to sweep"
    cause = error if isinstance(error, InterpolationResolutionError) else error.__cause__ or error.__context__ or error
    if not isinstance(cause, OmegaConfBaseException):
        return " ".join(text.split())
    override = re.search(r"(?:Error merging override|append to your config use) \+*(.*)", text)
    setting = override[1] if override else cause.full_key or getattr(error, "full_key", None)
    file = re.match("In '(.*?)':", text)
    return f"{setting or 'settings'}: {problem_of(cause)}{f' (in {file[1]}.yaml)' if file else ''}"


def no_such_setting(name: str, composed: Any) -> str:
    """Problem and remedy of an unknown setting, with the known name that is most like it."""
    group, _, wanted = name.rpartition(".")
    known = [other for other, _, field in each_setting(composed) if field is not None and "doc" in field.metadata]
    known.sort(key=lambda other: not other.startswith(f"{group}."))  # first those of the same group
    by_last = {other.rpartition(".")[2]: other for other in reversed(known)}
    similar = [last for last in by_last if len(wanted) >= 3 and wanted in last][::-1]
    similar = similar or difflib.get_close_matches(wanted, by_last, 1)
    return f"no such setting; {f'did you mean {by_last[similar[0]]}? ' if similar else ''}--help lists them"


def raise_for_flags(arguments: Sequence[str], names: set[str]) -> None:
    """Refuse settings and groups that are written as flags, such as `--prompt "a film"` or `--experiment=quick`.

    Raises:
        InputError: one line for each.
    """
    problems = []
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        flag, _, value = argument.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and name in names and flag != "--run":  # --run is a flag of Hydra
            value = value or ("VALUE" if not following or following.startswith("-") or "=" in following else following)
            problems.append(f"{flag}: is a setting; write {name}=" + (f'"{value}"' if " " in value else value))
    if problems:
        raise InputError(*problems)


def problem_of(error: OmegaConfBaseException) -> str:
    """Problem and remedy of an error, without the setting."""
    node: Any = error.parent_node
    key = error.key
    if isinstance(error, ConfigAttributeError | ConfigKeyError):
        return no_such_setting(str(error.full_key), node._get_root())
    if isinstance(node, ListConfig) or (node is not None and key is None):  # of the list or group as a whole
        node, key = node._get_parent(), node._key()
    field = getattr(OmegaConf.get_type(node), "__dataclass_fields__", {}).get(key)
    if "does not support deletion" in str(error):
        return "cannot be deleted; give it another value"
    if field is not None and is_dataclass(field.type):
        return f"is a group of settings; set one of them, as in {key}.{fields(field.type)[0].name}=VALUE"
    reason = str(error).splitlines()[0]
    if isinstance(error, InterpolationResolutionError):
        return f"{reason}; write '${{NAME}}' with the name of another setting, or a plain value"
    if reason.startswith("Merge error"):
        return "these choices do not fit together; choose one file of each group"
    if isinstance(error, ValidationError | ConfigTypeError) and field is not None and "doc" in field.metadata:
        return f"must be {type_words(field.type)}"
    return reason
