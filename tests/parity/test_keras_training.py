"""Trained on from the same weights, on the same real batches, our loss follows Keras's.

Ours is the command itself, with `experiment=keras`: the Keras file becomes a run folder, and `train resume=` goes on
with it. Small sizes, since 50 steps of the seed's take minutes; 5,000 words and 2,560 tokens a step repeat enough words
in a step to tell the two second moments apart.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_module

from minigpt_pl.checkpoints import read_checkpoint
from minigpt_pl.cli.app import compose, to_settings
from minigpt_pl.data.datamodule import TextDataModule
from minigpt_pl.keras_weights import read_keras, write_keras
from minigpt_pl.model import MiniGPT
from minigpt_pl.tokenizer import build_vocabulary, count_words, load_tokenizer
from minigpt_pl.training.loss_curve import read_metrics

from .programs import run_keras

pytest.importorskip("h5py", reason="h5py is not installed: pip install 'minigpt_pl[keras]'")


STEPS, BATCH = 50, 32
MOMENTS = ("exp_avg", "exp_avg_sq")
KERAS = {"vocab_size": 5_000, "maxlen": 80, "embed_dim": 64, "num_heads": 2, "feed_forward_dim": 64, "rate": 0.0}
OURS = {"vocab_size": 5_000, "max_length": 80, "embed_dim": 64, "num_heads": 2, "feed_forward_dim": 64}
TEXT = ("data=text", "data.path=reviews.jsonl", f"data.batch_size={BATCH}")
COMMON = (*TEXT, "model.dropout=0", "trainer.log_every_n_steps=1", "text_generator.every_n_epochs=0")


@pytest.fixture(scope="module")
def start(reviews, tmp_path_factory) -> Path:
    """A folder with the text, the weights as a Keras file, and the run folder made of that, `outputs/start`."""
    folder = tmp_path_factory.mktemp("start")
    with (folder / "reviews.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in reviews)
    words = build_vocabulary(count_words(reviews), KERAS["vocab_size"])[:-1]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    torch.manual_seed(0)
    write_keras(folder / "start.weights.h5", MiniGPT(**OURS))
    run_ours("convert", "from_keras=start.weights.h5", "vocabulary=vocab.txt", "run_name=start", cwd=folder)
    return folder


def run_ours(module: str, *settings: str, cwd: Path) -> None:
    done = run_module(module, *settings, cwd=cwd)
    assert done.returncode == 0, done.stderr[-3000:]


def losses_of_ours(start: Path, name: str, *settings: str) -> list[float]:
    shutil.copytree(start / "outputs" / "start", start / "outputs" / name)
    run_ours("train", f"resume=outputs/{name}", *COMMON, f"trainer.max_steps={STEPS}", *settings, cwd=start)
    rows = [row for row in read_metrics(start / "outputs" / name) if "train/loss" in row]
    assert [row["step"] for row in rows] == list(range(STEPS))
    return [row["train/loss"] for row in rows]


@pytest.fixture(scope="module")
def ours(keras_installed, start) -> dict[str, list[float]]:
    """The losses of our steps, by second moment."""
    return {
        second_moment: losses_of_ours(start, second_moment, "trainer=cpu", f"optimizer.second_moment={second_moment}")
        for second_moment in ("dense", "by_occurrence")
    }


@pytest.fixture(scope="module")
def batches(start, ours) -> dict[str, np.ndarray]:
    """Inputs and targets of those steps, (STEPS, B, L)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(start)
        overrides = ["experiment=keras", *TEXT, *(f"model.{name}={value}" for name, value in OURS.items())]
        config = to_settings(compose("train", overrides))
        tokenizer = load_tokenizer(start / "outputs" / "start" / "tokenizer.json")
        datamodule = TextDataModule(config.data, tokenizer=tokenizer)
        datamodule.setup()
        taken = [batch for batch, _ in zip(datamodule.train_dataloader(), range(STEPS), strict=False)]
    return {
        "inputs": np.stack([batch.inputs for batch in taken]),
        "targets": np.stack([batch.targets for batch in taken]),
    }


@pytest.fixture(scope="module")
def theirs(start, batches, tmp_path_factory) -> dict[str, tuple[Path, np.ndarray]]:
    """By backend: Keras's folder and the losses of its steps."""
    results = {}
    for backend in ("torch", "tensorflow"):
        folder = tmp_path_factory.mktemp(backend)
        shutil.copy(start / "start.weights.h5", folder)
        results[backend] = folder, run_keras(backend, "train", folder, {"model": KERAS}, **batches)["losses"]
    return results


@pytest.mark.parametrize(("backend", "second_moment"), [("torch", "dense"), ("tensorflow", "by_occurrence")])
def test_fifty_steps_follow_keras(backend, second_moment, ours, theirs, within):
    losses = theirs[backend][1]
    assert losses[-1] < losses[0] - 1.5  # it learns
    within(f"loss, {STEPS} steps, {second_moment} against Keras on {backend}", ours[second_moment], losses, 1e-3)


@pytest.mark.parametrize(("backend", "second_moment"), [("torch", "by_occurrence"), ("tensorflow", "dense")])
def test_the_other_second_moment_does_not(backend, second_moment, ours, theirs):
    """The comparison above can tell them apart."""
    assert np.abs(np.array(ours[second_moment]) - theirs[backend][1]).max() > 1e-2


@pytest.mark.parametrize("backend", ["torch", "tensorflow"])
def test_an_exported_file_comes_back_from_keras_bit_by_bit(backend, start, theirs):
    sent = read_keras(start / "start.weights.h5").state_dict
    returned = read_keras(theirs[backend][0] / "loaded.weights.h5").state_dict
    assert sent.keys() == returned.keys()
    assert all(torch.equal(sent[name], returned[name]) for name in sent)


def test_two_processes_train_as_one(start, within):
    """Weights and moments after 10 steps of `experiment=keras`: the token embedding's second moment by occurrence, the
    others' dense. In fp64, where a difference left is one of method, not of rounding."""
    final = {}
    for processes in (1, 2):
        name = f"processes-{processes}"
        shutil.copytree(start / "outputs" / "start", start / "outputs" / name)
        run_ours(
            "train",
            f"resume=outputs/{name}",
            *COMMON,
            "trainer=cpu",
            "trainer.precision=64-true",
            "trainer.max_steps=10",
            f"trainer.devices={processes}",
            cwd=start,
        )
        final[processes] = read_checkpoint(start / "outputs" / name / "checkpoints" / "last.ckpt")
        assert final[processes]["global_step"] == 10
    assert final[1]["state_dict"].keys() == final[2]["state_dict"].keys()
    one, two = (torch.cat([w.flatten() for w in final[n]["state_dict"].values()]) for n in (1, 2))
    assert one.dtype == torch.float64
    within("weights after 10 steps, 1 and 2 processes", one, two, 1e-12)
    moments = [
        {name: [s[name].flatten() for s in final[n]["optimizer_states"][0]["state"].values()] for name in MOMENTS}
        for n in (1, 2)
    ]
    for name in MOMENTS:
        one, two = (torch.cat(of_run[name]) for of_run in moments)
        within(
            f"{name} after 10 steps, 1 and 2 processes, share of the largest",
            one / one.abs().max(),
            two / one.abs().max(),
            1e-12,
        )
