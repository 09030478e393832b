"""`export onnx`: onnxruntime computes the same logits, and the script writes the same text without this package."""

import ast
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_export_hugging_face import PROMPTS, WORDS, text_model

from minigpt_pl import InputError, MiniGPT, TextModel
from minigpt_pl.exporting import onnx
from minigpt_pl.measures.likelihood import document_losses
from minigpt_pl.tokenizer import build_tokenizer

onnxruntime = pytest.importorskip("onnxruntime", reason="no onnxruntime: pip install 'minigpt_pl[export]'")
pytest.importorskip("onnxscript", reason="no onnxscript: pip install 'minigpt_pl[export]'")

pytestmark = pytest.mark.slow  # imports transformers or onnx

VARIANTS = ("notebook", "tied", "token shift")  # the last two: several blocks too


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folders = {name: tmp_path_factory.mktemp("onnx") for name in VARIANTS}
    for name, folder in folders.items():
        onnx.write_model(folder, text_model(name))
    return folders


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_of_all_lengths(name, folders):
    network, session = text_model(name).network, onnxruntime.InferenceSession(str(folders[name] / "model.onnx"))
    for length in range(1, network.max_length + 1):
        for texts in (1, 2, 5):
            ids = torch.randint(len(WORDS), (texts, length))
            with torch.inference_mode():
                expected = network(ids)[0].numpy()
            assert np.abs(session.run(None, {"ids": ids.numpy()})[0] - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("name", VARIANTS)
def test_the_script_writes_the_same_greedy_text(name, folders):
    """200 words, beyond the window; the prompt has an unknown word."""
    command = [sys.executable, "-I", folders[name] / "sample.py", PROMPTS[3], "200", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    expected = text_model(name).generate_text(PROMPTS[3], 200, temperature=0)
    assert len({*expected.split()[-20:]}) > 2 and done.stdout == expected + "\n"


def test_the_script_draws_and_needs_three_packages(folders):
    def write(*arguments: str) -> str:
        command = [sys.executable, "-I", script, "the w1", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=600, check=True).stdout

    script = folders["tied"] / "sample.py"
    assert write("50", "1", "20", "1") == write("50", "1", "20", "1") != write("50", "1", "20", "2")
    assert "[UNK]" not in write("300", "9", "1000", "1")
    assert write("50", "9", "1", "1") == write("50", "0"), "top_k=1 takes the likeliest word"
    assert write().startswith("the w1 ")
    imports = [
        node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    names = {getattr(node, "module", None) or node.names[0].name for node in imports}
    assert names - sys.stdlib_module_names == {"numpy", "onnxruntime", "tokenizers"}


def test_the_script_stops_at_the_end_of_the_text(tmp_path):
    model = text_model("tied")
    with torch.no_grad():
        model.network.output.bias[model.end_id] += 1000
    onnx.write_model(tmp_path, model)
    command = [sys.executable, "-I", tmp_path / "sample.py", "the w1", "50", "0"]
    assert subprocess.run(command, capture_output=True, text=True, timeout=600, check=True).stdout == "the w1\n"


def test_a_window_of_one_word(tmp_path):
    torch.manual_seed(0)
    model = TextModel(MiniGPT(len(WORDS), max_length=1, embed_dim=8).eval(), build_tokenizer(WORDS))
    onnx.write_model(tmp_path, model)
    logits = onnxruntime.InferenceSession(str(tmp_path / "model.onnx")).run(None, {"ids": np.array([[5], [6]])})[0]
    with torch.inference_mode():
        assert np.abs(logits - model.network(torch.tensor([[5], [6]]))[0].numpy()).max() < 1e-4


def test_perplexity(folders):
    """Documents of more tokens than the window, and of different lengths in one batch."""
    network = text_model("tied").network
    documents = [np.random.default_rng(size).integers(1, len(WORDS), size) for size in (9, 14, 2, 7, 14, 5, 6, 8, 30)]
    losses = document_losses(network, [document[: network.max_length + 1] for document in documents])
    measured = onnx.perplexity(folders["tied"] / "model.onnx", documents, network.max_length)
    assert measured == pytest.approx(np.exp(losses.mean()), rel=1e-4)


def test_a_version_of_onnxruntime_that_computes_other_logits_is_refused(monkeypatch, folders):
    monkeypatch.setattr(onnx, "TOLERANCE", -1)
    with pytest.raises(InputError, match=r"onnxruntime [\d.]+: computes logits that differ by .*; install another"):
        onnx._check(folders["tied"] / "model.onnx", text_model("tied").network)
