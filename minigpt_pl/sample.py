"""python -m minigpt_pl.sample: write text with a trained model."""

import itertools
import re
import secrets
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt_pl import runs
from minigpt_pl.cli import app
from minigpt_pl.config import CONTROLS, SampleConfig
from minigpt_pl.cpu.allocator import keep_freed_memory
from minigpt_pl.errors import InputError

if TYPE_CHECKING:
    from minigpt_pl.generation.text import TextModel


def main() -> None:
    sys.argv[1:] = [_take_prompt_literally(argument) for argument in sys.argv[1:]]
    app.run("sample", sample)


def sample(config: SampleConfig) -> None:
    """Write texts to standard output; to standard error which checkpoint wrote them, and unknown words."""
    from minigpt_pl.cli import display
    from minigpt_pl.generation.prompts import encode_prompts, unknown_words
    from minigpt_pl.generation.text import load

    keep_freed_memory()
    prompts = [] if config.interactive else _prompts(config)
    variants = _variants(config)
    model = load(_checkpoint(config))
    print(f"checkpoint: {model.checkpoint}", file=sys.stderr)
    if config.show and display.has_colours(sys.stdout):
        print(display.LEGEND, file=sys.stderr)
    if config.interactive:
        from minigpt_pl.cli.session import Session

        Session(model, config).run()
        return
    encode_prompts(model.tokenizer, prompts, "prompt" if config.prompts_file is None else "prompts_file: prompt")
    for number, prompt in enumerate(prompts, 1):
        if unknown := unknown_words(model.tokenizer, prompt):
            where = f" (prompt {number})" if len(prompts) > 1 else ""
            print(f"not in the vocabulary: {' '.join(unknown)}{where}", file=sys.stderr)
    if len(prompts) == config.num_samples == 1 and config.format == "text" and config.compare is None:
        controls = {name: getattr(config, name) for name in CONTROLS}
        display.print_words(model, prompts[0], config.show is not None, seed=config.seed, **controls)
    else:
        _print_all(model, prompts, config, variants)


def _print_all(model: "TextModel", prompts: list[str], config: SampleConfig, variants: list[dict[str, Any]]) -> None:
    """Every text under every variant of the settings; where settings are compared, the table of their measures."""
    from minigpt_pl.cli import display
    from minigpt_pl.generation.text import BATCH_TEXTS, stream_records

    seed = secrets.randbelow(2**31 - config.num_samples) if config.seed is None else config.seed
    controls = {name: getattr(config, name) for name in CONTROLS}
    with_probabilities = config.show is not None or config.format == "jsonl" or config.compare is not None
    texts = [  # nothing is written before all of the settings are seen to be good
        stream_records(
            model, prompts, seed=seed, num_samples=config.num_samples, with_probabilities=with_probabilities,
            **(controls | variant),
        )
        for variant in variants
    ]  # fmt: skip
    total = len(variants) * len(prompts) * config.num_samples
    rows, between, done, started = [], "", 0, time.monotonic()
    for variant, records in zip(variants, texts, strict=True):
        rows.append((variant, []))
        for record in records:
            measures = display.measure(record) if variant else {}
            rows[-1][1].append(measures)
            done += 1
            if done % BATCH_TEXTS == 0:
                left = (time.monotonic() - started) * (total - done) / done
                print(f"{done:,} of {total:,} texts, {left:,.0f} s left", file=sys.stderr)
            if config.format == "jsonl":
                print(display.as_json(record, measures))
                continue
            title = display.settings_text(variant)
            text = (
                display.as_markdown(record)
                if config.format == "markdown"
                else display.as_text(record, bool(config.show))
            )
            print(between + (f"[{title}]\n" if title else "") + text)
            between = "\n"
    if config.compare is not None and config.format != "jsonl":
        print("\n" + display.as_table(rows))


def _variants(config: SampleConfig) -> list[dict[str, Any]]:
    """The settings to be compared: what differs from the others, every combination."""
    if config.compare is None:
        return [{}]
    variants = [
        dict(zip(config.compare, values, strict=True)) for values in itertools.product(*config.compare.values())
    ]
    changed = [app.change(config, **variant) for variant in variants]
    return [{name: getattr(config, name) for name in config.compare} for config in changed]


def _take_prompt_literally(argument: str) -> str:
    """`prompt=it's a, b` as it stands; Hydra would read quotes, commas and brackets as grammar.

    A list (`prompt=[...]`), null and what is quoted as a whole stay Hydra's.
    """
    name, _, value = argument.partition("=")
    hydras = r"""null|\[.*\]|"([^"\\]|\\.)*"|'([^'\\]|\\.)*'"""
    if name != "prompt" or re.fullmatch(hydras, value, re.DOTALL):
        return argument
    # In Hydra's quotes a backslash is one, but before a quote mark or the end it escapes; ${ begins a reference.
    escaped = re.sub(r'(\\*)("|\$\{|\Z)', lambda m: m[1] * 2 + (m[2] and "\\" + m[2]), value)
    return f'prompt="{escaped}"'


def _prompts(config: SampleConfig) -> list[str]:
    if config.prompt is None and config.prompts_file is None:
        raise InputError("prompt=null: give prompt='this movie is', or prompts_file=FILE (- for standard input)")
    if config.prompt is not None and config.prompts_file is not None:
        raise InputError(f"prompts_file={config.prompts_file}: give it or prompt={config.prompt}, and not both")
    if config.prompts_file is None:
        prompts = config.prompt if isinstance(config.prompt, list) else [config.prompt]
    else:
        # Not splitlines(): it cuts at U+0085 and U+2028 too, which a prompt may hold.
        lines = _read_prompts(config.prompts_file).replace("\r\n", "\n").split("\n")
        prompts = [line for line in lines if line.strip()]
    if not prompts and config.prompts_file is not None:
        raise InputError(f"prompts_file={config.prompts_file}: holds no prompt; write one a line")
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise InputError(
            f"prompt={config.prompt}: must be a text, or a list of texts; quote what is none, as in ['10']"
        )
    return prompts


def _read_prompts(name: str) -> str:
    try:
        if name == "-" and sys.stdin is None:
            raise OSError("standard input is closed")
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
        return text.removeprefix("\ufeff")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"prompts_file={name}: cannot be read ({error}); give a UTF-8 file, or - for standard input"
        ) from error


def _checkpoint(config: SampleConfig) -> Path:
    if config.checkpoint is not None and config.run is not None:
        raise InputError(f"checkpoint={config.checkpoint}: give it or run={config.run}, and not both")
    if config.checkpoint is not None:
        return runs.find_checkpoint(config.checkpoint, setting="checkpoint")
    return runs.choose_checkpoint(Path(config.output_dir), config.run)


if __name__ == "__main__":
    main()
