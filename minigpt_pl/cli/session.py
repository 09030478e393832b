"""The terminal session of `sample interactive=true`: it continues prompts, and lines with / change settings."""

import sys
from collections.abc import Sequence
from dataclasses import fields

import yaml

from minigpt_pl.cli import app, display
from minigpt_pl.cli.errors import print_problem
from minigpt_pl.config import CONTROLS, SampleConfig
from minigpt_pl.errors import InputError
from minigpt_pl.generation.text import stream_records
from minigpt_pl.text_model import TextModel
from minigpt_pl.tokenizer import list_vocabulary

HELP = """\
Type the start of a text and press Enter. Tab completes words. Ctrl-C stops a text. Ctrl-D or /quit ends the session.
/settings    shows all settings
/NAME        resets a setting to its first value
/NAME VALUE  changes a setting, as in /top_k 5, /seed null, /stop_words end film, /forced_words 0 good 5 bad
NAME is one of"""


class Session:
    """Reads lines from standard input until /quit or the end. Prints an error for a bad line, and continues.

    Args:
        config: the settings at the start.
    """

    def __init__(self, model: TextModel, config: SampleConfig):
        self.model, self.config, self.first_config = model, config, config
        names = (*CONTROLS, "num_samples", "seed", "show")
        self.settings = {field.name: field for field in fields(config) if field.name in names}

    def run(self) -> None:
        if sys.stdin is None:
            raise InputError("interactive=true: standard input is closed; give prompt= or prompts_file=")
        sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]  # print_texts reports bad bytes
        self._check(self.config)
        in_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        if in_terminal:
            self._set_up_line_editing()
            print("/help lists the commands", file=sys.stderr)
        while True:
            try:
                line = input("> " if in_terminal else "").strip()
                if line.split()[:1] == ["/quit"]:
                    return
                if line.startswith("/"):
                    self._run_command(*line[1:].split())
                elif line:
                    display.print_texts(self.model, [line], self.config)
            except EOFError:
                return
            except KeyboardInterrupt:
                print(file=sys.stderr)
            except InputError as error:
                for problem in error.problems:
                    print_problem("error", problem)

    def _run_command(self, name: str = "", *words: str) -> None:
        if name == "help":
            print(HELP)
            for setting in self.settings.values():
                print(f"  {setting.name}: {setting.metadata['doc']}")
        elif name == "settings":
            for name in self.settings:
                print(f"  {name}={display.setting_text(getattr(self.config, name))}")
        elif name not in self.settings:
            raise InputError(f"/{name}: no such command; /help lists them")
        else:
            changed = app.change(self.config, **{name: self._parse(name, words)})
            self._check(changed)
            self.config = changed

    def _parse(self, name: str, words: Sequence[str]) -> object:
        line = f"/{name} {' '.join(words)}"
        if not words:
            return getattr(self.first_config, name)
        if words[0][0] in "[{":  # a list or mapping in YAML, as on the command line
            try:
                return yaml.safe_load(" ".join(words))
            except yaml.YAMLError:
                raise InputError(f"{line}: cannot be read; close the bracket, or quote the words") from None
        if name == "forced_words":
            if len(words) % 2 or not all(map(str.isdecimal, words[::2])):
                raise InputError(f"{line}: alternate positions and words, as in /{name} 0 good 5 bad")
            return dict(zip(map(int, words[::2]), words[1::2], strict=True))
        if isinstance(getattr(self.first_config, name), list):
            return list(words)
        return None if words == ("null",) else " ".join(words)

    def _check(self, config: SampleConfig) -> None:
        """Also check what only the model knows, for example its vocabulary."""
        stream_records(self.model, [], config.seed, config.num_samples, **config.arguments())

    def _set_up_line_editing(self) -> None:
        """Switch on history and completion with Tab, if Python has readline."""
        try:
            import readline
        except ImportError:  # Windows
            return
        commands = [f"/{name}" for name in ("help", "settings", "quit", *self.settings)]
        words = list_vocabulary(self.model.tokenizer)

        def complete(start: str, number: int) -> str | None:
            candidates = commands if readline.get_begidx() == 0 and start.startswith("/") else words
            return [*(word for word in candidates if start and word.startswith(start)), None][number]

        readline.set_completer(complete)
        readline.set_completer_delims(" ")
        libedit = "libedit" in (readline.__doc__ or "")
        readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
