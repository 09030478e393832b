"""The texts of an exploration: the grid of settings, and `samples.jsonl`, which grows while texts are generated."""

import difflib
import itertools
import json
import logging
import math
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm  # comes with lightning

from minigpt_pl.config import GRID, ExploreConfig
from minigpt_pl.errors import InputError
from minigpt_pl.files import read_text, write_text
from minigpt_pl.generation.prompts import encode_prompts, unknown_words
from minigpt_pl.generation.text import generate_texts
from minigpt_pl.text_model import TextModel
from minigpt_pl.tokenizer import rules_of

log = logging.getLogger(__name__)

SAMPLES, PLAN = "samples.jsonl", "plan.json"
GREEDY = {"temperature": 0.0, "top_k": 1, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}  # for all greedy settings
MAX_UNCONFIRMED = 10_000  # texts; more need confirm=true
FEW_PROMPTS = 5  # a bootstrap of fewer gives intervals that are too narrow

Setting = dict[str, Any]  # control -> value
Sample = dict[str, Any]  # a line of samples.jsonl
Prompts = Sequence[tuple[str, str]]  # (kind, prompt)


def read_prompts(path: Path) -> list[tuple[str, str]]:
    """Read (kind, prompt) from a YAML file with a list of prompts for each kind. No prompt may occur twice."""
    example = "as in short: [this movie is, the end]"
    try:
        text = read_text(path)
        contents, node = yaml.load(text, yaml.BaseLoader), yaml.compose(text)  # BaseLoader reads no and 10 as text
    except yaml.MarkedYAMLError as error:
        mark, problem = error.problem_mark, error.problem
        remedy = "write the prompt in single quotes, or put the same number of spaces before each -"
        if "quoted scalar" in (error.context or ""):
            mark, problem, remedy = error.context_mark, "a quotation mark is not closed", "close it"
        place = mark.line + 1 if mark else "unknown"
        raise InputError(f"prompts={path}: line {place}: {problem}; {remedy}") from error
    except FileNotFoundError as error:
        place = path.absolute()
        names = {file.stem: file.name for file in place.parent.glob("*.y*ml")}
        similar = "".join(f"did you mean {names[stem]}? " for stem in difflib.get_close_matches(path.stem, names, 1))
        raise InputError(f"prompts={path}: no such file; {similar}write {place}, or go to its folder") from error
    except UnicodeDecodeError as error:
        raise InputError(f"prompts={path}: is not UTF-8 text; save it as UTF-8") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"prompts={path}: cannot be read ({reason}); give a YAML file, {example}") from error
    if not isinstance(contents, dict):
        raise InputError(f"prompts={path}: must begin with a kind, such as short:, and have its prompts below it")
    if without := [kind for kind, group in contents.items() if not isinstance(group, list)]:
        remedy = "start each prompt with - and a space, or delete the name"
        raise InputError(f"prompts={path}: the kind {without[0]} has no list of prompts; {remedy}")
    kinds = [kind.value for kind, _ in node.value]
    if repeated := [kind for kind in contents if kinds.count(kind) > 1]:
        raise InputError(f"prompts={path}: the kind {repeated[0]} occurs twice; put its prompts under one name")
    for number, line in enumerate(text.splitlines(), start=1):
        if re.match(r"\s*-\s+([^'\"].*\s)?#", line):
            remedy = "write the prompt in single quotes, or the comment in a line of its own"
            raise InputError(f"prompts={path}: line {number}: the words after # do not count; {remedy}")
    prompts = [(kind, prompt) for kind, group in contents.items() for prompt in group]
    if not prompts:
        raise InputError(f"prompts={path}: has no prompt; write some, {example}")
    for i, (_, prompt) in enumerate(prompts):
        if isinstance(prompt, dict) and len(prompt) == 1:
            (before,) = prompt
            raise InputError(f"prompts={path}: the prompt that starts with '{before}:' has a colon; write it in quotes")
        if not isinstance(prompt, str):
            raise InputError(f"prompts={path}: {prompt!r} is not text; write it in quotes")
        if " - " in prompt and prompt not in text:  # YAML joins a line that is indented more than the one before
            raise InputError(f"prompts={path}: {prompt!r} stands on several lines; start each - in the same column")
        if prompt in [before for _, before in prompts[:i]]:
            raise InputError(f"prompts={path}: {prompt!r} occurs twice; remove one")
    return prompts


