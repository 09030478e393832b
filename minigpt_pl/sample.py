"""python -m minigpt_pl.sample: generate text with a trained model."""

import itertools
import json
import math
import re
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt_pl.cli import app
from minigpt_pl.config import SampleConfig
from minigpt_pl.errors import InputError

if TYPE_CHECKING:
    from minigpt_pl.generation.text import Record
    from minigpt_pl.text_model import TextModel

Measures = dict[str, float]


def main() -> None:
    app.run("sample", sample, quote_prompts)


def sample(config: SampleConfig) -> None:
    """Write texts to standard output. The checkpoint and unknown words go to standard error."""
    from minigpt_pl.checkpoints import choose_checkpoint, find_checkpoint  # PyTorch, once the settings are right
    from minigpt_pl.cli import display
    from minigpt_pl.cpu.allocator import keep_freed_memory
    from minigpt_pl.generation.prompts import encode_prompts, unknown_words
    from minigpt_pl.text_model import load

    keep_freed_memory()
    prompts = [] if config.interactive else _prompts(config)
    combinations = _combinations(config)
    if config.checkpoint is not None and config.run is not None:
        raise InputError(f"checkpoint={config.checkpoint}: run={config.run} chooses one, too; leave one of them out")
    if config.checkpoint is not None:
        model = load(find_checkpoint(config.checkpoint, setting="checkpoint"))
    else:
        model = load(choose_checkpoint(Path(config.output_dir), config.run))
    print(f"checkpoint: {model.checkpoint}", file=sys.stderr)
    if config.show and display.has_colours(sys.stdout):
        print(display.LEGEND, file=sys.stderr)
    if config.interactive:
        from minigpt_pl.cli.session import Session

        return Session(model, config).run()
    encode_prompts(model.tokenizer, prompts, "prompt" if config.prompts_file is None else "prompts_file: prompt")
    for number, prompt in enumerate(prompts, 1):
        if unknown := unknown_words(model.tokenizer, prompt):
            where = f" (prompt {number})" if len(prompts) > 1 else ""
            print(f"not in the vocabulary: {' '.join(unknown)}{where}", file=sys.stderr)
    if len(prompts) == config.num_samples == 1 and config.format == "text" and config.compare is None:
        display.print_words(model, prompts[0], config.show is not None, seed=config.seed, **config.arguments())
    else:
        _print_all(model, prompts, config, combinations)


def _print_all(
    model: "TextModel", prompts: list[str], config: SampleConfig, combinations: list[dict[str, Any]]
) -> None:
    """Print each text with each combination of settings. With `compare`, also a table of measures."""
    from minigpt_pl.cli import display
    from minigpt_pl.generation.text import BATCH_TEXTS, stream_records

    seed = secrets.randbelow(2**31 - config.num_samples) if config.seed is None else config.seed
    with_probabilities = config.show is not None or config.format == "jsonl" or config.compare is not None
    streams = [  # an error in any combination comes before the first text
        stream_records(model, prompts, seed, config.num_samples, with_probabilities, **(config.arguments() | settings))
        for settings in combinations
    ]
    total = len(combinations) * len(prompts) * config.num_samples
    all_measures: list[list[Measures]] = [[] for _ in combinations]
    separator, done, start = "", 0, time.monotonic()
    for settings, records, measures in zip(combinations, streams, all_measures, strict=True):
        for record in records:
            if config.compare is not None:
                measures.append(_measure(record))
            done += 1
            if done % BATCH_TEXTS == 0:
                left = (time.monotonic() - start) * (total - done) / done
                print(f"{done:,} of {total:,} texts, {left:,.0f} s left", file=sys.stderr)
            if config.format == "jsonl":
                values = asdict(record)
                if measures:  # JSON has no NaN: null
                    values["measures"] = {name: None if math.isnan(v) else v for name, v in measures[-1].items()}
                print(json.dumps(values, ensure_ascii=False))
                continue
            title = f"[{display.settings_text(settings)}]\n" if settings else ""
            markdown = config.format == "markdown"
            text = display.as_markdown(record) if markdown else display.as_text(record, config.show is not None)
            print(separator + title + text)
            separator = "\n"
    if config.compare is not None and config.format != "jsonl":
        print()
        _print_table(combinations, all_measures)


