"""Shared by all tests: a small text, the real reviews if present, one small trained run, the marker `slow`."""

import contextlib
import csv
import importlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from minigpt_pl.config import ImdbConfig, TextConfig
from minigpt_pl.signals import SIGNALS, set_handlers

torch.set_num_threads(1)  # the models here are too small to gain from threads

# The real reviews, a run that the command line trains, and Chromium.
SLOW_FIXTURES = {"imdb", "imdb_texts", "trained", "browser"}
STARTS_A_PROCESS = {"run_module", "subprocess", "multiprocessing"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks as slow: the tests in parity/, those with a slow fixture, and those that start a process.

    Other slow tests carry `@pytest.mark.slow` themselves.
    """
    for item in items:
        if (
            "parity" in item.path.parts
            or SLOW_FIXTURES & set(item.fixturenames)
            or STARTS_A_PROCESS & _names_used(item.function)
        ):
            item.add_marker(pytest.mark.slow)


def _names_used(function) -> set[str]:
    """Global names that a test uses, and those that its helpers in the same module use."""
    names = set(function.__code__.co_names)
    for helper in [function.__globals__.get(name) for name in names]:
        if getattr(helper, "__module__", None) == function.__module__ and hasattr(helper, "__code__"):
            names.update(helper.__code__.co_names)
    return names


TINY_MODEL = [
    "model.vocab_size=200",
    "model.max_length=16",
    "model.embed_dim=16",
    "model.num_heads=2",
    "model.head_dim=8",
    "model.feed_forward_dim=16",
]
TINY_RUN = [*TINY_MODEL, "data=text", "data.batch_size=16", "trainer=cpu", "trainer.progress_bar=false"]

EVERY_STEP = "trainer.log_every_n_steps=1"


def train(config, resume_from: Path | None = None) -> Path:
    """Trains in this process and returns the run folder."""
    from minigpt_pl.training.fit import fit

    return fit(config, "test", [], resume_from)


def checkpoint(folder: Path, name: str = "last") -> dict:
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


def losses(folder: Path, name: str = "train/loss") -> dict[int, float]:
    """Step -> value, from metrics.csv."""
    with (folder / "metrics.csv").open() as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row[name]}


# For the tests of explore.
HOSTILE = "the </script><img src=none.png> cat"
PROMPTS = f"short: [the cat, a dog]\nincomplete:\n  - the king sees\nout_of_domain:\n  - '{HOSTILE}'\n"


def records(cwd, name="samples.jsonl", folder="outputs/tiny/explore"):
    """The records of a JSON-lines file that explore wrote."""
    return [json.loads(line) for line in (cwd / folder / name).read_text().split("\n")[:-1]]


def imdb_config(source: str, **changes) -> ImdbConfig:
    return ImdbConfig(**({"source": source, "cache_dir": "cache"} | changes))


def text_config(path, **changes) -> TextConfig:
    return TextConfig(**({"path": str(path), "cache_dir": "cache"} | changes))


@pytest.fixture(scope="session")
def imdb() -> Path:
    """The folder of the real reviews, in the hub's layout."""
    folder = os.environ.get("MINIGPT_IMDB")
    if not folder:
        pytest.skip("no real reviews: set MINIGPT_IMDB to a folder in the hub's layout")
    return Path(folder)


@pytest.fixture(scope="session")
def imdb_texts(imdb: Path):
    """A function that reads one split of the real reviews."""
    import pyarrow.parquet as parquet

    return lambda split: [
        text
        for path in sorted(imdb.glob(f"plain_text/{split}-*.parquet"))
        for text in parquet.read_table(path)["text"].to_pylist()
    ]


@pytest.fixture(scope="session")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with 300 made-up sentences, one document per line; 20 of them occur twice."""
    rng = random.Random(0)
    nouns = ["cat", "dog", "king", "ship", "moon", "door", "river", "letter"]
    verbs = ["sees", "likes", "finds", "loses", "keeps", "paints"]

    def sentence() -> str:
        cat, dog, king = rng.sample(nouns, 3)
        return f"The {cat} {rng.choice(verbs)} the {dog}, and it's a well-known {king}."

    lines = [sentence() for _ in range(280)]
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text("\n".join(lines + lines[:20]) + "\n")
    return path


def run_main(module: str, *arguments: str, cwd: Path, input: str = "") -> subprocess.CompletedProcess:
    """`python -m minigpt_pl.<module> ...` in this process, which saves the seconds that the imports take."""
    main = importlib.import_module(f"minigpt_pl.{module}").main
    output, errors, code = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.chdir(cwd),
        mock.patch.dict(os.environ, {"HF_HUB_OFFLINE": "1"}),
        mock.patch.object(sys, "argv", [f"{module}.py", *arguments]),
        mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(input.encode()))),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            set_handlers(handlers)
    return subprocess.CompletedProcess(arguments, code, output.getvalue(), errors.getvalue())


def run_module(module: str, *arguments: str, cwd: Path, **options) -> subprocess.CompletedProcess:
    """Runs `python -m minigpt_pl.<module> ...` in a new process that cannot reach the hub."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | options.pop("env", {})
    command = [sys.executable, "-m", f"minigpt_pl.{module}", *arguments]
    options = {"env": environment, "capture_output": True, "text": True, "timeout": 1800} | options
    return subprocess.run(command, cwd=cwd, **options)


@pytest.fixture(scope="session")
def trained(story: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small run, outputs/tiny, that the command line trained."""
    cwd = tmp_path_factory.mktemp("trained")
    done = run_module("train", *TINY_RUN, f"data.path={story}", "run_name=tiny", "trainer.max_epochs=2", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return cwd


@pytest.fixture(scope="module")  # playwright runs an event loop, which would disturb the tests of other modules
def browser():
    """Chromium without a window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install 'minigpt_pl[test]'")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if found is None:
        pytest.skip("no Chromium on the PATH")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tiny_config(story: Path, tmp_path: Path):
    """A function that composes train settings for the small text from further overrides."""
    from minigpt_pl.cli import app

    def compose(*overrides: str):
        base = [
            *TINY_RUN,
            f"data.path={story}",
            f"output_dir={tmp_path / 'outputs'}",
            "text_generator.every_n_epochs=0",
        ]
        return app.to_settings(app.compose("train", base + list(overrides)))

    return compose
