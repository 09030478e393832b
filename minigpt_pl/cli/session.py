"""The session of `sample interactive=true`: prompts are continued, lines that begin with / change the settings."""

import sys
from collections.abc import Sequence
from dataclasses import fields

import yaml

from minigpt_pl.cli import app, display
from minigpt_pl.config import CONTROLS, SampleConfig
from minigpt_pl.errors import InputError
from minigpt_pl.generation.prompts import encode_prompts, unknown_words
from minigpt_pl.generation.text import TextModel, stream_records
from minigpt_pl.tokenizer import list_vocabulary

HELP = """\
A line is the beginning of a text. Ctrl-C stops a text, Ctrl-D or /quit ends. Tab completes commands and known words.
/settings   what is set
/NAME       sets it back to what it was at the start
/NAME VALUE sets it: a number, null, or words with spaces between; /forced_words 0 good 5 bad. NAME is one of"""


class Session:
    """Reads lines from standard input until /quit or its end; bad ones cost one line on standard error.

    Args:
        config: the settings to begin with.
    """

    def __init__(self, model: TextModel, config: SampleConfig):
        self.model, self.config, self.first = model, config, config
        self.settings = {
            field.name: field for field in fields(config) if field.name in (*CONTROLS, "num_samples", "seed", "show")
        }

    def run(self) -> None:
        if sys.stdin is None:
            raise InputError("interactive=true: standard input is closed; give prompt= or prompts_file=")
        sys.stdin.reconfigure(errors="surrogateescape")  # what is no UTF-8 is refused below, and the session goes on
        self._check(self.config)
        in_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        if in_terminal:
            self._edit_lines()
            print("/help lists the commands", file=sys.stderr)
        while True:
            try:
                line = input("> " if in_terminal else "").strip()
                if line.split()[:1] == ["/quit"]:
                    return
                if line.startswith("/"):
                    self._command(*line[1:].split())
                elif line:
                    self._write(line)
            except EOFError:
                return
            except KeyboardInterrupt:
                print(file=sys.stderr)
            except InputError as error:
                for problem in error.problems:
                    print(f"error: {problem}", file=sys.stderr)

    def _command(self, name: str = "", *words: str) -> None:
        if name == "help":
            print(HELP)
            for setting in self.settings.values():
                print(f"  {setting.name}: {setting.metadata['doc']}")
        elif name == "settings":
            for setting in self.settings:
                print(f"  {setting}={display.setting_text(getattr(self.config, setting))}")
        elif name not in self.settings:
            raise InputError(f"/{name}: no such command; /help lists them")
        else:
            changed = app.change(self.config, **{name: self._value(name, words)})
            self._check(changed)
            self.config = changed

    def _value(self, name: str, words: Sequence[str]) -> object:
        if not words:
            return getattr(self.first, name)
        if words[0][0] in "[{":  # as on the command line
            try:
                return yaml.safe_load(" ".join(words))
            except yaml.YAMLError:
                raise InputError(f"/{name} {' '.join(words)}: cannot be read; close the bracket, or quote") from None
        if name == "forced_words":
            if len(words) % 2 or not all(map(str.isdecimal, words[::2])):
                raise InputError(f"/{name} {' '.join(words)}: give places and words in turn: /{name} 0 good 5 bad")
            return dict(zip(map(int, words[::2]), words[1::2], strict=True))
        if isinstance(getattr(self.first, name), list):
            return list(words)
        return None if words == ("null",) else " ".join(words)

    def _check(self, config: SampleConfig) -> None:
        """What only the model can tell, as whether words are known."""
        stream_records(self.model, [], num_samples=config.num_samples, seed=config.seed, **_controls(config))

    def _write(self, prompt: str) -> None:
        encode_prompts(self.model.tokenizer, [prompt])
        if unknown := unknown_words(self.model.tokenizer, prompt):
            print(f"not in the vocabulary: {' '.join(unknown)}", file=sys.stderr)
        config, shown = self.config, self.config.show is not None
        options = {"seed": config.seed} | _controls(config)
        if config.num_samples == 1:
            display.print_words(self.model, prompt, shown, **options)
            return
        records = stream_records(
            self.model, [prompt], num_samples=config.num_samples, with_probabilities=shown, **options
        )
        print("\n\n".join(display.as_text(record, shown) for record in records))

    def _edit_lines(self) -> None:
        """History, and completion with Tab, where Python has readline."""
        try:
            import readline
        except ImportError:  # Windows
            return
        commands = [f"/{name}" for name in ("help", "settings", "quit", *self.settings)]
        words = list_vocabulary(self.model.tokenizer)

        def complete(beginning: str, number: int) -> str | None:
            choices = commands if readline.get_begidx() == 0 and beginning.startswith("/") else words
            return ([choice for choice in choices if beginning and choice.startswith(beginning)] + [None])[number]

        readline.set_completer(complete)
        readline.set_completer_delims(" ")
        libedit = "libedit" in (readline.__doc__ or "")
        readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")


def _controls(config: SampleConfig) -> dict[str, object]:
    return {name: getattr(config, name) for name in CONTROLS}
