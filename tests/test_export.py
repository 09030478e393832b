"""The command `export`: folders, their manifest and README, and bad input. The formats have test files of their own."""

import errno
import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import losses, run_main
from test_convert import WORDS, network

import minigpt_pl
from minigpt_pl import runs
from minigpt_pl.config import ConvertConfig, ExportConfig
from minigpt_pl.convert import convert
from minigpt_pl.export import export
from minigpt_pl.exporting import hugging_face, onnx
from minigpt_pl.keras_weights import read_keras, write_keras

for package in ("transformers", "safetensors", "onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason=f"no {package}: pip install 'minigpt_pl[export]'")

pytestmark = pytest.mark.slow  # imports transformers or onnx

TRANSFORMERS = {
    *("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("modeling_minigpt.py", "README.md", "MANIFEST.json"),
}


@pytest.fixture
def cwd(trained, tmp_path) -> Path:
    """A folder with a copy of the trained run."""
    shutil.copytree(trained / "outputs" / "tiny", tmp_path / "outputs" / "tiny")
    return tmp_path


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def entries(folder: Path) -> set[Path]:
    """All files and folders."""
    return {*folder.rglob("*")}


def test_transformers(cwd):
    done = run_main("export", "transformers", "license=cc0-1.0", cwd=cwd)
    folder = cwd / "outputs" / "tiny" / "export" / "transformers"
    assert done.returncode == 0, done.stderr
    assert names(folder) == TRANSFORMERS and names(folder.parent) == {f"transformers/{name}" for name in TRANSFORMERS}
    ours = minigpt_pl.load(cwd / "outputs" / "tiny")
    assert minigpt_pl.load(folder)("the cat", 40, 0) == ours("the cat", 40, 0)

    readme = (folder / "README.md").read_text()
    assert readme.startswith("---\nlicense: cc0-1.0\nlibrary_name: transformers\npipeline_tag: text-generation\n")
    lowest = min(losses(cwd / "outputs" / "tiny", "val/loss").values())
    assert f"| Lowest loss, in nats per token | {lowest:.4f} |" in readme and "story.txt" in readme
    assert str(cwd) not in readme and "## Limits" in readme


def test_everything_in_one_folder(cwd):
    done = run_main("export", "all", "int8=true", "path=shared", cwd=cwd)
    assert done.returncode == 0, done.stderr
    folder, manifest = cwd / "shared", json.loads((cwd / "shared" / "MANIFEST.json").read_text())
    files = {f"transformers/{name}" for name in TRANSFORMERS - {"MANIFEST.json"}}
    files |= {f"onnx/{name}" for name in ("model.onnx", "sample.py", "tokenizer.json", "README.md")} | {"tiny.html"}
    assert names(folder) == {*files, "MANIFEST.json"}
    assert manifest["files"] == {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files}
    assert manifest["run"] == "tiny" and manifest["checkpoint"]["name"] == "best.ckpt"
    best = cwd / "outputs" / "tiny" / "checkpoints" / "best.ckpt"
    assert manifest["checkpoint"]["sha256"] == hashlib.sha256(best.read_bytes()).hexdigest()
    assert manifest["versions"]["torch"] == torch.__version__

    [cost] = [line for line in done.stdout.splitlines() if line.startswith("Perplexity of the first 500 held-out")]
    before, after = (float(number) for number in re.findall(r"([\d.]+) with", cost))
    assert before != after and after == pytest.approx(before, rel=0.5)
    command = [sys.executable, "-I", folder / "onnx" / "sample.py", "the cat", "40", "0"]
    text = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True).stdout
    assert text.startswith("the cat") and len(text.split()) > 5
    assert cost.replace(": ", " | ") in (folder / "onnx" / "README.md").read_text()


def test_an_earlier_export_is_replaced_and_nothing_else(cwd):
    def write() -> subprocess.CompletedProcess:
        return run_main("export", "transformers", "path=mine", cwd=cwd)

    (cwd / "mine").mkdir()
    assert write().returncode == 0  # an empty folder
    first = (cwd / "mine" / "MANIFEST.json").read_bytes()
    assert write().returncode == 0 and (cwd / "mine" / "MANIFEST.json").read_bytes() == first
    (cwd / "mine" / "notes.txt").write_text("my own")
    refused = write()
    assert refused.returncode == 2 and refused.stderr.startswith(
        "error: path=mine: exists, and is not a folder of this command"
    )
    assert names(cwd / "mine") == {*TRANSFORMERS, "notes.txt"}
    (cwd / "file").write_text("my own")
    assert run_main("export", "onnx", "path=file", cwd=cwd).returncode == 2
    assert (cwd / "file").read_text() == "my own"


class TestBadInput:
    """One line, exit code 2, and no new file or folder."""

    @pytest.fixture(autouse=True)
    def quick(self, monkeypatch):
        """Do not import transformers and onnx."""
        monkeypatch.setattr(hugging_face, "write_model", lambda folder, model: None)
        monkeypatch.setattr(onnx, "write_model", lambda folder, model: None)

    def refused(self, cwd: Path, words: str, *arguments: str) -> None:
        before = entries(cwd)
        done = run_main("export", *arguments, cwd=cwd)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
        assert words in done.stderr
        assert entries(cwd) == before

    def test_no_finished_run(self, cwd, caplog):
        runs.update_record(cwd / "outputs" / "tiny", status="running")
        self.refused(cwd, "output_dir=outputs: holds no finished run", "transformers")
        self.refused(cwd, "run=none: no such run folder", "onnx", "run=none")
        run_main("export", "transformers", "run=tiny", cwd=cwd)
        assert "The run tiny is not finished (its status is running). train resume=tiny continues it." in caplog.text

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_weights_that_are_not_numbers(self, value, cwd):
        for path in (cwd / "outputs" / "tiny" / "checkpoints").iterdir():
            contents = torch.load(path, weights_only=True)
            contents["state_dict"]["model.output.bias"][3] = value
            torch.save(contents, path)
        self.refused(cwd, "its training has diverged", "transformers")

    def test_a_run_that_changes(self, cwd, monkeypatch):
        def train(folder: Path, model: minigpt_pl.TextModel) -> None:
            best = cwd / "outputs" / "tiny" / "checkpoints" / "best.ckpt"
            shutil.copy(best, best.with_name("new"))
            best.with_name("new").replace(best)

        monkeypatch.setattr(onnx, "write_model", train)
        self.refused(cwd, "run=tiny: changed during the export", "onnx")

    def test_a_missing_package(self, cwd, monkeypatch):
        monkeypatch.undo()
        found = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name))
        self.refused(cwd, "onnxscript is not installed, and this export needs it; pip install", "onnx")

    def test_a_full_disk(self, cwd, monkeypatch):
        def fails(folder: Path, model: minigpt_pl.TextModel) -> None:
            (folder / "half").write_text("written")
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(hugging_face, "write_model", fails)
        self.refused(cwd, "path=", "transformers")

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["onnx", "push=a/b"], "push=a/b: has no effect with format=onnx"),
            (["transformers", "int8=true"], "int8=True: has no effect with format=transformers"),
            (["onnx", "source=x"], "source=x: has no effect with int8=false"),
            (["html", "license=mit"], "license=mit: has no effect with format=html"),
            (["transformers", "push=name"], "push=name: must be a repository of the hub, as in push=owner/name"),
            (["pickle"], "format=pickle: must be one of html, transformers, onnx, all"),
        ],
    )
    def test_settings_that_do_not_fit_together(self, arguments, words, cwd):
        self.refused(cwd, words, *arguments)


