"""`export transformers`: a process without this package and without a network computes and writes the same."""

import http.server
import json
import os
import subprocess
import sys
import threading
from base64 import b64decode
from pathlib import Path

import pytest
import torch

import minigpt_pl
from minigpt_pl import InputError, MiniGPT, TextModel, generate_texts
from minigpt_pl.exporting import hugging_face
from minigpt_pl.tokenizer import build_tokenizer

pytest.importorskip("transformers", reason="no transformers: pip install 'minigpt_pl[export]'")
pytest.importorskip("safetensors", reason="no safetensors: pip install 'minigpt_pl[export]'")

pytestmark = pytest.mark.slow  # imports transformers or onnx

WORDS = ["", "[UNK]", "the", ".", "'s", "-life", "É", "(", *(f"w{number}" for number in range(51)), "[END]"]
PROMPTS = ["the w1 w2", "w3", " ".join(f"w{number % 50}" for number in range(130)), "the unheard w4 's"]
TEXTS = ["The W1's <br /> Émile, É", "[END] of [UNK] and [PAD]", "w1-life\tw2\u00a0w3 (w4)", "  ", "w1\x0bw2 </s> <s>"]
VARIANTS = {
    "notebook": dict(max_length=80),
    "several blocks": dict(max_length=13, num_blocks=3, num_heads=3, head_dim=5),
    "tied": dict(max_length=13, tie_embeddings=True, num_blocks=2, head_dim=3),
    "token shift": dict(max_length=13, num_blocks=2, num_heads=3, head_dim=5, token_shift=True),
    "without an end": dict(max_length=10),
}
LENGTHS = {name: 200 if name == "notebook" else 40 for name in VARIANTS}  # new words


def text_model(name: str) -> TextModel:
    """A network whose logits differ much, so that rounding changes no word. Its greedy texts do not repeat one word."""
    torch.manual_seed(0)
    network = MiniGPT(len(WORDS), **dict(embed_dim=16, feed_forward_dim=24) | VARIANTS[name])
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 1))
        network.output.bias[-1] = -5.0  # a text ends late
    return TextModel(network.eval(), build_tokenizer(WORDS), None if name == "without an end" else len(WORDS) - 1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp("transformers") / name.replace(" ", "_") for name in VARIANTS}
    for name, folder in folders.items():
        folder.mkdir()
        hugging_face.write_model(folder, text_model(name))
    return folders


