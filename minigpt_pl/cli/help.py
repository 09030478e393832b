"""The text of `--help`."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import Field, is_dataclass
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from omegaconf import DictConfig, OmegaConf

_FLAGS = """
Some flags of Hydra (--hydra-help lists all):

  -m                   one job for each combination of values, as in -m seed=1,2
  --cfg job            print the settings as YAML
  --config-dir FOLDER  use your own files too: experiment=mine reads FOLDER/experiment/mine.yaml"""


def print_help(composed: DictConfig) -> None:
    """Print the choices of each group, and every setting with its value and meaning."""
    print(f"{OmegaConf.get_type(composed).__doc__}\n\nWrite them as SETTING=VALUE.")
    loader = GlobalHydra.instance().config_loader()
    groups = [group for group in sorted(HydraConfig.get().runtime.choices) if not group.startswith("hydra/")]
    print("\nGroups (choose a file of conf/):\n" if groups else "", end="")
    for group in groups:
        print(f"  {group}={'|'.join(choices_of(loader.get_group_options(group, ObjectType.CONFIG)))}")
    print("\nSettings:")
    for name, value, field in each_setting(composed):
        print(f"  {name}={value if isinstance(value, str) else json.dumps(value)}")
        if field is not None:
            print(f"      {meaning(field)}")
    print(_FLAGS)


def meaning(field: Field[Any]) -> str:
    """The description of a setting, with its choices."""
    doc, choices = field.metadata["doc"], field.metadata["choices"]
    is_listed = all(choice in doc for choice in choices)
    return doc if is_listed else f"{doc}; one of {', '.join(choices)}"


def each_setting(composed: DictConfig, prefix: str = "") -> Iterator[tuple[str, Any, Field[Any] | None]]:
    """Name, value and dataclass field of every setting. A setting added by `+name=value` has no field."""
    schema: Any = OmegaConf.get_type(composed)
    values: Any = OmegaConf.to_container(composed)
    for key, value in values.items():
        if is_dataclass(OmegaConf.get_type(composed, key)):
            yield from each_setting(composed[key], f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value, schema.__dataclass_fields__.get(key)


def choices_of(options: Sequence[str]) -> list[str]:
    """The files of a group. Hydra also lists the registered classes, which are left out."""
    return [option for option in options if not option.endswith("_schema")]
