"""How a command starts: Hydra reads the settings, `config.check` checks them, and the task gets plain dataclasses."""

import functools
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import hydra
from hydra import version
from hydra._internal.utils import _run_hydra, get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minigpt_pl import config
from minigpt_pl.cli.errors import (
    exit_with,
    explain,
    no_such_setting,
    one_line_errors,
    print_problem,
    problem_of,
    raise_for_flags,
)
from minigpt_pl.cli.help import each_setting, print_help
from minigpt_pl.errors import InputError

_PACKAGE = Path(__file__).parents[1]
# In a wheel conf/ is inside the package. In a checkout the two are in the same folder.
CONFIG_DIR = str(next(folder for folder in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if folder.is_dir()))
_GROUPS = [path.name for path in Path(CONFIG_DIR).iterdir() if path.is_dir()]
# With 1, Hydra raises its errors instead of printing them. The task and its processes get the user's value.
_FULL_ERROR = "HYDRA_FULL_ERROR"


def register_schemas() -> None:
    """Register the typed settings with Hydra, under the names that conf/ uses."""
    groups = {"imdb": "data", "text": "data", "wandb": "logger"}
    for name in ("train", "prepare", "doctor", "sample", "convert", "explore", "evaluate", "export", "play", *groups):
        schema = getattr(config, f"{name.capitalize()}Config")
        ConfigStore.instance().store(f"{name}_schema", schema, groups.get(name))


def run(
    config_name: str,
    task: Callable[..., object],
    prepare: Callable[[list[str]], list[str]] = lambda overrides: overrides,
) -> None:
    """Read `conf/<config_name>.yaml` and the command line, check the settings, and call `task` with them.

    Bad input prints one line per problem and exits with code 2. HYDRA_FULL_ERROR=1 shows the traceback instead.
    `prepare` may change the overrides (`name=value`) before Hydra reads them.
    """
    if sys.stdout is None:
        exit_with("standard output is closed; leave it open, or send it to a file with > FILE")
    register_schemas()
    version.setbase("1.3")
    full_error = os.environ.get(_FULL_ERROR) == "1"
    handled: Any = nullcontext if full_error else one_line_errors
    show_help = started = False

    @functools.wraps(task)  # Hydra names the job after the task's file
    def job(composed: DictConfig) -> None:
        nonlocal started
        started = True
        os.environ[_FULL_ERROR] = str(int(full_error))
        _start_logging()  # again, because the process of a launcher starts here
        try:
            with nullcontext() if in_sweep() else handled():  # a sweep raises the error after its last job
                if show_help:
                    print_help(composed)
                else:
                    task(to_settings(composed))
        finally:
            os.environ[_FULL_ERROR] = "1"

    os.environ[_FULL_ERROR] = "1"
    try:
        with handled():
            # hydra.main() refuses overrides on both sides of a flag. Lightning appends some for its processes.
            parser = get_args_parser()
            parser.allow_abbrev = False  # otherwise --experiment means --experimental-rerun
            parser.error = lambda message: exit_with(f"{message}; --hydra-help lists the flags")  # type: ignore
            settings = OmegaConf.structured(getattr(config, f"{config_name.capitalize()}Config"))
            raise_for_flags(sys.argv[1:], {*_GROUPS, *(name for name, *_ in each_setting(settings))})
            args = parser.parse_intermixed_args()
            if args.help:
                show_help, args.help, args.multirun = True, False, False
            if args.info is None:  # --info prints its own log
                _start_logging()
            if without_name := [override for override in args.overrides if override.startswith("=")]:
                raise InputError(f'{without_name[0]}: write SETTING=VALUE without spaces, as in prompt="the cat"')
            if wrong := [
                o for o in args.overrides if re.fullmatch(rf"\+*({'|'.join(_GROUPS)}|hydra)=([\d.[\]]*|null)", o)
            ]:
                raise InputError(*(f"{override}: is not a choice; --help lists them" for override in wrong))
            # Users write +experiment=mine. Hydra refuses a + in front of a group that is already in the defaults list.
            overrides = [re.sub(r"^\+(?=(experiment|debug)=)", "", o) for o in args.overrides]
            top_k = re.compile(r"\+*(text_generator\.)?top_k=")  # users write top_k=all, or none, for top_k=null
            args.overrides = prepare(
                [re.sub(r"\b(all|[Nn]one)\b", "null", o) if top_k.match(o) else o for o in overrides]
            )
            _run_hydra(args, parser, job, CONFIG_DIR, config_name)
    except Exception as error:
        if full_error or started:
            raise
        exit_with(explain(error))


def _start_logging() -> None:
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    for library in ("httpx", "matplotlib"):
        logging.getLogger(library).setLevel(logging.WARNING)
    warnings.showwarning = lambda message, *_, **__: print_problem("warning", message)


def to_settings(composed: DictConfig) -> Any:
    """Convert Hydra's configuration to our dataclasses, and check it.

    Raises:
        InputError: one line per problem.
    """
    problems = []
    for name, value, field in each_setting(composed):
        if field is None:  # from +name=value
            problems.append(f"{name}: {no_such_setting(name, composed)}")
        elif value == config.REQUIRED:
            problems.append(f"{name}={value}: must be given ({field.metadata['doc']})")
    if problems:
        raise InputError(*problems)
    try:
        settings = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:  # ${name} refers to nothing
        raise InputError(explain(error)) from error
    config.check(settings)
    return settings


def change(settings: Any, **values: Any) -> Any:
    """Copy the settings with other values, and check the copy. Texts are converted to the types of the settings.

    Raises:
        InputError: one line per problem.
    """
    typed, problems = OmegaConf.structured(settings), []
    for name, value in values.items():
        try:
            typed[name] = None if (name, value) == ("top_k", "all") else value
        except OmegaConfBaseException as error:
            problems.append(f"{name}={value}: {problem_of(error)}")
    if problems:
        raise InputError(*problems)
    return to_settings(typed)


def compose(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """Compose `conf/<config_name>.yaml` with these overrides, without the command line. For resumed runs and tests."""
    register_schemas()
    started = GlobalHydra.instance().is_initialized()
    with nullcontext() if started else hydra.initialize_config_dir(CONFIG_DIR, version_base="1.3"):
        return hydra.compose(config_name, overrides=list(overrides))


def in_sweep() -> bool:
    """Whether this is one job of several (`-m`)."""
    return bool(HydraConfig.get().mode == RunMode.MULTIRUN)
