"""python -m minigpt_pl.sample: write text with a trained model."""

import re
import sys
from pathlib import Path

from minigpt_pl import command_line, runs
from minigpt_pl.config import SampleConfig
from minigpt_pl.errors import InputError

CONTROLS = (
    "num_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty",
    "no_repeat_ngram_size", "banned_words", "num_samples", "seed",
)  # fmt: skip


def main() -> None:
    sys.argv[1:] = [_take_prompt_literally(argument) for argument in sys.argv[1:]]
    command_line.run("sample", SampleConfig, sample)


def sample(config: SampleConfig) -> None:
    """Print a text for each prompt and sample to standard output; which checkpoint wrote it, to standard error."""
    from minigpt_pl.generation.text import encode_prompts, generate_texts, load, unknown_words

    prompts = _prompts(config)
    model = load(_checkpoint(config))
    print(f"checkpoint: {model.checkpoint}", file=sys.stderr)
    encode_prompts(model.tokenizer, prompts, "prompt" if config.prompts_file is None else "prompts_file: prompt")
    for prompt in prompts:
        if unknown := unknown_words(model.tokenizer, prompt):
            print(f"not in the vocabulary: {' '.join(unknown)}", file=sys.stderr)
    controls = {name: getattr(config, name) for name in CONTROLS}
    texts = [text for group in generate_texts(model, prompts, **controls) for text in group]
    print("\n\n".join(texts))


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
    if (config.prompt is None) == (config.prompts_file is None):
        raise InputError(
            "prompt=: give prompt='this movie is', or prompts_file=FILE (- for standard input), and not both"
        )
    if config.prompts_file is None:
        prompts = config.prompt if isinstance(config.prompt, list) else [config.prompt]
    else:
        prompts = [line for line in _read_prompts(config.prompts_file).splitlines() if line.strip()]
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
        return sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8-sig")
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
