"""Import of a Keras file as a run folder, and export. Wrong files give one clear line. Keras itself: tests/parity/."""

import io
import json
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import run_main

import minigpt_pl
from minigpt_pl.checkpoints import read_checkpoint
from minigpt_pl.config import ConvertConfig
from minigpt_pl.convert import convert, read_vocabulary
from minigpt_pl.errors import InputError
from minigpt_pl.keras_weights import read_keras, write_keras
from minigpt_pl.model import MiniGPT
from minigpt_pl.runs import read_record

h5py = pytest.importorskip("h5py", reason="h5py is not installed: pip install 'minigpt_pl[keras]'")

# All sizes differ, so a test finds two that are exchanged.
ARGUMENTS = {
    "vocab_size": 40,
    "max_length": 9,
    "embed_dim": 8,
    "num_heads": 3,
    "head_dim": 5,
    "feed_forward_dim": 11,
    "num_blocks": 1,
    "dropout": 0.1,
    "tie_embeddings": False,
}
WORDS = ["", "[UNK]", "the", "movie", ".", "'s", "é", "a\u0085b", "no\u00a0break", *(f"w{i}" for i in range(30))]


def network(**arguments) -> MiniGPT:
    """A network without weights of exactly 0 or 1."""
    torch.manual_seed(0)
    model = MiniGPT(**ARGUMENTS | arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def keras_file(tmp_path) -> Path:
    path = tmp_path / "model.weights.h5"
    write_keras(path, network())
    return path


@pytest.fixture
def vocabulary(tmp_path) -> Path:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(WORDS), encoding="utf-8")
    return path


def run(tmp_path: Path, **settings) -> Path:
    settings = {name: str(value) for name, value in settings.items()}
    return convert(ConvertConfig(**settings, output_dir=str(tmp_path / "outputs")))


def fails(match: str, call, *args, **settings) -> None:
    with pytest.raises(InputError, match=match) as caught:
        call(*args, **settings)
    assert len(caught.value.problems) == 1
    assert "\n" not in str(caught.value)


def edit(path: Path, change) -> None:
    with h5py.File(path, "r+") as file:
        change(file)


# ------------------------------------------------------------------------------------- import and export


@pytest.mark.parametrize(
    "arguments", [{}, {"num_blocks": 11}, {"head_dim": 8, "num_heads": 2}, {"tie_embeddings": True}], ids=str
)
def test_weights_come_back_bit_by_bit(arguments, tmp_path):
    """With eleven blocks, because HDF5 sorts `transformer_block_10` before `transformer_block_2`."""
    model = network(**arguments)
    write_keras(tmp_path / "model.weights.h5", model)
    back = read_keras(tmp_path / "model.weights.h5")
    assert back.arguments == ARGUMENTS | arguments | {"tie_embeddings": False}
    assert back.state_dict.keys() == model.state_dict().keys()
    assert all(torch.equal(back.state_dict[name], weight) for name, weight in model.state_dict().items())


def test_a_token_shift_has_no_place_in_a_keras_file(tmp_path):
    model, path = network(token_shift=True), tmp_path / "a.weights.h5"
    fails("to_keras=.*a.weights.h5: the notebook's model has no token shift", write_keras, path, model)
    assert not any(tmp_path.iterdir())


def test_the_file_comes_back_bit_by_bit(keras_file, vocabulary, tmp_path):
    """From file to run folder to file: all arrays, and the words."""
    folder = run(tmp_path, from_keras=keras_file, vocabulary=vocabulary)
    run(tmp_path, to_keras=tmp_path / "back.weights.h5", run=folder, vocabulary=tmp_path / "back.txt")
    (tmp_path / "new").mkdir()
    run(tmp_path, to_keras=tmp_path / "new" / "back.weights.h5", run=folder)
    assert (tmp_path / "new" / "vocab.txt").read_bytes() == (tmp_path / "back.txt").read_bytes()

    def arrays(path: Path) -> dict[str, bytes]:
        found = {}
        with h5py.File(path) as file:
            file.visititems(
                lambda name, item: (
                    found.update({name: (item.shape, item[()].tobytes())}) if isinstance(item, h5py.Dataset) else None
                )
            )
        return found

    assert len(arrays(keras_file)) == 20
    assert arrays(keras_file) == arrays(tmp_path / "back.weights.h5")
    assert (tmp_path / "back.txt").read_text(encoding="utf-8") == vocabulary.read_text(encoding="utf-8") + "\n"


