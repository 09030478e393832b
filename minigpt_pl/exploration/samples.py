"""The texts of an exploration: what is to be made, and `samples.jsonl`, to which they are added as they are made."""

import itertools
import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm  # comes with lightning

from minigpt_pl.config import GRID, ExploreConfig
from minigpt_pl.errors import InputError
from minigpt_pl.files import write_text
from minigpt_pl.generation.prompts import encode_prompts, unknown_words
from minigpt_pl.generation.text import TextModel, generate_texts

SAMPLES, PLAN = "samples.jsonl", "plan.json"
GREEDY = {"temperature": 0.0, "top_k": 1, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}
MANY = 10_000  # texts; more are made only when it is confirmed

Setting = dict[str, Any]
Sample = dict[str, Any]


def read_prompts(path: Path) -> list[tuple[str, str]]:
    """(kind, prompt) of a YAML file that maps kinds to lists of prompts.

    Raises:
        InputError: it cannot be read, has another form, holds no prompt, or one twice.
    """
    try:
        contents = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"prompts={path}: cannot be read ({reason}); give a YAML file, kind: [prompts]") from error
    if not isinstance(contents, dict) or not all(isinstance(group, list) for group in contents.values()):
        raise InputError(f"prompts={path}: must map each kind to a list, as in short: [this movie is, the end]")
    prompts = [(str(kind), prompt) for kind, group in contents.items() for prompt in group]
    if not prompts:
        raise InputError(f"prompts={path}: holds no prompt; write some, as in short: [this movie is, the end]")
    seen = set()
    for _, prompt in prompts:
        if not isinstance(prompt, str):
            raise InputError(f"prompts={path}: {prompt!r} is no text; write it in quotes")
        if prompt in seen:
            raise InputError(f"prompts={path}: {prompt!r} stands there twice; remove one")
        seen.add(prompt)
    return prompts


def settings_grid(config: ExploreConfig) -> list[Setting]:
    """All values of the controls with each other.

    What is greedy (temperature 0 or top_k 1) writes one text whatever its temperature, seed and other cuts: such
    settings are one, named by temperature 0 and top_k 1.
    """
    grid: list[Setting] = []
    for values in itertools.product(*(getattr(config, name) for name in GRID)):
        setting = dict(zip(GRID, values, strict=True))
        if is_greedy(setting):
            setting |= GREEDY
        if setting not in grid:
            grid.append(setting)
    return grid


def is_greedy(setting: Setting) -> bool:
    return setting["temperature"] == 0 or setting["top_k"] == 1


def label(setting: Setting, varied: Sequence[str]) -> str:
    """A setting's short name: the controls that the grid varies."""
    if is_greedy(setting):
        others = [name for name in varied if name not in GREEDY]
        return " ".join(["greedy", *(f"{name}={value_text(setting[name])}" for name in others)])
    return " ".join(f"{name}={value_text(setting[name])}" for name in varied) or "the only setting"


def varied_controls(grid: Sequence[Setting]) -> list[str]:
    """The controls of which the grid has several values, greedy settings aside."""
    open_settings = [setting for setting in grid if not is_greedy(setting)]
    return [name for name in GRID if len({setting[name] for setting in open_settings}) > 1]


def value_text(value: float | None) -> str:
    """A control's value; None sets no limit."""
    return "all" if value is None else f"{value:g}"


def check_grid(config: ExploreConfig, model: TextModel, prompts: Sequence[tuple[str, str]]) -> list[Setting]:
    """The grid, once it is known that the model can write for it.

    Raises:
        InputError: one line for each value that no text could be written with, for prompts without a known word, and
            for more than `MANY` texts without `confirm`.
    """
    problems = [f"{name}=[]: must hold a value" for name in GRID if not getattr(config, name)]
    grid = [] if problems else settings_grid(config)
    for k in config.top_k:
        if k is not None and k > model.network.vocab_size:
            problems.append(f"top_k={k}: the model knows {model.network.vocab_size} words; give at most that, or null")
    for count in config.min_tokens:
        if count > config.num_tokens:
            problems.append(f"min_tokens={count}: must be at most num_tokens={config.num_tokens}")
    if problems:
        raise InputError(*problems)
    encode_prompts(model.tokenizer, [prompt for _, prompt in prompts], "prompts: prompt")
    count = sum(len(seeds_of(config, setting)) for setting in grid) * len(prompts)
    if count > MANY and not config.confirm:
        start = time.monotonic()
        trial = generate_texts(model, [prompts[0][1]] * 32, config.num_tokens, seed=0)
        minutes = (time.monotonic() - start) / len(trial) * count / 60
        raise InputError(
            f"confirm=false: {count:,} texts ({len(prompts)} prompts, {len(grid)} settings, {config.num_seeds} seeds),"
            f" some {minutes:,.0f} minutes of writing and about {count / 1e3:,.0f} MB; add confirm=true, or try less"
        )
    return grid


