"""python -m minigpt_pl: lists the commands, or prints the version (`--version`)."""

import importlib
import sys
from importlib.metadata import PackageNotFoundError, version

COMMANDS = ("train", "sample", "evaluate", "explore", "convert", "export", "play", "prepare", "doctor")


def main() -> None:
    arguments = sys.argv[1:]
    if arguments == ["--version"]:
        try:
            print(version("minigpt_pl"))
        except PackageNotFoundError:
            print("not installed; pip install -e . in the checkout")
    elif arguments in ([], ["-h"], ["--help"]):
        for command in COMMANDS:
            print(importlib.import_module(f"minigpt_pl.{command}").__doc__)  # one line
        print("\nEach command has --help, which lists its settings.")
    else:
        word, choices = arguments[0], ", ".join(COMMANDS)
        remedy = f"write python -m minigpt_pl.{word}" if word in COMMANDS else f"no such command; choose from {choices}"
        print(f"error: {word}: {remedy}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
