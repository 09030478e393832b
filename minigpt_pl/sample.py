"""python -m minigpt_pl.sample: generate text with a trained model."""

import itertools
import re
import sys
from pathlib import Path
from typing import Any

from minigpt_pl.cli import app
from minigpt_pl.config import SampleConfig
from minigpt_pl.errors import InputError
from minigpt_pl.files import read_text


def main() -> None:
    app.run("sample", sample, quote_prompts)


def sample(config: SampleConfig) -> None:
    """Write texts to standard output. The checkpoint and unknown words go to standard error."""
    from minigpt_pl import runs
    from minigpt_pl.checkpoints import choose_checkpoint, find_checkpoint  # import PyTorch only after the checks
    from minigpt_pl.cli import display
    from minigpt_pl.cpu.allocator import keep_freed_memory
    from minigpt_pl.notebook import LEGEND
    from minigpt_pl.text_model import load

    keep_freed_memory()
    prompts = [] if config.interactive else _prompts(config)
    combinations = _combinations(config)
    if config.checkpoint is not None and config.run is not None:
        raise InputError(f"checkpoint={config.checkpoint}: run={config.run} also chooses one; leave one of them out")
    if config.checkpoint is not None:
        checkpoint = find_checkpoint(config.checkpoint, setting="checkpoint")
    else:
        checkpoint = choose_checkpoint(Path(config.output_dir), config.run)
    model, newest = load(checkpoint), config.checkpoint is None and config.run is None
    steps = runs.read_record(checkpoint.parent.parent).get("steps") if newest else None  # it may be a short trial
    print(f"checkpoint: {checkpoint}" + (f" ({steps:,} steps)" if steps is not None else ""), file=sys.stderr)
    if config.show and display.has_colours(sys.stdout):
        print(LEGEND, file=sys.stderr)
    if config.interactive:
        from minigpt_pl.cli.session import Session

        return Session(model, config).run()
    display.print_texts(model, prompts, config, combinations)


def _combinations(config: SampleConfig) -> list[dict[str, Any]]:
    """Every combination of the values in `compare`. Without `compare`, one empty combination."""
    lists = config.compare or {}
    combinations = [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]
    changed = [app.change(config, **values) for values in combinations]
    return [{name: getattr(settings, name) for name in lists} for settings in changed]


def quote_prompts(arguments: list[str]) -> list[str]:
    """Quote prompts such as `prompt=it's a, b`. Hydra would read quotes, commas and brackets as its grammar.

    Hydra still reads a list (`prompt=[...]`), null, and a value that is quoted as a whole.

    Raises:
        InputError: words without a setting, such as the rest of a prompt that the user did not quote.
    """
    if words := [argument for argument in arguments if "=" not in argument and not argument.startswith("~")]:
        beginning = [argument.partition("=")[2] for argument in arguments if argument.startswith("prompt=")]
        prompt = " ".join([*beginning[-1:], *words]).strip("“”„")  # a shell does not know these quotes
        raise InputError(f"{' '.join(words)}: is not a setting; quote the prompt, as in prompt=" + f'"{prompt}"')
    hydra_value = r"""null|\[.*\]|"([^"\\]|\\.)*"|'([^'\\]|\\.)*'"""
    quoted = []
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name == "prompt" and not re.fullmatch(hydra_value, value, re.DOTALL):
            # In Hydra's quotes, " is \" and ${ is \${. Double the backslashes before them and at the end: \" -> \\\".
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
        raise InputError(f"prompts_file={file}: prompt={prompts} is also given; leave one of them out")
    if file is None:
        prompts = prompts if isinstance(prompts, list) else [prompts]
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise InputError(f"prompt={prompts}: must be a text or a list of texts; quote numbers, as in ['10']")
        return prompts
    try:
        if file == "-" and sys.stdin is None:
            raise OSError("standard input is closed")
        text = read_text(sys.stdin if file == "-" else Path(file))
    except (OSError, ValueError) as error:
        raise InputError(
            f"prompts_file={file}: cannot be read ({error}); give a UTF-8 file, or - for standard input"
        ) from error
    # Not splitlines(): it also splits at U+0085 and U+2028, which a prompt may contain.
    lines = text.removeprefix("\ufeff").replace("\r\n", "\n").split("\n")
    if not (prompts := [line for line in lines if line.strip()]):
        raise InputError(f"prompts_file={file}: contains no prompt; write one per line")
    return prompts


if __name__ == "__main__":
    main()
