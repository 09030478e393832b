"""Comparison of runs: losses, power laws, and refused input."""

import json
import math
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PROMPTS, TINY_RUN, records, run_main, run_module, train

from minigpt_pl import MiniGPT, load
from minigpt_pl.cli import app
from minigpt_pl.data.corpus import open_run_corpus
from minigpt_pl.exploration.compare import _by_context
from minigpt_pl.exploration.scaling import power_law, word_losses

COMPARE = ["compare=[tiny,w8,w24,w32]", "prompts=prompts.yaml", "num_tokens=12", "num_seeds=2", "top_k=5"]


@pytest.fixture(scope="module")
def compared(trained, story, tmp_path_factory):
    """Runs that differ only in width, one run with less text, and a comparison made by the command line."""
    cwd = tmp_path_factory.mktemp("compared")
    shutil.copytree(trained, cwd, dirs_exist_ok=True)
    (cwd / "prompts.yaml").write_text(PROMPTS)
    changes = {name: f"model.embed_dim={name[1:]}" for name in ("w8", "w24", "w32")}
    changes |= {"less": "data.max_sequences=64", "words": "model.vocab_size=12"}
    for name, change in changes.items():
        given = [*TINY_RUN, f"data.path={story}", f"output_dir={cwd / 'outputs'}", f"run_name={name}", change]
        given += ["trainer.max_epochs=2", "text_generator.every_n_epochs=0"]
        train(app.to_settings(app.compose("train", given)))
    done = run_module("explore", *COMPARE, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return cwd


class TestCompare:
    @pytest.fixture
    def found(self, compared):
        return json.loads((compared / "outputs/compare/compare.json").read_text())

    def test_the_folder(self, compared):
        folder = compared / "outputs/compare"
        files = {path.name for path in folder.iterdir()}
        assert files == {"compare.html", "compare.md", "compare.json", "compare.png", "samples.jsonl", "held_out.jsonl"}
        made = records(compared, folder=folder)
        assert [s["run"] for s in made] == [name for name in ("tiny", "w8", "w24", "w32") for _ in range(4 * 2)]
        assert {(s["settings"]["temperature"], s["settings"]["top_k"]) for s in made} == {(0.8, 5)}

    def test_the_page_has_all_texts(self, compared):
        page = (compared / "outputs/compare/compare.html").read_text()
        data = json.loads(re.search(r'<script id="data" type="application/json">(.*)</script>', page)[1])
        made = records(compared, folder=compared / "outputs/compare")
        assert data["column"] == "run" and [s["name"] for s in data["samples"]] == [s["run"] for s in made]
        for shown, sample in zip(data["samples"], made, strict=True):
            text = sample["prompt"].rstrip() + "".join(shown["tokens"])
            assert text.split() == sample["text"].split() and len(shown["metrics"]) == len(data["labels"])
        assert page.count('class="answer"') == 1

    def test_loss_of_the_known_held_out_words(self, compared, found, monkeypatch):
        monkeypatch.chdir(compared)
        for name in ("tiny", "w32"):
            model = load(compared / "outputs" / name)
            corpus = open_run_corpus(compared / "outputs" / name, model.tokenizer, None)[1]
            held_out = corpus.validation
            nats = []
            for start, end in zip(held_out.offsets, held_out.offsets[1:], strict=False):
                ids = held_out.tokens[start : end - 1].tolist()  # the end token is not a word
                assert len(ids) <= 17, "one window"
                logits, _ = model.network(torch.tensor([ids[:-1]]))
                losses = torch.nn.functional.cross_entropy(logits[0], torch.tensor(ids[1:]), reduction="none")
                nats += [loss for loss, id_ in zip(losses.tolist(), ids[1:], strict=True) if id_ != 1]
            mean, low, high = found["runs"][name]["word_loss"]
            assert mean == pytest.approx(np.mean(nats), rel=1e-4) and low < mean < high
            assert found["words"] == len(nats)
        less = found["runs"]["w32"]["less_first"]
        assert less[0] == pytest.approx(found["runs"]["w32"]["word_loss"][0] - found["runs"]["tiny"]["word_loss"][0])

    def test_training_text_of_a_run(self, compared, found, monkeypatch):
        monkeypatch.chdir(compared)
        model = load(compared / "outputs/tiny")
        corpus = open_run_corpus(compared / "outputs/tiny", model.tokenizer, None)[1]
        expected = sum(min(length, 17) - 1 for length in np.diff(corpus.train.offsets))
        for name in ("tiny", "w8", "w24", "w32"):
            assert found["runs"][name]["text"] == expected
            assert found["runs"][name]["parameters"] == sum(
                p.numel() for p in load(compared / "outputs" / name).network.parameters()
            )
        saved = torch.load(compared / "outputs/w8/checkpoints/best.ckpt", weights_only=True)["global_step"]
        assert found["runs"]["w8"]["passes"] == saved / -(-len(corpus.train.offsets[1:]) // 16) in (1, 2)

    def test_power_law_of_four_runs(self, compared, found):
        (fit,) = found["fits"]
        sizes = {name: run["parameters"] for name, run in found["runs"].items()}
        assert fit["against"] == "parameters" and fit["of"] == sorted(sizes, key=sizes.get)
        losses = [found["runs"][name]["word_loss"][0] for name in fit["of"]]
        slope = np.polyfit(np.log([sizes[name] for name in fit["of"]]), np.log(losses), 1)[0]
        mean, low, high = fit["exponent"]
        assert mean == pytest.approx(-slope) and low < mean < high
        report = (compared / "outputs/compare/compare.md").read_text()
        assert f"with a = {mean:.3f} [{low:.3f}, {high:.3f}], over 4 runs" in report
        assert (
            "Against tokens: no comparison, because no two runs with equal passes differ only in data.max_sequences"
            in report
        )

    def test_the_answers_are_kept(self, compared):
        report = compared / "outputs/compare/compare.md"
        before = report.read_bytes()
        done = run_main("explore", *COMPARE, "compare=[tiny,less]", cwd=compared)
        assert done.returncode == 2 and report.read_bytes() == before
        assert "folder=outputs/compare: has a comparison; give folder=ANOTHER" in done.stderr

    def test_no_power_law_of_two_runs(self, compared):
        done = run_main("explore", *COMPARE, "compare=[tiny,less]", "folder=two", cwd=compared)
        assert done.returncode == 0, done.stderr
        report = (compared / "two/compare.md").read_text()
        assert "Against tokens: less, tiny differ only in data.max_sequences. These are too few for a power" in report
        assert (
            "Against parameters: no comparison, because no two runs with equal passes differ only in the network"
            in report
        )
        header, _, first, second = report[report.index("| run | ") :].splitlines()[:4]
        assert header.startswith("| run | max_sequences | parameters |"), "the settings that differ"
        assert first.startswith("| tiny | None |") and second.startswith("| less | 64 |")

    def test_report_has_a_text_of_each_run(self, compared):
        report = (compared / "outputs/compare/compare.md").read_text()
        texts = [s for s in records(compared, folder="outputs/compare") if s["prompt"] == "the cat" and s["seed"] == 0]
        assert len(texts) == 4
        for sample in texts:
            assert f"**{sample['run']}**: _the cat_" in report
            assert sample["text"].split()[-1].strip(".,") in report.split(f"**{sample['run']}**: ")[1].splitlines()[0]

    def test_report_has_the_figures_of_the_record(self, compared, found):
        report = (compared / "outputs/compare/compare.md").read_text()
        for name, run in found["runs"].items():
            lines = [line for line in report.splitlines() if line.startswith(f"| {name} |")]
            line = next(line for line in lines if f"| {run['parameters']:,} |" in line)
            assert f"| {run['word_loss'][0]:.3f} [" in line and f"| {run['text']:,} | {run['passes']:.2f} |" in line
        made = [s for s in records(compared, folder=compared / "outputs/compare") if s["run"] == "w24"]
        by = {s["prompt"]: [r["metrics"]["ngram_loss"] for r in made if r["prompt"] == s["prompt"]] for s in made}
        assert found["runs"]["w24"]["consistency"]["ngram_loss"][0] == pytest.approx(np.mean(list(by.values())))

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (["compare=[tiny]"], "compare=['tiny']: give two runs or more"),
            (["compare=[tiny,none]"], "compare=none: no such run folder or checkpoint"),
            (["compare=[tiny,outputs/tiny]"], "compare=tiny: occurs twice"),
            (["compare=[tiny,words]"], "compare=words: has other words than tiny"),
            (["compare=[tiny,held]"], "compare=held: has other held-out text than tiny"),
            (["run=tiny"], "run=tiny: compare= already names runs"),
            (["top_p=[0.5,1.0]"], "top_p=[0.5, 1.0]: compare= takes one value of each control"),
        ],
    )
    def test_runs_that_do_not_compare_are_refused(self, compared, overrides, message):
        if "held" in overrides[0]:
            shutil.copytree(compared / "outputs/tiny", compared / "outputs/held")
            config, record = compared / "outputs/held/config.yaml", compared / "outputs/held/run.json"
            config.write_text(config.read_text().replace("validation_share: 0.05", "validation_share: 0.2"))
            record.write_text(json.dumps(json.loads(record.read_text()) | {"text": {}}))
        done = run_main("explore", *COMPARE, *overrides, "folder=refused", cwd=compared)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 2 and len(errors) == 1 and message in errors[0], done.stderr
        assert not (compared / "refused").exists()

    def test_all_runs_predict_the_same_tokens(self):
        torch.manual_seed(0)
        sizes = {"vocab_size": 12, "embed_dim": 8, "num_heads": 1, "feed_forward_dim": 8}
        networks = [MiniGPT(max_length=length, **sizes).eval() for length in (4, 8)]
        ids = torch.randint(2, 12, (5, 10))  # 5 documents of 9 words and an end token
        held_out = SimpleNamespace(tokens=ids.numpy().ravel(), offsets=np.arange(0, 51, 10))
        runs = [
            SimpleNamespace(name=name, model=SimpleNamespace(network=network), held_out=held_out)
            for name, network in zip("ab", networks, strict=True)
        ]
        found = _by_context(runs, longest=8)
        assert list(found["a"]) == [1, 2, 4] and list(found["b"]) == [1, 2, 5, 8]
        for name, network in zip("ab", networks, strict=True):
            for context, estimate in found[name].items():
                logits = network(ids[:, 8 - context : 8])[0][:, -1]
                loss = torch.nn.functional.cross_entropy(logits, ids[:, 8]).item()
                whole = found[name][max(found[name])].mean if context < max(found[name]) else 0
                assert estimate.mean == pytest.approx(loss - whole, rel=1e-3, abs=1e-6)

    def test_power_law(self):
        x = [1e5, 2e5, 4e5, 8e5]
        fit = power_law(x, [9 * value**-0.07 for value in x])
        assert fit["scale"] == pytest.approx(9) and fit["exponent"] == pytest.approx((0.07, 0.07, 0.07))
        assert power_law(x[:3], [3.0, 2.0, 1.0]) == {} and power_law([*x[:3], x[0]], [3.0, 2.0, 1.0, 3.1]) == {}
        # By hand: 4 points at ln x = 0, 1, 2, 3, residuals +-0.01; t(2) at 97.5 % is 4.3027.
        loss = np.exp(-0.1 * np.arange(4) + 0.01 * np.array([1, -1, -1, 1]))
        mean, low, high = power_law(np.exp(np.arange(4)), loss)["exponent"]
        assert mean == pytest.approx(0.1)
        assert (high - low) / 2 == pytest.approx(4.3027 * math.sqrt(4 * 0.01**2 / 2 / 5), rel=1e-4)

    def test_word_losses_resample_the_same_documents_for_all_runs(self):
        rng = np.random.default_rng(0)
        documents = [rng.integers(2, 9, rng.integers(2, 30)) for _ in range(80)]
        documents[0][1:] = 1  # only [UNK]: no known word
        easy = np.concatenate([np.full(len(d) - 1, rng.normal(4, 1)) for d in documents])
        found = word_losses({"a": easy, "b": easy - 0.25}, documents)
        assert found["a"][1] is None and found["b"][1] == pytest.approx((-0.25, -0.25, -0.25))
        assert found["a"][0].mean == pytest.approx(easy[len(documents[0]) - 1 :].mean())
        assert found["a"][0].high - found["a"][0].low > 0.2  # the documents differ