def settings_grid(config: ExploreConfig) -> list[Setting]:
    """All combinations of the controls' values.

    With temperature 0 or top_k 1 the text is greedy: it does not depend on temperature, random seed, top_p, min_p and
    typical_p. Such combinations become one setting, with the values of `GREEDY`.
    """
    grid: list[Setting] = []
    for values in itertools.product(*(getattr(config, name) for name in GRID)):
        setting = dict(zip(GRID, values, strict=True))
        setting |= GREEDY if is_greedy(setting) else {}
        if setting not in grid:
            grid.append(setting)
    return grid


def is_greedy(setting: Setting) -> bool:
    return bool(setting["temperature"] == 0 or setting["top_k"] == 1)


def label(setting: Setting, varied: Sequence[str]) -> str:
    """A short name of a setting: the values of the varied controls."""
    greedy = is_greedy(setting)
    values = [f"{name}={value_text(setting[name])}" for name in varied if not (greedy and name in GREEDY)]
    return " ".join(["greedy"] * greedy + values) or "the only setting"


def varied_controls(grid: Sequence[Setting]) -> list[str]:
    """The controls that have several values in the grid. Greedy settings do not count."""
    sampled = [setting for setting in grid if not is_greedy(setting)]
    return [name for name in GRID if len({setting[name] for setting in sampled}) > 1]


def value_text(value: float | None) -> str:
    """The value of a control as text. None, no limit, is written as "all"."""
    return "all" if value is None else f"{value:g}"


def require_words(model: TextModel) -> None:
    """Raises InputError if the model's tokens are not words."""
    if (kind := rules_of(model.tokenizer).kind) != "word":
        raise InputError(f"run={model.checkpoint}: has data.tokenizer={kind}, but explore measures words; use evaluate")


def check_grid(config: ExploreConfig, model: TextModel, prompts: Prompts) -> list[Setting]:
    """Check that the model can use all settings, and return the grid.

    Raises:
        InputError: the model's tokens are not words, it cannot use a value or a prompt, or more than
            `MAX_UNCONFIRMED` texts need `confirm`.
    """
    require_words(model)
    vocab_size = model.network.vocab_size
    if config.top_k == ExploreConfig().top_k:  # the default works with every vocabulary
        changes: dict[str, Any] = {"top_k": [k for k in config.top_k if k is None or k <= vocab_size]}
        config = replace(config, **changes)
    problems = [f"{name}=[]: must have at least one value" for name in GRID if not getattr(config, name)]
    for k in config.top_k:
        if k is not None and k > vocab_size:
            problems.append(f"top_k={k}: the model has only {vocab_size} words; give at most that, or None")
    for count in config.min_tokens:
        if count > config.num_tokens:
            problems.append(f"min_tokens={count}: must be at most num_tokens={config.num_tokens}")
    if problems:
        raise InputError(*problems)
    grid = settings_grid(config)
    try:
        all_ids = encode_prompts(model.tokenizer, [text for _, text in prompts], f"prompts={config.prompts}: prompt")
    except InputError as error:
        if config.prompts is not None:
            raise
        problem = f"the model knows no word of {len(error.problems)} of the {len(prompts)} default prompts"
        raise InputError(f"prompts: {problem}; give prompts=FILE with prompts that fit its text") from error
    for i, (_, prompt) in enumerate(prompts):
        if (first := prompts[all_ids.index(all_ids[i])][1]) != prompt:
            log.warning("%r: the network reads the same as for %r, so these texts count twice.", prompt, first)
        if unknown := unknown_words(model.tokenizer, prompt):
            log.warning("%r: not in the vocabulary, so the network reads [UNK]: %s", prompt, ", ".join(unknown))
    if len(prompts) < FEW_PROMPTS:
        log.warning("%d prompts are few: the intervals of the report will be too narrow. Ten are better.", len(prompts))
    count = sum(1 if is_greedy(setting) else config.num_seeds for setting in grid) * len(prompts)
    if count > MAX_UNCONFIRMED and not config.confirm:
        start = time.monotonic()
        trial = generate_texts(model, [prompts[0][1]] * 32, config.num_tokens, seed=0)
        minutes = (time.monotonic() - start) / len(trial) * count / 60
        raise InputError(
            f"confirm=false: {count:,} texts ({len(prompts)} prompts, {len(grid)} settings, {config.num_seeds} seeds)"
            f" take about {minutes:,.0f} minutes and {count / 1e3:,.0f} MB; add confirm=true, or ask for fewer texts"
        )
    return grid