@pytest.fixture(scope="module")
def results(folders, tmp_path_factory) -> dict[str, dict]:
    """What a stranger computes with each folder."""
    place = tmp_path_factory.mktemp("stranger")
    request = {
        name: {"folder": str(folder), "ids": context(name), "prompts": PROMPTS, "texts": TEXTS, "length": LENGTHS[name]}
        for name, folder in folders.items()
    }
    (place / "request.json").write_text(json.dumps(request))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    environment |= {"HF_HOME": str(place / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", Path(__file__).with_name("stranger.py"), "request.json", "result.pt"]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return torch.load(place / "result.pt", weights_only=True)


def context(name: str) -> list[int]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, len(WORDS), (VARIANTS[name]["max_length"],), generator=generator).tolist()


@pytest.mark.parametrize("name", VARIANTS)
class TestStranger:
    def test_no_weight_is_missing_or_new(self, name, results):
        assert results[name]["wrong"] == []

    def test_logits_of_all_lengths(self, name, results):
        network, ids = text_model(name).network, torch.tensor([context(name)])
        with torch.inference_mode():
            expected, hidden = network(ids)
        tolerance = 1e-5 * float(expected.abs().max())  # the logits are large
        for length, logits in enumerate(results[name]["logits"], start=1):
            assert (logits - expected[:, :length]).abs().max() < tolerance
        assert length == network.max_length
        assert (results[name]["stepwise"] - expected).abs().max() < tolerance
        assert (results[name]["hidden"] - hidden).abs().max() < tolerance

    def test_loss(self, name, results):
        network, ids = text_model(name).network, torch.tensor([context(name)])
        with torch.inference_mode():
            expected = network.token_losses(ids[:, :-1], ids[:, 1:]).mean()
        assert abs(float(results[name]["loss"] - expected)) < 1e-5

    def test_greedy_texts_beyond_the_window(self, name, results):
        model = text_model(name)
        texts = [text for [text] in generate_texts(model, PROMPTS, LENGTHS[name], temperature=0, seed=0)]
        prompts = [model.tokenizer.encode(prompt).ids for prompt in PROMPTS]
        expected = [model.tokenizer.encode(text).ids[len(ids) :] for text, ids in zip(texts, prompts, strict=True)]
        assert len(expected[0]) > 2 * model.network.max_length and len({*expected[0][-20:]}) > 2
        for way in ("greedy", "without cache", "static cache"):
            assert until_end(model, results[name][way]) == expected[:1], way
        assert until_end(model, results[name]["batch"]) == expected  # with padding on the left
        assert results[name]["pipeline"] == texts

    def test_beam_search(self, name, results):
        model = text_model(name)
        text = model.generate_text(PROMPTS[0], LENGTHS[name], 0, num_beams=3)
        expected = model.tokenizer.encode(text).ids[len(model.tokenizer.encode(PROMPTS[0]).ids) :]
        assert until_end(model, results[name]["beams"]) == [expected]

    def test_drawn_texts(self, name, results):
        """With a high temperature, every word is drawn, but no special token."""
        drawn = {id_ for ids in until_end(text_model(name), results[name]["drawn"]) for id_ in ids}
        assert drawn <= {*range(2, len(WORDS) - 1)} and len(drawn) > 20
        default = results[name]["default"]
        assert default.startswith(PROMPTS[0] + " ")

    def test_ids_of_hostile_texts(self, name, results):
        tokenizer = text_model(name).tokenizer
        assert results[name]["ids"] == [tokenizer.encode(text).ids for text in TEXTS]

    def test_load_opens_it(self, name, folders):
        ours, back = text_model(name), minigpt_pl.load(folders[name])
        assert back.end_id == ours.end_id and back.checkpoint == folders[name] / "model.safetensors"
        assert back.network.arguments == ours.network.arguments
        assert all(torch.equal(back.network.state_dict()[key], w) for key, w in ours.network.state_dict().items())
        assert back.tokenizer.to_str() == ours.tokenizer.to_str()


def until_end(model: TextModel, all_ids: list[list[int]]) -> list[list[int]]:
    return [ids[: ids.index(model.end_id)] if model.end_id in ids else ids for ids in all_ids]


def test_load_opens_what_transformers_has_saved(folders, tmp_path):
    """For example after a fine-tuning with the Trainer of transformers."""
    import transformers

    from minigpt_pl.exporting.modeling_minigpt import MiniGPTForCausalLM

    model = MiniGPTForCausalLM.from_pretrained(folders["tied"])
    with torch.no_grad():
        model.blocks[1].feed_forward_norm.bias.add_(1)
    model.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(folders["tied"]).save_pretrained(tmp_path)
    back = minigpt_pl.load(tmp_path)
    assert back.tokenizer.to_str() == text_model("tied").tokenizer.to_str()
    ids = torch.tensor([context("tied")])
    with torch.inference_mode():
        assert torch.equal(back.network(ids)[0], model.eval()(ids).logits)
        assert not torch.equal(back.network(ids)[0], text_model("tied").network(ids)[0])


@pytest.mark.parametrize(
    ("file", "contents", "reason"),
    [
        ("config.json", '{"model_type": "gpt2"}', "model_type=gpt2"),
        ("config.json", "{", "Expecting property name"),
        ("model.safetensors", "no weights", "header"),
        ("tokenizer.json", "{}", ""),
        ("generation_config.json", None, "No such file"),
    ],
)
def test_load_refuses_a_damaged_folder(file, contents, reason, folders, tmp_path):
    for path in folders["tied"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / file).unlink() if contents is None else (tmp_path / file).write_text(contents)
    with pytest.raises(InputError, match=f"path={tmp_path}: cannot be read") as caught:
        minigpt_pl.load(tmp_path)
    assert reason in str(caught.value) and len(caught.value.problems) == 1


def test_a_version_of_transformers_that_computes_other_logits_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(hugging_face, "TOLERANCE", -1)
    with pytest.raises(InputError, match=r"transformers [\d.]+: computes logits that differ by .*; install another"):
        hugging_face.write_model(tmp_path, text_model("tied"))


# ------------------------------------------------------------------------------------------------ upload


class Hub(http.server.ThreadingHTTPServer):
    """Plays the hub for uploads to minigpt/tiny with the right token.

    Attributes:
        files: the contents by path.
        created: the request that created the repository.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Answer)
        self.address, self.files, self.created = f"http://127.0.0.1:{self.server_port}", {}, None


class _Answer(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        status, answer = 200, {}
        if self.headers["Authorization"] != "Bearer hf_secret":
            status, answer = 401, {"error": "Invalid username or password."}
        elif self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            answer = {"url": f"{self.server.address}/minigpt/tiny"}
        elif self.path == "/api/models/minigpt/tiny/preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]}
        elif self.path == "/api/models/minigpt/tiny/commit/main":
            lines = [json.loads(line) for line in body.splitlines()]
            for line in lines:
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = b64decode(line["value"]["content"])
            answer = {"commitUrl": f"{self.server.address}/minigpt/tiny/commit/1", "commitOid": "1" * 40}
        elif self.path != "/api/validate-yaml":
            status = 404
        contents = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(contents)))
        self.end_headers()
        self.wfile.write(contents)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import constants

    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield server
        server.shutdown()


def test_push(hub, folders):
    assert hugging_face.push(folders["tied"], "minigpt/tiny") == f"{hub.address}/minigpt/tiny"
    assert "private" in (hub.created.get("visibility"), hub.created.get("private") and "private")
    assert (hub.created["organization"], hub.created["name"]) == ("minigpt", "tiny")
    assert hub.files == {path.name: path.read_bytes() for path in folders["tied"].iterdir()}


@pytest.mark.parametrize(("repository", "token"), [("minigpt/tiny", "hf_wrong"), ("minigpt/none", "hf_secret")])
def test_push_is_refused(repository, token, hub, folders, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(InputError, match=f"push={repository}: not uploaded .*; check the name, the network") as caught:
        hugging_face.push(folders["tied"], repository)
    assert len(caught.value.problems) == 1 and "\n" not in str(caught.value)
    assert hub.files == {}