def test_layers_of_other_names_are_recognised(keras_file, tmp_path):
    """Classes with other names, and numbers that Keras adds. Only the arrays inside a layer show its kind."""

    def rename(file) -> None:
        layers = file["layers"]
        layers.move("transformer_block", "my_decoder_3")
        layers.move("dense", "a_head")
        layers.move("token_and_position_embedding", "z_embedding_7")
        layers.create_group("input_layer/vars")

    edit(keras_file, rename)
    state = read_keras(keras_file).state_dict
    assert all(torch.equal(state[name], weight) for name, weight in network().state_dict().items())


def test_a_keras_archive_contains_the_dropout(keras_file, tmp_path):
    path = tmp_path / "model.keras"
    block = {"config": {"embed_dim": 8, "num_heads": 3, "ff_dim": 11, "rate": 0.3}}
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(keras_file, "model.weights.h5")
        archive.writestr("config.json", json.dumps({"config": {"layers": [{"config": {"rate": 0.5}}, block]}}))
    assert read_keras(path).arguments == ARGUMENTS | {"dropout": 0.3}


# ------------------------------------------------------------------------------------------ the run folder


def test_the_run_folder_holds_a_usable_model(keras_file, vocabulary, tmp_path):
    folder = run(tmp_path, from_keras=keras_file, vocabulary=vocabulary)
    assert folder == tmp_path / "outputs" / "keras-001"
    assert read_record(folder)["status"] == "finished"
    model = minigpt_pl.load(folder)
    assert all(torch.equal(model.network.state_dict()[name], weight) for name, weight in network().state_dict().items())
    assert model.tokenizer.encode("The movie's <br />é a\u0085b no\u00a0break x").ids == [2, 3, 5, 6, 7, 8, 1]
    assert model.tokenizer.token_to_id("[END]") == 39  # the logit that the notebook does not use
    assert minigpt_pl.generate_text(model, "the movie", num_tokens=5, seed=0).startswith("the movie")


