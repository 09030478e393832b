"""The documentation: its length, its links, its commands, and the script that it shows."""

import re
import shlex
from pathlib import Path

import pytest

from minigpt_pl.cli import app
from minigpt_pl.export import name_the_format

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/*.md"))
COMMAND = re.compile(r"^python -m minigpt_pl\.(\w+) (.*)$", re.MULTILINE)


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """The commands in a page: (name, overrides). Leaves out prompts, which the shell and Hydra read differently."""
    text = page.read_text().replace("top_k=all", "top_k=null")  # `sample` replaces it before Hydra reads it
    found = [(name, shlex.split(rest, comments=True)) for name, rest in COMMAND.findall(text)]
    return [
        (name, [word for word in name_the_format(words) if "=" in word and not word.startswith("prompt=")])
        for name, words in found
        if "--config-dir" not in words
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    links = re.findall(r'\]\(([^)#]+)\)|src="([^"]+)"', page.read_text())
    missing = [link for pair in links for link in pair if link and not link.startswith("http")]
    assert [link for link in missing if not (page.parent / link).exists()] == []


def test_commands_have_valid_settings():
    checked = 0
    for page in PAGES:
        for name, overrides in commands(page):
            # Of a sweep's values, the first.
            overrides = [re.sub(r"^([\w.]+)=([\w.]+),[\w.,]*$", r"\1=\2", override) for override in overrides]
            app.to_settings(app.compose(name, overrides))
            checked += 1
    assert checked > 30


def test_the_messages_of_the_page_of_errors_exist():
    of_others = ("No module named", "No matching distribution", "Could not locate class")
    messages = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs/errors.md").read_text(), re.MULTILINE)
    ours = [message for message in messages if not message.startswith(of_others)]
    source = "".join(path.read_text() for path in sorted(ROOT.glob("minigpt_pl/**/*.py")))
    assert len(ours) > 15 and [message for message in ours if message not in source] == []


def test_the_readme_is_short_and_shows_the_script():
    readme = (ROOT / "README.md").read_text()
    assert readme.count("\n") <= 150
    assert f"```python\n{(ROOT / 'docs/examples/lightning_script.py').read_text()}```" in readme