def seeds_of(config: ExploreConfig, setting: Setting) -> range:
    return range(config.seed, config.seed + (1 if is_greedy(setting) else config.num_seeds))


def make_samples(
    config: ExploreConfig, model: TextModel, prompts: Sequence[tuple[str, str]], grid: Sequence[Setting], folder: Path
) -> tuple[list[Sample], list[str]]:
    """Write the texts that `samples.jsonl` does not have yet, and return all in the grid's order.

    Returns:
        The samples, and a line for each setting that no text could be written with, of which there are then none.

    Raises:
        InputError: the folder belongs to another exploration.
    """
    _hold_to_plan(config, model, prompts, grid, folder)
    path = folder / SAMPLES
    made = {_key(sample): sample for sample in read_samples(path)}
    write_text(path, "".join(_line(sample) for sample in made.values()))  # without a line that was cut short
    broken = []
    with path.open("a", encoding="utf-8") as file, _progress(len(grid), "Writing", " settings") as bar:
        for setting in grid:
            seeds = seeds_of(config, setting)
            missing = [
                (kind, prompt) for kind, prompt in prompts
                if any((prompt, seed, *setting.values()) not in made for seed in seeds)
            ]  # fmt: skip
            try:
                samples = list(write_texts(config, model, missing, setting, seeds)) if missing else []
            except InputError as error:
                broken.append(f"{label(setting, varied_controls(grid))}: {error}")
                samples = []
            for sample in samples:
                made[_key(sample)] = sample
                file.write(_line(sample))
            file.flush()
            bar.update()
    order = [(prompt, seed, *setting.values())
             for setting in grid for _, prompt in prompts for seed in seeds_of(config, setting)]  # fmt: skip
    return [made[key] for key in order if key in made], broken


def write_texts(
    config: ExploreConfig, model: TextModel, prompts: Sequence[tuple[str, str]], setting: Setting, seeds: range
) -> Iterator[Sample]:
    """A sample for each prompt and seed, not yet measured."""
    texts = generate_texts(
        model, [prompt for _, prompt in prompts], config.num_tokens, seed=seeds[0], num_samples=len(seeds),
        banned_words=config.banned_words, **setting,
    )  # fmt: skip
    for (kind, prompt), group in zip(prompts, texts, strict=True):
        asked = model.tokenizer.encode(prompt).ids
        for seed, text in zip(seeds, group, strict=True):
            ids = model.tokenizer.encode(text).ids[len(asked) :]
            yield {
                "prompt": prompt, "kind": kind, "settings": setting, "num_tokens": config.num_tokens, "seed": seed,
                "unknown_in_prompt": unknown_words(model.tokenizer, prompt), "text": text,
                "words": [model.tokenizer.id_to_token(id_) for id_ in ids], "prompt_ids": asked, "ids": ids,
            }  # fmt: skip


def read_samples(path: Path) -> list[Sample]:
    """The samples of a file; a last line that was cut short is left out."""
    if not path.is_file():
        return []
    *lines, rest = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines]


def write_samples(path: Path, samples: Iterable[Sample]) -> None:
    """All of them anew, aside and renamed."""
    write_text(path, "".join(_line(sample) for sample in samples))


def _line(sample: Sample) -> str:
    return json.dumps(without_nan(sample), ensure_ascii=False) + "\n"


def without_nan(value: Any) -> Any:
    """JSON has no nan: null."""
    if isinstance(value, dict):
        return {name: without_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _key(sample: Sample) -> tuple:
    return (sample["prompt"], sample["seed"], *sample["settings"].values())


def _hold_to_plan(
    config: ExploreConfig, model: TextModel, prompts: Sequence[tuple[str, str]], grid: Sequence[Setting], folder: Path
) -> None:
    """A folder holds one exploration: the same command goes on with it, another is refused."""
    checkpoint = model.checkpoint
    plan = {
        "checkpoint": checkpoint.name, "size": checkpoint.stat().st_size, "modified": checkpoint.stat().st_mtime,
        "num_tokens": config.num_tokens, "seed": config.seed, "num_seeds": config.num_seeds,
        "banned_words": config.banned_words, "prompts": [list(prompt) for prompt in prompts], "settings": list(grid),
    }  # fmt: skip
    path = folder / PLAN
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else plan
    if changed := [name for name in plan if before.get(name) != plan[name]]:
        raise InputError(
            f"folder={folder}: holds an exploration with other {', '.join(changed)}; give folder=ANOTHER, or remove it"
        )
    write_text(path, json.dumps(plan, indent=2, ensure_ascii=False) + "\n")


def _progress(total: int, doing: str, unit: str) -> tqdm:
    return tqdm(total=total, desc=doing, unit=unit, disable=None, leave=False)
