"""TextDataModule and MiniGPTModule in a user's own Lightning script."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from conftest import text_config

import minigpt_pl
from minigpt_pl.data import encoding
from minigpt_pl.data.datamodule import TextDataModule
from minigpt_pl.errors import InputError
from minigpt_pl.training.module import MiniGPTModule

SCRIPT = Path(__file__).parent.parent / "docs" / "examples" / "lightning_script.py"
TINY = {"embed_dim": 16, "num_heads": 2, "head_dim": 8, "feed_forward_dim": 16}


@pytest.fixture
def datamodule(story, tmp_path, monkeypatch) -> TextDataModule:
    monkeypatch.chdir(tmp_path)
    return TextDataModule(text_config(story, batch_size=16), max_length=16)


def trainer(**options) -> L.Trainer:
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(**quiet | options)


def test_the_script_of_the_readme(story, tmp_path):
    assert sum(bool(line.strip()) for line in SCRIPT.read_text().splitlines()) <= 12
    shutil.copy(story, tmp_path / "my.txt")
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("the cat")  # or "the cat, ...": nothing is seeded
    assert list(tmp_path.glob("lightning_logs/version_0/checkpoints/*.ckpt"))


def test_a_checkpoint_of_a_script_can_be_loaded(datamodule, tmp_path):
    datamodule.setup("fit")
    module = MiniGPTModule(TINY | {"vocab_size": datamodule.vocab_size, "max_length": 16}, end_id=datamodule.end_id)
    own = trainer(max_epochs=1, default_root_dir=tmp_path)
    own.fit(module, datamodule=datamodule)
    datamodule.tokenizer.save(str(tmp_path / "tokenizer.json"))
    model = minigpt_pl.load(own.checkpoint_callback.best_model_path)
    assert minigpt_pl.generate_text(model, "the cat", seed=1).startswith("the cat ")
    again = MiniGPTModule.load_from_checkpoint(own.checkpoint_callback.best_model_path, weights_only=True)
    assert torch.equal(again.model.output.weight, model.network.output.weight)


def test_construction_does_nothing_and_preparing_encodes_once(datamodule, monkeypatch):
    assert not list(Path.cwd().iterdir())
    datamodule.prepare_data()
    assert not hasattr(datamodule, "corpus"), "setup opens the text, in every process"
    monkeypatch.setattr(encoding, "encode", lambda *_: pytest.fail("encoded again"))
    other = TextDataModule(datamodule.data, max_length=16)
    other.setup("fit")  # a process for which Lightning does not call prepare_data
    assert (other.vocab_size, other.end_id, other.has_validation) == (26, 25, True)


@pytest.mark.parametrize(("limit", "batches"), [(3, 3), (0.5, 9), (None, 18)])
def test_limits_of_the_trainer_are_respected(datamodule, limit, batches):
    module = MiniGPTModule(TINY | {"vocab_size": 26, "max_length": 16})
    own = trainer(max_epochs=2, limit_train_batches=limit, enable_checkpointing=False)
    own.fit(module, datamodule=datamodule)
    assert own.global_step == 2 * batches
    if limit != 0.5:  # the loader does not know a fraction, but starts the next epoch all the same
        assert datamodule.state_dict()["epoch"] == 2 and datamodule.state_dict()["batches_done"] == 0


def test_accumulation_of_the_trainer_is_respected(datamodule):
    datamodule.trainer = trainer(accumulate_grad_batches=2)
    datamodule.setup("fit")
    first, second, *_ = datamodule.train_dataloader()
    assert first.step_targets == second.step_targets == first.num_targets + second.num_targets


def test_a_schedule_without_total_steps_ends_with_the_training(datamodule):
    module = MiniGPTModule(TINY | {"vocab_size": 26, "max_length": 16}, schedule={"name": "linear"})
    own = trainer(max_epochs=2, enable_checkpointing=False)
    own.fit(module, datamodule=datamodule)
    assert own.optimizers[0].param_groups[0]["lr"] == 0
    assert own.global_step == 36


@pytest.mark.parametrize(
    ("model", "optimizer", "second_moment"),
    [
        ({}, {}, "by_occurrence"),
        ({"tie_embeddings": True}, {}, "dense"),
        ({}, {"name": "adamw"}, "dense"),
        ({}, {"second_moment": "dense"}, "dense"),
    ],
)
def test_default_second_moment_is_one_that_fits(model, optimizer, second_moment):
    module = MiniGPTModule(TINY | {"vocab_size": 26} | model, optimizer)
    assert module.hparams["optimizer"]["second_moment"] == second_moment
    assert (module.squares is not None) == (second_moment == "by_occurrence")


def test_by_occurrence_with_a_tied_embedding_is_refused():
    with pytest.raises(InputError, match="second_moment=by_occurrence: needs model.tie_embeddings=false"):
        MiniGPTModule({"tie_embeddings": True}, {"second_moment": "by_occurrence"})


def test_dropout_differs_between_batches_epochs_processes_and_seeds(datamodule, monkeypatch):
    def masks(seed: int, rank: int) -> list[bytes]:
        module, found = MiniGPTModule(TINY | {"vocab_size": 26, "max_length": 16, "dropout": 0.5}, seed=seed), []
        module.model.blocks[0].dropout.register_forward_hook(
            lambda dropout, inputs, output: found.append((output == 0).numpy().tobytes())
        )
        monkeypatch.setattr(MiniGPTModule, "global_rank", rank)
        limits = {"limit_train_batches": 2, "limit_val_batches": 0}
        trainer(max_epochs=2, enable_checkpointing=False, **limits).fit(module, datamodule=datamodule)
        return found

    assert len(masks(0, 0)) == 8  # twice for each batch: after attention and after the feed-forward layers
    assert len({*masks(0, 0), *masks(0, 1), *masks(1, 0)}) == 24
    assert masks(0, 0) == masks(0, 0)