def test_the_commands_take_it_and_training_goes_on(keras_file, vocabulary, tmp_path):
    """convert, sample, train resume=, and resume= again, with a text that has only some of the words."""
    text = ["the movie 's w1 w2", "unheard w2 words . w3", "w4 w5 the the"] * 4
    (tmp_path / "text.txt").write_text("\n".join(text), encoding="utf-8")

    def command(*arguments: str) -> str:
        done = run_main(*arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    command("convert", f"from_keras={keras_file.name}", "vocabulary=vocab.txt", "run_name=imported")
    assert command("sample", "run=imported", "prompt=the movie", "num_tokens=3").startswith("the movie")
    again = ("train", "resume=outputs/imported", "data=text", "data.path=text.txt", "data.batch_size=4", "trainer=cpu")
    last = tmp_path / "outputs" / "imported" / "checkpoints" / "last.ckpt"
    # With so small a learning rate the weights stay those of the Keras file.
    command(*again, "trainer.max_epochs=1", "optimizer.learning_rate=1e-30", "model.dropout=0")
    trained = read_checkpoint(last)
    assert trained["global_step"] == 3
    assert all(
        torch.equal(trained["state_dict"][f"model.{name}"], weight) for name, weight in network().state_dict().items()
    )
    # Lightning would use the checkpoint's learning rate.
    refused = run_main(*again, "optimizer.learning_rate=0.5", cwd=tmp_path)
    assert refused.returncode == 2
    assert "optimizer.learning_rate=0.5: the checkpoint has 1e-30" in refused.stderr
    command(*again, "trainer.max_epochs=2")
    trained = read_checkpoint(last)
    assert trained["global_step"] == 6
    moments = trained["optimizer_states"][0]["state"][0]["exp_avg"]  # of the token embedding
    seen = moments.abs().sum(dim=1) > 0
    inputs = {0, 1, 2, 3, 5, *(WORDS.index(f"w{i}") for i in range(1, 6)), 4}
    assert set(seen.nonzero().flatten().tolist()) <= inputs  # training used the imported ids
    assert {2, 3, WORDS.index("w2")} <= set(seen.nonzero().flatten().tolist())


def test_a_failing_command_prints_one_line(tmp_path, vocabulary):
    done = run_main("convert", "from_keras=none.keras", "vocabulary=vocab.txt", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: from_keras=none.keras: no such file; give ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "outputs").exists()


# ------------------------------------------------------------------------------------------ wrong files


def test_an_array_that_does_not_fit(keras_file):
    def cut(file) -> None:
        place = "layers/transformer_block/att/key_dense/vars/0"
        array = file[place][:, :2]
        del file[place]
        file[place] = array

    edit(keras_file, cut)
    fails(r"key_dense/vars/0 has shape \(8, 2, 5\), but the arrays before it need \(8, 3, 5\)", read_keras, keras_file)


def test_an_array_of_other_rank(keras_file):
    def flatten(file) -> None:
        place = "layers/transformer_block/att/query_dense/vars/0"
        array = file[place][()].reshape(8, 15)
        del file[place]
        file[place] = array

    edit(keras_file, flatten)
    fails(r"query_dense/vars/0 has shape \(8, 15\), but the arrays before it need .*'H', 'K'\)", read_keras, keras_file)


def test_an_array_of_double_precision(keras_file):
    def widen(file) -> None:
        array = file["layers/dense/vars/1"][()].astype("float64")
        del file["layers/dense/vars/1"]
        file["layers/dense/vars/1"] = array

    edit(keras_file, widen)
    fails("layers/dense/vars/1 is float64, not float32", read_keras, keras_file)


@pytest.mark.parametrize("missing", ["layernorm2/vars/1", "att/query_dense/vars/1", "ffn/layers/dense_1"])
def test_a_block_without_a_part(missing, keras_file):
    edit(keras_file, lambda file: file.pop(f"layers/transformer_block/{missing}"))
    fails("the notebook has no layer like transformer_block", read_keras, keras_file)


def test_a_layer_that_the_notebook_does_not_have(keras_file):
    edit(keras_file, lambda file: file.create_dataset("layers/lstm/cell/vars/0", data=[0.0]))
    fails("the notebook has no layer like lstm", read_keras, keras_file)


@pytest.mark.parametrize(
    ("layer", "count"), [("dense", "1 Transformer and 0 output"), ("transformer_block", "0 Transformer and 1 output")]
)
def test_a_model_without_a_layer(layer, count, keras_file):
    edit(keras_file, lambda file: file.pop(f"layers/{layer}"))
    fails(f"holds 1 embedding, {count} layers", read_keras, keras_file)


def test_files_that_are_not_keras_files(keras_file, tmp_path):
    fails("no such file; give", read_keras, tmp_path / "none.keras")
    for name in ("text.keras", "text.weights.h5"):
        (tmp_path / name).write_text("not a model")
        fails(f"{name}: cannot be read", read_keras, tmp_path / name)
    (tmp_path / "model.h5").write_bytes(keras_file.read_bytes())
    fails("model.h5: must end in .keras or .weights.h5", read_keras, tmp_path / "model.h5")
    (tmp_path / "cut.weights.h5").write_bytes(keras_file.read_bytes()[:3_000])
    fails("cut.weights.h5: cannot be read", read_keras, tmp_path / "cut.weights.h5")
    with zipfile.ZipFile(tmp_path / "other.keras", "w") as archive:
        archive.writestr("config.json", "{}")
    fails("other.keras: cannot be read", read_keras, tmp_path / "other.keras")
    empty = io.BytesIO()
    h5py.File(empty, "w").close()
    (tmp_path / "empty.weights.h5").write_bytes(empty.getvalue())
    fails(
        "holds 0 embedding, 0 Transformer and 0 output layers, but needs 1, ",
        read_keras,
        tmp_path / "empty.weights.h5",
    )


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (WORDS[:-1], "has 38 entries; a model with 40 logits has 39"),
        ([*WORDS, "more"], "has 40 entries"),
        (WORDS[1:], "must begin with an empty line"),
        ([*WORDS[:4], "the", *WORDS[5:]], "line 5 repeats line 3 \\('the'\\)"),
        ([*WORDS[:4], "it's", *WORDS[5:]], 'line 5 \\("it\'s"\\) is not one word of the notebook'),
        ([*WORDS[:4], "Movie", *WORDS[5:]], "line 5 \\('Movie'\\) is not one word of the notebook"),
        ([*WORDS[:4], "", *WORDS[5:]], "line 5 repeats line 1"),
        ([], "must begin with an empty line"),
    ],
)
def test_a_vocabulary_of_another_model(words, match, keras_file, vocabulary, tmp_path):
    vocabulary.write_text("\n".join(words), encoding="utf-8")
    fails(match, run, tmp_path, from_keras=keras_file, vocabulary=vocabulary)
    assert not (tmp_path / "outputs").exists()


