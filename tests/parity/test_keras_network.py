"""With the same weights we compute the logits, hidden states and top-k probabilities of the notebook's Keras model."""

from pathlib import Path

import numpy as np
import pytest
import torch

import minigpt_pl
from minigpt_pl.config import ConvertConfig
from minigpt_pl.convert import convert
from minigpt_pl.generation import filters
from minigpt_pl.generation.controls import Controls
from minigpt_pl.keras_weights import read_keras
from minigpt_pl.tokenizer import build_tokenizer

from .programs import SEED_VOCABULARY, run_keras

LENGTHS = (1, 2, 79, 80)
TOP_K, TEMPERATURES = (1, 10, 20), (1.0, 0.8)
NOTEBOOK = {"vocab_size": SEED_VOCABULARY, "maxlen": 80, "embed_dim": 256, "num_heads": 2, "feed_forward_dim": 256}
# All sizes differ, so a test finds two that are exchanged. The heads are not as wide as the model.
OTHER = {
    "vocab_size": SEED_VOCABULARY,
    "maxlen": 83,
    "embed_dim": 24,
    "num_heads": 3,
    "key_dim": 7,
    "feed_forward_dim": 40,
    "num_blocks": 3,
    "rate": 0.25,
}


@pytest.fixture(scope="module")
def ids(reviews, vocabulary) -> np.ndarray:
    """Token ids (4, 80) of real reviews."""
    encoded = [encoding.ids for encoding in build_tokenizer(vocabulary).encode_batch(reviews[:100])]
    return np.array([ids[:80] for ids in encoded if len(ids) >= 80][:4])


@pytest.fixture(
    scope="module",
    params=[("torch", NOTEBOOK), ("tensorflow", NOTEBOOK), ("torch", OTHER)],
    ids=["torch", "tensorflow", "torch-other-sizes"],
)
def saved(request, keras_installed, ids, tmp_path_factory) -> tuple[str, Path, dict[str, np.ndarray]]:
    """A Keras model: its name, the folder with its files, its outputs."""
    backend, model = request.param
    folder = tmp_path_factory.mktemp("save")
    options = {"model": model, "seed": 0, "lengths": LENGTHS, "top_k": TOP_K, "temperatures": TEMPERATURES}
    name = f"{backend}, {model.get('num_blocks', 1)} x {model['embed_dim']}"
    return name, folder, run_keras(backend, "save", folder, options, ids=ids)


@pytest.mark.parametrize("file", ["model.keras", "model.weights.h5"])
def test_logits_and_hidden_states(file, saved, ids, vocabulary, within):
    """The run folder that `convert` makes of the file gives the outputs of Keras."""
    name, folder, outputs = saved
    words = folder / "vocab.txt"
    words.write_text("\n".join(vocabulary[:-1]), encoding="utf-8")
    settings = {"run_name": file.replace(".", "-"), "output_dir": str(folder)}
    run_folder = convert(ConvertConfig(from_keras=str(folder / file), vocabulary=str(words), **settings))
    network = minigpt_pl.load(run_folder).network
    for length in LENGTHS:
        with torch.inference_mode():
            logits, hidden = network(torch.from_numpy(ids[:, :length]))
        within(f"logits, {name}, {file}", logits, outputs[f"logits_{length}"], 1e-4)
        within(f"hidden states, {name}, {file}", hidden, outputs[f"hidden_{length}"], 1e-4)


def test_keras_adds_numbers_to_the_layer_names(saved):
    assert not {"transformer_block", "token_and_position_embedding", "dense"} & set(saved[2]["layer_names"])


def test_dropout_is_read_if_the_file_contains_it(saved):
    name, folder, _ = saved
    rate = 0.25 if "3 x" in name else 0.1
    assert read_keras(folder / "model.keras").arguments["dropout"] == rate
    assert read_keras(folder / "model.weights.h5").arguments["dropout"] == 0.1


def test_top_k_probabilities(saved, within):
    """The probabilities that the engine draws from, and those that the notebook's `sample_from` draws from."""
    name, _, outputs = saved
    logits = torch.from_numpy(outputs["sample_logits"])

    for k in TOP_K:
        for temperature in TEMPERATURES:
            controls = Controls(vocab_size=logits.shape[1], temperature=temperature, top_k=k)
            ours = filters.warp(logits, controls).softmax(dim=-1)
            theirs = np.zeros(logits.shape)
            np.put_along_axis(
                theirs, outputs[f"indices_{k}_{temperature}"], outputs[f"probabilities_{k}_{temperature}"], axis=-1
            )
            within(f"top-k probabilities, {name}", ours, theirs, 1e-6)
