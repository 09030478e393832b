import csv
import json
import math
import re
import shutil
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import run_module, text_config

import minigpt_pl
from minigpt_pl import InputError, MiniGPT, score
from minigpt_pl.config import EvaluateConfig
from minigpt_pl.data.corpus import held_out_texts, open_corpus
from minigpt_pl.evaluate import _draw, evaluate
from minigpt_pl.measures import likelihood, ngrams
from minigpt_pl.measures.evaluation import ngram_losses, spelling_nats, summarize_losses
from minigpt_pl.measures.likelihood import document_losses
from minigpt_pl.measures.ngrams import NGramModel
from minigpt_pl.tokenizer import END, UNKNOWN_ID


def evaluated(folder, **settings) -> dict:
    evaluate(EvaluateConfig(run="tiny", **settings))
    return json.loads((folder / "outputs" / "tiny" / "evaluation.json").read_text())


@pytest.fixture
def a_run(trained, tmp_path, monkeypatch):
    """A copy of the small run, which a test may change."""
    shutil.copytree(trained / "outputs", tmp_path / "outputs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def network():
    torch.manual_seed(0)
    return MiniGPT(vocab_size=12, max_length=6, embed_dim=8, num_heads=2, feed_forward_dim=8, num_blocks=2).eval()


def some_documents():
    rng = np.random.default_rng(0)
    return [rng.integers(1, 12, length) for length in (0, 1, 2, 6, 7, 8, 9, 10, 11, 25)]


class TestLosses:
    def test_each_token_has_the_documented_context(self, network, monkeypatch):
        monkeypatch.setattr(likelihood, "BATCH_TOKENS", 20)  # windows of one document fall into two batches
        expected = []
        for document in some_documents():
            for place in range(1, len(document)):
                # Windows end at 6, 9, 12, ... The first of the three new tokens has 4 tokens before it, the last has 6.
                context = place if place <= 6 else 4 + (place - 7) % 3
                ids = torch.from_numpy(document[place - context : place])[None]
                logits = network(ids)[0][0, -1]
                expected.append(-logits.log_softmax(dim=0)[document[place]].item())
        np.testing.assert_allclose(document_losses(network, some_documents()), expected, rtol=1e-4, atol=1e-6)

    def test_documents_without_a_second_token(self, network):
        assert len(document_losses(network, [np.array([3]), np.array([], int)])) == 0

    def test_a_context_of_one(self):
        network = MiniGPT(vocab_size=12, max_length=1, embed_dim=8, num_heads=1, feed_forward_dim=8).eval()
        assert len(document_losses(network, [np.array([3, 4, 5, 6])])) == 3


def test_a_summary_without_a_known_word_is_valid_json():
    losses = {"a": np.array([1.0, 2.0], np.float32)}
    summary = summarize_losses(losses, [np.array([4, 1, 5])], np.arange(-1, 9), max_length=1, end_id=None)
    assert summary["beginning"]["a"]["word_loss"] is None and summary["beginning"]["a"]["word_perplexity"] is None
    assert summary["whole"]["a"]["word_loss"] == 2
    json.dumps(summary, allow_nan=False)


def test_summary_computed_by_hand():
    # One token is [UNK] (1), two are [END] (9); L = 2.
    documents = [np.array([4, 11, 1, 12, 9]), np.array([3, 9])]
    losses = {"a": np.array([1.0, 2.0, 3.0, 4.0, 6.0], np.float32)}
    ranks = np.arange(-1, 12)
    summary = summarize_losses(losses, documents, ranks, max_length=2, end_id=9)
    assert summary["whole"]["tokens"] == 5 and summary["whole"]["words"] == 2
    assert summary["whole"]["a"] == {
        "loss": pytest.approx(3.2),
        "perplexity": pytest.approx(math.exp(3.2)),
        "word_loss": pytest.approx(2),
        "word_perplexity": pytest.approx(math.exp(2)),
    }
    assert summary["beginning"]["tokens"] == 3 and summary["beginning"]["words"] == 1
    assert summary["beginning"]["a"]["loss"] == pytest.approx(3)
    assert summary["beginning"]["a"]["word_perplexity"] == pytest.approx(math.e)
    assert summary["by_position"] == [
        {"band": "1", "tokens": 2, "a": 3.5},
        {"band": "2", "tokens": 1, "a": 2.0},
        {"band": "over 2", "tokens": 2, "a": 3.5},
    ]
    assert summary["by_frequency"] == [
        {"band": "1-10", "tokens": 1, "a": 1.0},
        {"band": "11-100", "tokens": 1, "a": 3.0},
        {"band": "[UNK]", "tokens": 1, "a": 2.0},
        {"band": "[END]", "tokens": 2, "a": 5.0},
    ]
    without_end = summarize_losses(losses, documents, ranks, max_length=2, end_id=None)
    assert without_end["whole"]["words"] == 4, "without an end token, id 9 is a word"


def test_spelling_computed_by_hand():
    # The vocabulary has only "a": after the mark comes an a, then the end. All counts are 1, all discounts 0.5.
    unigram = 0.5 / 2 + 0.5 / 257
    first, then_end = 0.5 + 0.5 * unigram, 0.5 + 0.5 * (0.5 + 0.5 * unigram)
    expected = -math.log(first * then_end)
    assert spelling_nats(Counter({"a": 1}), ["a"]) == pytest.approx(expected)
    assert spelling_nats(Counter({"a": 3}), ["a"]) == pytest.approx(3 * expected)
    # A letter that is not in the vocabulary has the uniform probability, 1 / 257, at the beginning of the word.
    other = -math.log(0.5 * 0.5 / 257) - math.log(0.5 / 2 + 0.5 / 257)
    assert spelling_nats(Counter({"z": 1}), ["a"]) == pytest.approx(other)
    assert spelling_nats(Counter(), ["a"]) == 0


def test_ngrams_count_end_tokens_only_if_the_model_has_them():
    train = SimpleNamespace(tokens=np.array([2, 3, 9, 2, 9, 4, 2, 3, 9], np.uint16), offsets=np.array([0, 3, 5, 9]))
    documents = [np.array([2, 3]), np.array([4, 2])]
    losses, first = ngram_losses(documents, train, vocab_size=10, end_id=None)
    without = NGramModel.fit(np.array([2, 3, 2, 4, 2, 3]), np.array([0, 2, 3, 6]), 10, 2)
    np.testing.assert_allclose(losses["bigram"], [-without.log_probabilities(ids)[1] for ids in documents])
    unigram = NGramModel.fit(np.array([2, 3, 2, 4, 2, 3]), np.array([0, 2, 3, 6]), 10, 1)
    assert first == pytest.approx(-sum(unigram.log_probabilities(ids)[0] for ids in documents))
    with_end, _ = ngram_losses(documents, train, vocab_size=10, end_id=9)
    assert (with_end["bigram"] > losses["bigram"]).any()


def test_counting_ngrams_shows_progress(monkeypatch):
    shown = {}

    def recorded(*args, desc, disable, **_):
        shown[desc] = disable
        return range(*args)

    monkeypatch.setattr(ngrams, "trange", recorded)
    train = SimpleNamespace(tokens=np.array([2, 3, 9]), offsets=np.array([0, 3]))
    ngram_losses([np.array([2, 3])], train, vocab_size=10, end_id=9)
    assert shown == {"Counting 1-grams": None, "Counting 2-grams": None, "Counting 5-grams": None}


@pytest.mark.parametrize("own_file", [False, True])
def test_held_out_texts_are_the_validation_split(story, tmp_path, own_file):
    other = tmp_path / "other.txt"
    other.write_text("The cat sees it.\n \n<br />\nA dog, too!\n")
    changes = {"validation_path": str(other)} if own_file else {"validation_share": 0.2}
    config = text_config(story, cache_dir=str(tmp_path / "cache"), **changes)
    corpus = open_corpus(config, 200)
    texts = list(held_out_texts(config, corpus.tokenizer))
    ids = [[*corpus.tokenizer.encode(text).ids, corpus.tokenizer.token_to_id(END)] for text in texts]
    assert len(ids) > 1
    np.testing.assert_array_equal(np.concatenate(ids), corpus.validation.tokens)


class TestRun:
    def test_equals_the_measures_of_training(self, a_run):
        with (a_run / "outputs" / "tiny" / "metrics.csv").open(newline="") as file:
            best = min((row for row in csv.DictReader(file) if row["val/loss"]), key=lambda row: float(row["val/loss"]))
        means = evaluated(a_run)["beginning"]["network"]
        assert means["loss"] == pytest.approx(float(best["val/loss"]), rel=1e-5)
        assert means["word_perplexity"] == pytest.approx(float(best["val/word_perplexity"]), rel=1e-5)

    def test_ngram_losses_and_bits_from_their_definitions(self, a_run):
        result = evaluated(a_run)
        model = minigpt_pl.load("outputs/tiny")
        settings = yaml.safe_load((a_run / "outputs" / "tiny" / "config.yaml").read_text())["data"]
        config = text_config(settings["path"], cache_dir=settings["cache_dir"])
        corpus = open_corpus(config, 200)
        texts = list(held_out_texts(config, corpus.tokenizer))
        documents = [np.array([*model.tokenizer.encode(text).ids, model.end_id]) for text in texts]
        assert result["documents"] == len(texts)
        ngrams = {
            order: NGramModel.fit(corpus.train.tokens, corpus.train.offsets, model.network.vocab_size, order)
            for order in (1, 5)
        }
        nats = np.concatenate([-ngrams[5].log_probabilities(document)[1:] for document in documents])
        assert result["whole"]["5-gram"]["loss"] == pytest.approx(nats.mean(), rel=1e-5)
        first = -sum(ngrams[1].log_probabilities(document)[0] for document in documents)
        num_bytes = sum(len(text.encode()) for text in texts)
        assert result["bytes"] == num_bytes
        losses = document_losses(model.network, documents)
        bits = (losses.sum() + first) / math.log(2) / num_bytes + result["spelling_bits_per_byte"]
        assert result["whole"]["network"]["bits_per_byte"] == pytest.approx(bits, rel=1e-5)

    def test_own_text(self, a_run):
        before = evaluated(a_run)
        text = a_run / "my text.txt"
        text.write_text("The cat sees the dog.\nAnd it's a zebra, \N{SNOWMAN}.\n<br />\n\nThe king\n", encoding="utf-8")
        evaluated(a_run, text=str(text))
        evaluated(a_run, num_documents=1)
        folder = a_run / "outputs" / "tiny"
        assert (folder / "evaluation-my text.png").read_bytes()[:4] == b"\x89PNG"
        result = json.loads((folder / "evaluation-my text.json").read_text())
        assert result["documents"] == 3 and result["unknown_words"] == 2
        spelled = spelling_nats(
            Counter(["zebra", "\N{SNOWMAN}"]),
            minigpt_pl.tokenizer.list_vocabulary(minigpt_pl.load(folder).tokenizer)[2:-1],
        )
        assert result["spelling_bits_per_byte"] == pytest.approx(spelled / math.log(2) / result["bytes"])
        network = result["whole"]["network"]
        bits = network["loss"] * result["whole"]["tokens"] / math.log(2) / result["bytes"]
        assert network["bits_per_byte"] > bits + result["spelling_bits_per_byte"]
        assert before["documents"] > 1
        evaluated(a_run, text=str(text), num_documents=2)
        assert json.loads((folder / "evaluation-my text-2.json").read_text())["documents"] == 2
        assert json.loads((folder / "evaluation-1.json").read_text())["documents"] == 1
        assert json.loads((folder / "evaluation.json").read_text())["documents"] == before["documents"]
        for document, count in (("paragraph", 2), ("file", 1)):
            evaluated(a_run, text=str(text), document=document)
            assert json.loads((folder / "evaluation-my text.json").read_text())["documents"] == count

    def test_moved_training_text(self, a_run, story):
        settings = a_run / "outputs" / "tiny" / "config.yaml"
        contents = yaml.safe_load(settings.read_text())
        contents["data"]["path"] = "gone.txt"
        settings.write_text(yaml.safe_dump(contents))
        with pytest.raises(InputError, match="data.path=gone.txt: .* the text of run=tiny has moved.*source=PATH"):
            evaluated(a_run)
        with pytest.raises(InputError, match="^source=none.txt: no such file or folder"):
            evaluated(a_run, source="none.txt")
        assert evaluated(a_run, source=str(story))["documents"] > 1

    def test_command_line(self, a_run):
        done = run_module("evaluate", cwd=a_run, env={"COLUMNS": "20"})
        assert done.returncode == 0, done.stderr
        result = json.loads((a_run / "outputs" / "tiny" / "evaluation.json").read_text())
        lines = done.stdout.splitlines()
        assert "checkpoint: outputs/tiny/checkpoints/best.ckpt" in lines[0]
        (row,) = [line for line in lines if line.startswith("network") and line.count(".") == 4]
        whole = result["whole"]["network"]
        perplexities = [f"{whole[name]:,.2f}" for name in ("perplexity", "word_perplexity")]
        assert row.split()[1:] == [f"{whole['loss']:.4f}", *perplexities, f"{whole['bits_per_byte']:.4f}"]
        assert max(len(line) for line in lines if re.match(r" |[\w\[\]-]+ +[\d.]", line)) <= 60, "wide row"
        files = {path.name for path in (a_run / "outputs" / "tiny").glob("*evaluation*")}
        assert files == {"evaluation.json", "evaluation.png"}
        assert "Wrote outputs/tiny/evaluation.png" in done.stderr
        refused = run_module("evaluate", "num_documents=0", "document=page", cwd=a_run)
        assert refused.returncode == 2 and "Traceback" not in refused.stderr
        assert refused.stderr.count("error: ") == 2

    def test_the_chart_joins_only_ranks(self):
        """[UNK] and [END] have no rank, so they are points beside the line."""
        rows = [{"band": band, "network": 5.0} for band in ("1-10", "11-100", "[UNK]", "[END]")]
        result = {"checkpoint": "c", "text": "t", "whole": {"network": {"word_perplexity": 200.0}}}
        figure = _draw(result | {"by_position": rows[:2], "by_frequency": rows}, ["network"])
        line, points = figure.axes[2].lines
        assert (list(line.get_xdata()), line.get_linestyle()) == (["1-10", "11-100"], "-")
        assert (list(points.get_xdata()), points.get_linestyle()) == (["[UNK]", "[END]"], "None")

    @pytest.mark.parametrize(
        "contents, message",
        [
            (None, "text=my.txt: no such file"),
            (b"", "text=my.txt: the file is empty"),
            (b"  \n\n \n", "text=my.txt: has no words"),
            (b"\xff\xfe\x00", "text=my.txt: cannot be read"),
            (b"zebra xylophone\n", "text=my.txt: no document has a known word after its first"),
        ],
    )
    def test_unusable_texts(self, a_run, contents, message):
        if contents is not None:
            (a_run / "my.txt").write_bytes(contents)
        with pytest.raises(InputError, match=message) as raised:
            evaluated(a_run, text="my.txt")
        assert len(raised.value.problems) == 1 and "\n" not in str(raised.value)

    @pytest.mark.parametrize(
        "break_it, message",
        [
            (lambda run: (run / "tokenizer.json").unlink(), "tokenizer.json: no such file"),
            (lambda run: (run / "config.yaml").unlink(), "config.yaml: cannot be read"),
            (lambda run: (run / "config.yaml").write_text("data: [1"), "config.yaml: not the settings of a run"),
            (lambda run: (run / "config.yaml").write_text("data: {path: x}"), "config.yaml: not the settings of a run"),
        ],
    )
    def test_broken_runs(self, a_run, break_it, message):
        break_it(a_run / "outputs" / "tiny")
        with pytest.raises(InputError, match=message):
            evaluated(a_run)

    def test_another_text_than_the_training_text(self, a_run):
        other = a_run / "other.txt"
        other.write_text("The cat sees the dog.\n" * 30 + "\n".join(f"The dog sees {i} cats." for i in range(200)))
        with pytest.raises(InputError, match="run=tiny: was trained on .*give the path of the old text: source=PATH"):
            evaluated(a_run, source=str(other))

    def test_no_held_out_text(self, a_run):
        folder = a_run / "outputs" / "tiny"
        contents = yaml.safe_load((folder / "config.yaml").read_text())
        contents["data"]["validation_share"] = 0
        (folder / "config.yaml").write_text(yaml.safe_dump(contents))
        (folder / "run.json").write_text("{}")
        with pytest.raises(InputError, match="run=tiny: has no held-out text; give text=FILE"):
            evaluated(a_run)


class TestScore:
    def test_words_with_probability_and_rank(self, trained):
        model = minigpt_pl.load(trained / "outputs" / "tiny")
        text = "The cat likes the zebra, and it's a well-known king. " * 3
        words = score(model, text)
        ids = model.tokenizer.encode(text).ids
        assert len(ids) > 2 * model.network.max_length
        assert "".join(word.text for word in words) == model.tokenizer.decode(ids)
        assert words[0].text == "the" and (words[0].probability, words[0].rank) == (None, None)
        assert [word.text for word in words if not word.known] == [" [UNK]"] * 3
        assert ids.count(UNKNOWN_ID) == 3
        length = model.network.max_length
        for place, word in enumerate(words[1:], start=1):
            window = torch.tensor([ids[max(place - length, 0) : place]])
            probabilities = model.network(window)[0][0, -1].softmax(-1)
            assert word.probability == pytest.approx(float(probabilities[ids[place]].detach()), rel=1e-4)
        logits = model.network(torch.tensor([ids[:16]]))[0][0]
        order = logits.argsort(dim=1, descending=True).tolist()
        assert [word.rank for word in words[1:17]] == [
            order[place].index(id_) + 1 for place, id_ in enumerate(ids[1:17])
        ]
        assert len({word.rank for word in words[1:17]}) > 3

    def test_equals_the_generated_probabilities(self, trained):
        model = minigpt_pl.load(trained / "outputs" / "tiny")
        record = minigpt_pl.generate(
            model, "the cat", 3 * model.network.max_length, temperature=1.5, top_k=None, seed=1
        )[0]
        words = score(model, record.text)[2:]
        assert [word.text for word in words] == record.tokens and len(words) > model.network.max_length
        assert [word.probability for word in words] == pytest.approx(record.probabilities, rel=1e-4)
        assert [word.rank for word in words] == record.ranks

    def test_a_single_word(self, trained):
        (word,) = score(minigpt_pl.load(trained / "outputs" / "tiny"), "Cat")
        assert word == minigpt_pl.ScoredWord("cat", None, None, True)

    @pytest.mark.parametrize("text, message", [("", "text='': has no words"), ("zebra", "none of its words")])
    def test_bad_texts(self, trained, text, message):
        with pytest.raises(InputError, match=message):
            score(minigpt_pl.load(trained / "outputs" / "tiny"), text)