def test_a_vocabulary_that_is_not_text(vocabulary, tmp_path):
    fails("none.txt: cannot be read", read_vocabulary, tmp_path / "none.txt", 40)
    vocabulary.write_bytes(b"\n[UNK]\n\xff\xfe")
    fails("vocab.txt: cannot be read", read_vocabulary, vocabulary, 40)


@pytest.mark.parametrize("text", ["\n".join(WORDS) + "\n", "\r\n".join(WORDS) + "\r\n", "\ufeff" + "\n".join(WORDS)])
def test_a_vocabulary_from_another_system(text, vocabulary):
    vocabulary.write_bytes(text.encode())
    assert read_vocabulary(vocabulary, 40) == [*WORDS, "[END]"]


def test_no_file_is_overwritten(keras_file, vocabulary, tmp_path):
    folder = run(tmp_path, from_keras=keras_file, vocabulary=vocabulary, run_name="mine")
    fails("run_name=mine: .* exists", run, tmp_path, from_keras=keras_file, vocabulary=vocabulary, run_name="mine")
    fails("to_keras=.*: exists", run, tmp_path, to_keras=keras_file, run=folder)
    new = tmp_path / "new.weights.h5"
    fails("vocabulary=.*: exists", run, tmp_path, to_keras=new, run=folder, vocabulary=vocabulary)
    assert not new.exists()


def test_a_file_that_cannot_be_written(keras_file, vocabulary, tmp_path):
    folder = run(tmp_path, from_keras=keras_file, vocabulary=vocabulary)
    fails("there is no folder", run, tmp_path, to_keras=tmp_path / "none" / "x.weights.h5", run=folder)
    new = {"to_keras": tmp_path / "x.weights.h5", "vocabulary": tmp_path / "new.txt"}
    fails("no such run folder", run, tmp_path, **new, run="none")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ([], "give from_keras=FILE .* or to_keras=FILE"),
        (
            ["from_keras=a.keras", "to_keras=b.weights.h5", "vocabulary=v.txt"],
            "from_keras=.*: give from_keras=FILE .* or",
        ),
        (["from_keras=a.keras"], "vocabulary=null: from_keras needs it; save "),
        (["to_keras=a.h5"], "to_keras=a.h5: must end in .weights.h5"),
        (["to_keras=a.weights.h5", "run_name=b"], "run_name=b: has no effect with to_keras"),
        (["from_keras=a.keras", "vocabulary=v.txt", "run=b"], "run=b: has no effect with from_keras"),
        (["from_keras=a.keras", "vocabulary=v.txt", "run_name=a/b"], "run_name=a/b: must be a plain folder name"),
    ],
)
def test_settings_that_do_not_fit_together(settings, match):
    from minigpt_pl.cli.app import compose, to_settings

    fails(match, lambda: to_settings(compose("convert", settings)))
