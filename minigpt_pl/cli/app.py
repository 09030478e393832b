"""How an entry point starts: Hydra reads the settings, `config.check` looks at them, bad input ends with code 2."""

import errno
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minigpt_pl.config import (
    ConvertConfig,
    EvaluateConfig,
    ExploreConfig,
    ImdbConfig,
    SampleConfig,
    TextConfig,
    TrainConfig,
    WandbConfig,
    check,
)
from minigpt_pl.errors import InputError

_PACKAGE = Path(__file__).parents[1]
# In a wheel conf/ lies inside the package, in a checkout beside it.
CONFIG_DIR = str(next(folder for folder in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if folder.is_dir()))
_FULL_ERROR = "HYDRA_FULL_ERROR"


def register_schemas() -> None:
    """Make the typed settings known to Hydra, under the names that conf/ uses."""
    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainConfig)
    store.store(name="sample_schema", node=SampleConfig)
    store.store(name="convert_schema", node=ConvertConfig)
    store.store(name="explore_schema", node=ExploreConfig)
    store.store(name="evaluate_schema", node=EvaluateConfig)
    store.store(group="data", name="imdb_schema", node=ImdbConfig)
    store.store(group="data", name="text_schema", node=TextConfig)
    store.store(group="logger", name="wandb_schema", node=WandbConfig)


def run(
    config_name: str,
    schema: type,
    task: Callable[..., None],
    prepare: Callable[[list[str]], list[str]] = lambda arguments: arguments,
) -> None:
    """Compose `conf/<config_name>.yaml` with the command line, check it, and call `task` with plain settings.

    Args:
        schema: the class of the settings.
        task: gets an instance of it.
        prepare: changes the arguments of the command line before Hydra reads them.

    Bad input prints one line for each problem and exits with code 2; with HYDRA_FULL_ERROR=1 it raises.
    """
    register_schemas()
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    for library in ("httpx", "matplotlib"):
        logging.getLogger(library).setLevel(logging.WARNING)
    if sys.stdout is None:
        _exit_for(["standard output is closed; leave it open, or send it to a file with > FILE"])
    # Hydra's parser reads a sweep's -m before or after the settings, not among them.
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda argument: argument not in ("-m", "--multirun"))
    before = os.environ.get(_FULL_ERROR)
    if odd := [argument for argument in sys.argv[1:] if not re.match(r"-|\+{0,2}[A-Za-z_][\w./@]*=", argument)]:
        _exit_for([f"{argument}: not a setting; give SETTING=VALUE, or --help" for argument in odd])

    @hydra.main(version_base="1.3", config_path=CONFIG_DIR, config_name=config_name)
    def start(composed: DictConfig) -> None:
        os.environ[_FULL_ERROR] = before or "0"
        with _tidy_end(raises=before == "1"):
            task(to_settings(composed))

    os.environ[_FULL_ERROR] = "1"  # so that Hydra raises what is wrong with the settings, and the words below are ours
    try:
        with _tidy_end(raises=before == "1"):
            if "--help" in sys.argv:
                _print_help(config_name, schema)
                return
            sys.argv[1:] = prepare(sys.argv[1:])
        start()
    except (HydraException, OmegaConfBaseException) as error:
        if before == "1":
            raise
        _exit_for(_composition_problems(config_name, error))
    except KeyboardInterrupt:
        sys.exit(130)


@contextmanager
def _tidy_end(raises: bool) -> Iterator[None]:
    """Bad input, a reader that has gone and a full disk end the process without a traceback."""
    try:
        yield
        sys.stdout.flush()
    except InputError as error:
        if raises:
            raise
        _exit_for(error.problems)
    except BrokenPipeError:  # the reader of our output has gone, as `head` does; Python would complain at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _exit_for([f"{error.filename or 'output'}: no space is left to write; what was written before stands"])


def _exit_for(problems: Sequence[str]) -> None:
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    sys.exit(2)


def to_settings(composed: DictConfig) -> object:
    """A composed configuration as checked instances of the classes in `config`.

    Raises:
        InputError: one line for each problem.
    """
    missing = OmegaConf.missing_keys(composed)
    if missing:
        raise InputError(*(f"{name}=: must be given, as in {name}=VALUE" for name in sorted(missing)))
    if added := sorted(_added(composed)):  # +name=value
        raise InputError(*(f"{name}: no such setting; --help lists them" for name in added))
    settings = OmegaConf.to_object(composed)
    check(settings)
    return settings