def _combinations(config: SampleConfig) -> list[dict[str, Any]]:
    """Every combination of the values in `compare`; one empty combination without it."""
    lists = config.compare or {}
    combinations = [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]
    changed = [app.change(config, **values) for values in combinations]
    return [{name: getattr(settings, name) for name in lists} for settings in changed]


def _measure(record: "Record") -> Measures:
    """The effect of the settings on a text; NaN if the text is too short for a measure."""
    from minigpt_pl.measures.repetition import distinct, repeated

    return {
        "entropy": sum(record.entropies) / len(record.entropies) if record.entropies else math.nan,
        **{f"distinct-{n}": distinct(record.tokens, n) for n in (1, 2, 3)},
        "repeated-4": repeated(record.tokens),
    }


def _print_table(combinations: Sequence[Mapping[str, Any]], all_measures: Sequence[list[Measures]]) -> None:
    """A Markdown table: the mean of each measure for each combination, without texts that are too short."""
    from minigpt_pl.cli.display import setting_text

    rows = [[*combinations[0], *all_measures[0][0]]]
    for settings, measures in zip(combinations, all_measures, strict=True):
        columns = [[m[name] for m in measures if not math.isnan(m[name])] for name in measures[0]]
        means = [f"{sum(values) / len(values):.3f}" if values else "-" for values in columns]
        rows.append([*map(setting_text, settings.values()), *means])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * (width - 1) + ":" for width in widths])
    for row in rows:
        print("| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |")


def quote_prompts(arguments: list[str]) -> list[str]:
    """Take `prompt=it's a, b` literally: Hydra would read quotes, commas and brackets as its grammar.

    Hydra still reads a list (`prompt=[...]`), null, and a value that is quoted as a whole.
    """
    hydra_value = r"""null|\[.*\]|"([^"\\]|\\.)*"|'([^'\\]|\\.)*'"""
    quoted = []
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name == "prompt" and not re.fullmatch(hydra_value, value, re.DOTALL):
            # Inside Hydra's quotes a backslash escapes a quote mark, ${ (a reference) and the end, and nothing else.
            value = re.sub(r'(\\*)("|\$\{)', r"\1\1\\\2", value)
            value = re.sub(r"\\+\Z", r"\g<0>\g<0>", value)
            argument = f'prompt="{value}"'
        quoted.append(argument)
    return quoted


def _prompts(config: SampleConfig) -> list[str]:
    file, prompts = config.prompts_file, config.prompt
    if prompts is None and file is None:
        raise InputError("prompt=null: give prompt='this movie is', or prompts_file=FILE (- for standard input)")
    if prompts is not None and file is not None:
        raise InputError(f"prompts_file={file}: prompt={prompts} is given, too; leave one out")
    if file is None:
        prompts = prompts if isinstance(prompts, list) else [prompts]
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise InputError(f"prompt={prompts}: must be a text or a list of texts; quote numbers, as in ['10']")
        return prompts
    try:
        if file == "-" and sys.stdin is None:
            raise OSError("standard input is closed")
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"prompts_file={file}: cannot be read ({error}); give a UTF-8 file, or - for standard input"
        ) from error
    # Not splitlines(): it also splits at U+0085 and U+2028, which a prompt may contain.
    lines = text.removeprefix("\ufeff").replace("\r\n", "\n").split("\n")
    if not (prompts := [line for line in lines if line.strip()]):
        raise InputError(f"prompts_file={file}: holds no prompt; write one per line")
    return prompts


if __name__ == "__main__":
    main()