def generate_samples(
    config: ExploreConfig, model: TextModel, prompts: Prompts, grid: Sequence[Setting], folder: Path
) -> tuple[list[Sample], list[str]]:
    """Generate the texts that are not in `samples.jsonl` yet.

    Returns:
        All samples in the order of the grid, and one line for each setting that failed. It has no samples.

    Raises:
        InputError: the folder contains another exploration. Only the same command can continue it.
    """
    checkpoint = Path(str(model.checkpoint))
    status, plan_file = checkpoint.stat(), folder / PLAN
    plan: dict[str, Any] = {"checkpoint": checkpoint.name, "size": status.st_size, "modified": status.st_mtime}
    plan |= {name: getattr(config, name) for name in ("num_tokens", "seed", "num_seeds", "banned_words")}
    plan |= {"prompts": [list(prompt) for prompt in prompts], "settings": list(grid)}
    before = json.loads(plan_file.read_text(encoding="utf-8")) if plan_file.is_file() else plan
    if changed := [name for name in plan if before.get(name) != plan[name]]:
        of_model = {"checkpoint", "size", "modified"} & {*changed}
        other = f"of another checkpoint than {checkpoint}" if of_model else f"with other {', '.join(changed)}"
        raise InputError(f"folder={folder}: has an exploration {other}; give folder=ANOTHER")
    write_text(plan_file, json.dumps(plan, indent=2, ensure_ascii=False) + "\n")
    path = folder / SAMPLES
    *lines, _ = path.read_text(encoding="utf-8").split("\n") if path.is_file() else [""]  # _: an incomplete line
    samples = {_key(sample): sample for sample in map(json.loads, lines)}
    write_samples(path, samples.values())
    failed, ordered = [], []
    with path.open("a", encoding="utf-8") as file:
        for setting in tqdm(grid, desc="Generating", unit=" settings", disable=None, leave=False):
            seeds = range(config.seed, config.seed + (1 if is_greedy(setting) else config.num_seeds))
            keys = [(prompt, seed, *setting.values()) for _, prompt in prompts for seed in seeds]
            incomplete = {prompt for prompt, *rest in keys if (prompt, *rest) not in samples}
            missing = [(kind, prompt) for kind, prompt in prompts if prompt in incomplete]
            try:
                new = list(generate_setting(config, model, missing, setting, seeds))
            except InputError as error:
                failed.append(f"{label(setting, varied_controls(grid))}: {error}")
                continue
            samples |= {_key(sample): sample for sample in new}
            ordered += [samples[key] for key in keys]
            file.write("".join(map(_line, new)))
            file.flush()
    return ordered, failed


def generate_setting(
    config: ExploreConfig, model: TextModel, prompts: Prompts, setting: Setting, seeds: range
) -> Iterator[Sample]:
    """A sample for each prompt and random seed, without metrics."""
    controls = setting | {"seed": seeds[0], "num_samples": len(seeds), "banned_words": config.banned_words}
    texts = generate_texts(model, [prompt for _, prompt in prompts], config.num_tokens, **controls)
    for (kind, prompt), group in zip(prompts, texts, strict=True):
        prompt_ids = model.tokenizer.encode(prompt).ids
        for seed, text in zip(seeds, group, strict=True):
            ids = model.tokenizer.encode(text).ids[len(prompt_ids) :]
            yield {
                "prompt": prompt,
                "kind": kind,
                "settings": setting,
                "num_tokens": config.num_tokens,
                "seed": seed,
                "unknown_in_prompt": unknown_words(model.tokenizer, prompt),
                "text": text,
                "words": [model.tokenizer.id_to_token(id_) for id_ in ids],
                "prompt_ids": prompt_ids,
                "ids": ids,
            }


def write_samples(path: Path, samples: Iterable[Sample]) -> None:
    """Write a file of samples atomically."""
    write_text(path, "".join(map(_line, samples)))


def _line(sample: Sample) -> str:
    return json.dumps(without_nan(sample), ensure_ascii=False) + "\n"


def without_nan(value: Any) -> Any:
    """Replace nan by None, because JSON has no nan."""
    if isinstance(value, dict):
        return {name: without_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _key(sample: Sample) -> tuple[Any, ...]:
    return (sample["prompt"], sample["seed"], *sample["settings"].values())
