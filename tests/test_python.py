"""The package in Python and in notebooks: loading by name, methods, tables and coloured words, completion, help."""

import dataclasses
import inspect
import pydoc
import typing
from html.parser import HTMLParser

import pytest

import minigpt_pl
from minigpt_pl import InputError, TextModel, generate, generate_text, generate_texts, score, stream_text, to_frame
from minigpt_pl.config import CONTROLS, ControlArguments, WordControls

LIKE = {"num_tokens": 8, "temperature": 0.5, "top_k": 5, "seed": 1}


@pytest.fixture
def cwd(trained, monkeypatch):
    monkeypatch.chdir(trained)
    return trained


@pytest.fixture(scope="module")
def model(trained):
    return minigpt_pl.load(trained / "outputs" / "tiny")


class Text(HTMLParser):
    """The text of HTML, and the attributes of its elements."""

    def __init__(self, html: str):
        super().__init__()
        self.text, self.elements = "", []
        self.feed(html)

    def handle_data(self, data):
        self.text += data

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))


class TestLoad:
    def test_by_name_and_without_a_name(self, cwd):
        for path in ("tiny", "outputs/tiny", cwd / "outputs" / "tiny", None):
            assert minigpt_pl.load(path).checkpoint.resolve() == cwd / "outputs" / "tiny" / "checkpoints" / "best.ckpt"
        assert minigpt_pl.load().checkpoint == minigpt_pl.load("tiny").checkpoint

    def test_from_another_folder(self, trained, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert minigpt_pl.load("tiny", trained / "outputs").checkpoint.parent.parent == trained / "outputs" / "tiny"
        with pytest.raises(InputError, match="path=tiny: no such run folder or checkpoint; go to the folder in which"):
            minigpt_pl.load("tiny")
        with pytest.raises(InputError, match="output_dir=outputs: holds no finished run"):
            minigpt_pl.load()


def test_each_function_takes_a_run(cwd, model):
    text = generate_text(model, "the cat", **LIKE)
    assert generate_text("tiny", "the cat", **LIKE) == generate_text("outputs/tiny", "the cat", **LIKE) == text
    assert generate_texts("tiny", ["the cat"], **LIKE) == [[text]]
    assert "the cat" + "".join(stream_text(cwd / "outputs" / "tiny", "the cat", **LIKE)) == text
    assert [record.text for record in generate("tiny", "the cat", **LIKE)] == [text]
    assert score("tiny", text) == score(model, text)
    with pytest.raises(InputError, match="model=5: must be a TextModel, or a run"):
        generate_text(5, "the cat")


def test_methods(model):
    expected = generate_text(model, "the cat", 8, 0.5, 5, 1, top_p=0.9)
    assert model.generate_text("the cat", 8, 0.5, 5, 1, top_p=0.9) == expected
    assert model("the cat", num_tokens=8, temperature=0.5, top_k=5, seed=1, top_p=0.9) == expected


class TestNotebook:
    def test_a_model_is_a_table(self, model):
        shown = Text(model._repr_html_())
        assert shown.elements[0] == ("table", {})
        assert "parameters2,810" in shown.text and "num_heads2" in shown.text and "best.ckpt" in shown.text

    def test_records_are_coloured_words(self, model):
        records = generate(model, "the <b>cat</b>", num_tokens=30, temperature=3, top_k=None, num_samples=2, seed=1)
        shown = Text(records[0]._repr_html_())
        spans = [attributes for tag, attributes in shown.elements if tag == "span"]
        assert shown.text.startswith(records[0].text) and "b" not in dict(shown.elements)
        assert [span["title"] for span in spans] == [
            f"probability {p:.2g}, rank {rank}"
            for p, rank in zip(records[0].probabilities, records[0].ranks, strict=True)
        ]
        likely = spans[max(range(len(spans)), key=records[0].probabilities.__getitem__)]
        unlikely = spans[min(range(len(spans)), key=records[0].probabilities.__getitem__)]
        assert likely["style"] != unlikely["style"]
        assert "temperature=3 top_k=None" in shown.text and "seed=1" in shown.text
        assert records._repr_html_() == "".join(record._repr_html_() for record in records)

    def test_scores_are_coloured_words(self, model):
        words = score(model, "the cat sees the <i> dog")
        shown = Text(words._repr_html_())
        assert shown.text.startswith("".join(word.text for word in words)) and "red less" in shown.text
        assert sum(tag == "span" for tag, _ in shown.elements) == len(words) - 1  # nothing predicts the first word

    def test_frame(self, model, monkeypatch):
        pandas = pytest.importorskip("pandas", reason="no pandas: pip install 'minigpt_pl[test]'")
        records = generate(model, ["the cat", "a dog"], num_samples=2, **LIKE)
        frame = to_frame(records)
        assert isinstance(frame, pandas.DataFrame) and len(frame) == 4
        assert frame.text.tolist() == [record.text for record in records]
        assert frame.temperature.tolist() == [0.5] * 4 and frame.seed.tolist() == [1, 2, 1, 2]
        assert "settings" not in frame
        words = score(model, "the cat sees")
        assert to_frame(words).probability.iloc[2] == words[2].probability

    def test_a_frame_needs_pandas(self, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "pandas", None)
        with pytest.raises(InputError, match="pandas is not installed, and to_frame needs it; pip install pandas"):
            to_frame([])

    def test_a_frame_of_something_else(self):
        with pytest.raises(InputError, match="records: must be the result of generate or score, not"):
            to_frame(["text"])


class TestEditor:
    """What editors, `help` and completion know."""

    @pytest.mark.parametrize(
        "function", [generate_text, generate_texts, generate, stream_text, TextModel.generate_text]
    )
    def test_signatures_have_all_controls(self, function):
        parameters = inspect.signature(function).parameters
        assert {*CONTROLS} <= parameters.keys() and parameters["top_p"].default == 1.0
        assert "controls" not in parameters

    def test_the_types_are_those_of_the_settings(self):
        known = {field.name: field.type for field in dataclasses.fields(WordControls)}
        arguments = typing.get_type_hints(ControlArguments)
        explicit = {"num_tokens", "temperature", "top_k"}  # arguments of their own
        assert arguments.keys() == known.keys() - explicit | {"max_tokens"}
        assert all(type_ == known[name] for name, type_ in arguments.items() if known.get(name) in (int, float))

    def test_help_is_a_guide(self):
        text = pydoc.plain(pydoc.render_doc(minigpt_pl))
        guide = text[: text.index("PACKAGE CONTENTS")]
        assert len(guide.splitlines()) < 40
        for name in ("load", "generate_text", "generate_texts", "stream_text", "generate", "score", "to_frame"):
            assert f"{name}(" in guide, name