@pytest.fixture(scope="module")
def keras(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("keras") / "model.weights.h5"
    write_keras(path, network())
    path.with_name("vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def keras_run(keras) -> Path:
    settings = {"vocabulary": str(keras.with_name("vocab.txt")), "output_dir": str(keras.with_name("outputs"))}
    return convert(ConvertConfig(from_keras=str(keras), **settings))


@pytest.fixture(scope="module")
def folder(keras_run) -> Path:
    return export(ExportConfig(format="all", run=str(keras_run), path=str(keras_run.parent / "all")))


@pytest.fixture(scope="module")
def expected(keras_run) -> str:
    text = minigpt_pl.load(keras_run)("the movie", 100, temperature=0)
    assert len(text.split()) > 50
    return text


class TestOneCheckpointWritesTheSameText:
    """From Keras to this package, to transformers, ONNX and the page, and back from transformers to Keras."""

    def test_transformers(self, folder, expected):
        from transformers import pipeline

        generator = pipeline("text-generation", str(folder / "transformers"), trust_remote_code=True)
        found = generator("the movie", do_sample=False, max_new_tokens=100)
        assert found[0]["generated_text"] == expected

    def test_onnx(self, folder, expected):
        command = [sys.executable, "-I", folder / "onnx" / "sample.py", "the movie", "100", "0"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
        assert done.stdout == expected + "\n"

    def test_page(self, folder, expected, browser):
        page = browser.new_page()
        page.goto(f"{(folder / 'keras-001.html').as_uri()}#prompt=the+movie&temperature=0&num_tokens=100")
        page.click("#write")
        page.locator("#write", has_text=re.compile("^Write$")).wait_for()
        assert page.text_content("#text-prompt") + page.text_content("#words") == expected

    def test_back_to_keras(self, keras, folder, expected, tmp_path):
        back = minigpt_pl.load(folder / "transformers")
        assert back("the movie", 100, temperature=0) == expected
        write_keras(tmp_path / "back.weights.h5", back.network)
        before, after = (read_keras(path).state_dict for path in (keras, tmp_path / "back.weights.h5"))
        assert all(torch.equal(after[name], weight) for name, weight in before.items())