def change(config: Any, **values: Any) -> Any:
    """The settings with other values, text among them converted, checked as those of the command line are.

    Raises:
        InputError: one line for each problem.
    """
    typed, problems = OmegaConf.structured(config), []
    for name, value in values.items():
        try:
            typed[name] = value
        except OmegaConfBaseException as error:
            problems.append(f"{name}={value}: {_one_line(error)}")
    if problems:
        raise InputError(*problems)
    changed = OmegaConf.to_object(typed)
    check(changed)
    return changed


def _added(node: DictConfig, prefix: str = "") -> Iterator[str]:
    known = {field.name for field in fields(OmegaConf.get_type(node))}
    for name in node:
        if name not in known:
            yield f"{prefix}{name}"
        elif is_dataclass(OmegaConf.get_type(node, name)):
            yield from _added(node[name], f"{prefix}{name}.")


def compose(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """`conf/<config_name>.yaml` with other settings than this command line's: for resumed runs and tests."""
    register_schemas()
    started = GlobalHydra.instance().is_initialized()
    with nullcontext() if started else hydra.initialize_config_dir(CONFIG_DIR, version_base="1.3"):
        return hydra.compose(config_name, overrides=list(overrides))


def overrides_given() -> list[str]:
    """The settings on this command line (in a sweep, of this job)."""
    return list(HydraConfig.get().overrides.task)


def group_choice(group: str) -> str | None:
    """Which file of conf/<group>/ is in use."""
    return HydraConfig.get().runtime.choices.get(group)


def in_sweep() -> bool:
    """Whether this is one job of several (`-m`)."""
    return HydraConfig.get().mode == RunMode.MULTIRUN


def _composition_problems(config_name: str, error: Exception) -> list[str]:
    """Hydra stops at the first wrong setting; try them one by one and name them all."""
    given = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    groups = [argument for argument in given if (Path(CONFIG_DIR) / argument.split("=")[0].lstrip("+~")).is_dir()]
    accepted: list[str] = []
    problems = []
    GlobalHydra.instance().clear()
    for override in [*groups, *(argument for argument in given if argument not in groups)]:
        try:
            compose(config_name, [*accepted, override])
            accepted.append(override)
        except (HydraException, OmegaConfBaseException) as problem:
            problems.append(f"{override}: {_one_line(problem)}")
    try:
        to_settings(compose(config_name, accepted))
    except InputError as unusable:
        problems += unusable.problems
    return problems or [_one_line(error)]


_WANTED = {  # what OmegaConf says of a value of another type -> what the user needs to know
    "could not be converted to Integer": "must be a whole number",
    "could not be converted to Float": "must be a number",
    "is not a valid bool": "must be true or false",
    "is not a ListConfig": "must be a list, as in [a, b]",
}


def _one_line(error: Exception) -> str:
    """The telling part of Hydra's and OmegaConf's messages, which run over several lines."""
    if isinstance(error, MissingConfigException) and error.options:
        choices = [name for name in error.options if name != "common" and not name.endswith("_schema")]
        return f"no such choice; one of {', '.join(choices)}"
    cause = error.__cause__ or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("full_key:", "object_type=", "reference_type="))]
    if "LexerNoViableAltException" in lines[0] or "no viable alternative" in lines[0] or "mismatched input" in lines[0]:
        return "not readable as a setting; quote the value, as in 'name=\"a, b\"'"
    if any(line.startswith("Key ") or "is not in struct" in line for line in lines):
        return "no such setting; --help lists them"
    return next((ours for theirs, ours in _WANTED.items() if theirs in lines[0]), " ".join(lines))


def _print_help(config_name: str, schema: type) -> None:
    """Every setting with its value and its meaning, and the choices of each group."""
    print(f"{schema.__doc__}\n\nSETTING=VALUE ..., where SETTING is one of\n")
    for group in sorted(path for path in Path(CONFIG_DIR).iterdir() if path.is_dir() and schema is TrainConfig):
        choices = sorted(path.stem for path in group.glob("*.yaml") if path.stem != "common")
        print(f"  {group.name}={'|'.join(choices)}")
    print()
    given = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    _print_settings(compose(config_name, given), "")


def _print_settings(settings: DictConfig, prefix: str) -> None:
    values = OmegaConf.to_container(settings, resolve=False)
    for field in fields(OmegaConf.get_type(settings)):
        name = prefix + field.name
        if is_dataclass(OmegaConf.get_type(settings, field.name)):
            _print_settings(settings[field.name], f"{name}.")
            continue
        value = json.dumps(values[field.name]) if not isinstance(values[field.name], str) else values[field.name]
        choices = field.metadata["choices"]
        print(f"  {name}={value}\n      {field.metadata['doc']}{'; one of ' + ', '.join(choices) if choices else ''}")
