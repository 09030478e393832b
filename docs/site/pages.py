"""Pages of the site that have their source elsewhere: the README, the changelog, all settings, the Python functions."""

import html
import json
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

from mkdocs.structure.files import File, Files

import minigpt_pl
from minigpt_pl import config
from minigpt_pl.__main__ import COMMANDS
from minigpt_pl.cli.help import meaning

ROOT = Path(__file__).parents[2]


def on_files(files: Files, config) -> Files:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    pages = {"index.md": readme(), "changelog.md": changelog, "settings.md": settings(), "python.md": functions()}
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Files of the repository that are not pages lose their link."""
    markdown = markdown.replace("](../README.md)", "](index.md)")

    def without_link(found: re.Match) -> str:
        text, target = found.groups()
        file = files.get_file_from_path((Path(page.file.src_uri).parent / target.split("#")[0]).as_posix())
        is_on_site = "://" in target or target.startswith("#") or (file is not None and file.inclusion.is_included())
        return found[0] if is_on_site else text

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", without_link, markdown)


def readme() -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return text.replace("](docs/", "](").replace('src="docs/', 'src="').replace("](CHANGELOG.md)", "](changelog.md)")


def settings() -> str:
    """All settings of all commands. `python -m minigpt_pl.COMMAND --help` prints the same."""
    parts = ["# Settings", "Write a setting as `NAME=VALUE`. `--help` of each command prints its settings."]
    for command in COMMANDS:
        rows = rows_of(getattr(config, f"{command.capitalize()}Config"))
        parts += [f"## {command}", "\n".join(["| setting | default | meaning |", "|---|---|---|", *rows])]
    return "\n\n".join(parts) + "\n"


def rows_of(class_: type, prefix: str = "") -> list[str]:
    types, rows = get_type_hints(class_), []
    for field in fields(class_):
        kind, name = types[field.name], f"{prefix}{field.name}"
        if is_dataclass(kind):
            for each in (kind, *kind.__subclasses__()):
                rows += [row for row in rows_of(each, f"{name}.") if row not in rows]
        else:
            rows.append(row_of(field, name))
    return rows


def row_of(field, name: str) -> str:
    default = field.default_factory() if callable(field.default_factory) else field.default
    shown = "required" if default == config.REQUIRED else default if isinstance(default, str) else json.dumps(default)
    limits = ", ".join(f"{words} {limit}" for words, limit in field.metadata["limits"].items())
    text = f"{meaning(field)} ({limits})" if limits else meaning(field)
    return f"| `{name}` | `{shown}` | {html.escape(text).replace('|', '&#124;')} |"


def functions() -> str:
    """One section per name that `minigpt_pl` offers."""
    names = [name for name in minigpt_pl.__all__ if name != "MiniGPT"]
    homes = [f"::: {getattr(minigpt_pl, name).__module__}.{name}" for name in [*names, "MiniGPT"]]
    script = "docs/examples/lightning_script.py"
    intro = f"`help(minigpt_pl)` prints a short guide. `{script}` uses the package in a Lightning script of your own."
    return "\n\n".join(["# Python", intro, *homes]) + "\n"
