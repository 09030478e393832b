"""Runs the commands and the Python code of the pages that a new user follows, in their order, scaled down."""

import contextlib
import itertools
import re
import shlex
import shutil
import subprocess
import sysconfig
import webbrowser
from pathlib import Path

import pyarrow
import pytest
from conftest import imdb_config, run_main
from pyarrow import parquet

from minigpt_pl import InputError
from minigpt_pl.data.sources import open_source

ROOT = Path(__file__).parent.parent
PAGES = ["README", *(f"docs/{name}" for name in ("laptop", "classroom", "own_text", "exercises", "homework"))]
# Install, show, or need a person. The Lightning script has its own test.
NOT_RUN = re.compile(r"pip |python3 -m venv|python -m (webbrowser|pytest)|source |export |import lightning")
SCALED_DOWN = {
    "train": ["trainer.max_steps=1", "trainer.limit_val_batches=1", "data.batch_size=8", "model.vocab_size=500"],
    "sample": ["num_tokens=5"],
    "explore": ["num_tokens=20", "num_real=20", "num_seeds=1", "temperature=0.8", "top_k=[1,20]"],
    "evaluate": ["num_documents=5"],
}


@pytest.fixture(scope="module")
def few_reviews(tmp_path_factory) -> Path:
    """A folder in the hub's layout, with 250 reviews of the extra `offline`."""
    try:
        texts = list(itertools.islice(open_source(imdb_config("packaged")).train(), 250))
    except InputError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("reviews")
    (folder / "plain_text").mkdir()
    for split, part in {"train": texts[:200], "unsupervised": texts[200:]}.items():
        table = pyarrow.table({"text": part, "label": [0] * len(part)})
        parquet.write_table(table, folder / f"plain_text/{split}-00000-of-00001.parquet")
    return folder


def blocks_of(page: str) -> list[tuple[str, str]]:
    """The language and the contents of each block of a page."""
    return re.findall(r"```(bash|python|yaml)\n(.*?)```", (ROOT / f"{page}.md").read_text(), re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs(page, few_reviews, tmp_path, monkeypatch):
    monkeypatch.setattr(webbrowser, "open", lambda address: True)
    library = tmp_path / "library"  # own_text.md reads the source code of Python
    shutil.copytree(Path(sysconfig.get_paths()["stdlib"], "email"), library)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    (tmp_path / "conf").mkdir()
    shutil.copy(ROOT / "conf/prompts.yaml", tmp_path / "conf")
    named = re.findall(r"`([\w./]+\.yaml)`[^\n]*\n\n```yaml\n", (ROOT / f"{page}.md").read_text())
    files, names, ran = iter(named), {}, 0
    for language, contents in blocks_of(page):
        if language == "yaml":  # a file that the page tells to write
            path = tmp_path / next(files)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(contents)
        elif language == "python" and not NOT_RUN.match(contents):
            with contextlib.chdir(tmp_path):
                exec(contents, names)
        elif language == "bash":
            for line in contents.splitlines():
                ran += run_line(line, few_reviews, tmp_path)
    assert ran >= 4


def run_line(line: str, reviews: Path, cwd: Path) -> bool:
    """Run a line of the shell. Returns whether it is a command of minigpt_pl."""
    line = line.replace("FOLDER", str(reviews)).replace("/srv/lesson", str(cwd / "outputs"))
    words = shlex.split(line, comments=True)
    if not words or NOT_RUN.match(line):
        return False
    if words[:2] != ["python", "-m"]:
        subprocess.run(["bash", "-c", line], cwd=cwd, check=True, timeout=60)
        return False
    command, arguments = words[2].removeprefix("minigpt_pl."), words[3:]
    changes = SCALED_DOWN.get(command, [])
    if command in ("train", "prepare") and "data=text" not in arguments and "--help" not in arguments:
        changes = [*changes, f"data.source={reviews}"]
    done = run_main(command, *arguments, *changes, cwd=cwd)
    assert done.returncode == 0, f"{line}\n{done.stderr}"
    return True


@pytest.mark.slow
def test_the_notebook_retold_runs(few_reviews, capsys):
    """Its last block compares the words, the logits and the loss with those of the package."""
    code = "\n".join(contents for language, contents in blocks_of("docs/notebook_retold") if language == "python")
    sizes = {"NUM_REVIEWS": 200, "VOCAB_SIZE": 500, "EMBED_DIM": 16, "BATCH_SIZE": 16, "NUM_STEPS": 40}
    for name, value in sizes.items():
        code, count = re.subn(rf"^{name} = [\d_]+", f"{name} = {value}", code, flags=re.MULTILINE)
        assert count == 1, name
    code = code.replace("ImdbConfig()", f"ImdbConfig(source={str(few_reviews)!r})")
    names = {}
    exec(code, names)
    assert names["split"]("a\x85b\xa0c\x0bd") == ["a\x85b\xa0c", "d"]
    printed = capsys.readouterr().out
    assert "['it', \"'s\", 'a', 'real', '-life', 'story', '.']" in printed and printed.endswith("equal\n")
    assert names["losses"][-1] < names["losses"][0] - 0.5
