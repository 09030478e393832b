"""The files of a run folder, and training from the command line."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from conftest import EVERY_STEP, TINY_RUN, checkpoint, losses, run_module, train
from torch.testing import assert_close

from minigpt_pl import runs
from minigpt_pl.config import DataConfig, ImdbConfig, TextConfig
from minigpt_pl.errors import InputError


@dataclasses.dataclass
class PoemConfig(DataConfig):
    """A third data source."""

    poet: str = "Goethe"


class TestRunFolder:
    def test_has_all_files_of_a_run(self, trained):
        folder = trained / "outputs" / "tiny"
        assert {path.name for path in folder.iterdir()} >= {
            "run.json", "config.yaml", "tokenizer.json", "checkpoints", "metrics.csv", "samples.jsonl", "loss.png",
        }  # fmt: skip
        assert {path.name for path in (folder / "checkpoints").iterdir()} >= {"best.ckpt", "last.ckpt"}
        assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
        assert not list((trained).glob("*.log")) and not (trained / ".hydra").exists()

    def test_the_record_describes_the_origin_of_the_model(self, trained):
        record = runs.read_record(trained / "outputs" / "tiny")
        assert record["status"] == "finished" and record["epochs"] == 2
        assert record["text"]["source"].endswith("story.txt") and record["text"]["train_documents"] > 200
        assert "trainer=cpu" in record["overrides"] and record["versions"]["torch"]

    def test_checkpoint_is_plain(self, trained):
        hyper_parameters = checkpoint(trained / "outputs" / "tiny")["hyper_parameters"]
        assert json.loads(json.dumps(hyper_parameters)) == hyper_parameters
        assert hyper_parameters["model"]["embed_dim"] == 16

    def test_lightning_loads_it(self, trained):
        from minigpt_pl.training.module import MiniGPTModule

        module = MiniGPTModule.load_from_checkpoint(
            trained / "outputs" / "tiny" / "checkpoints" / "best.ckpt", weights_only=True
        )
        assert sum(p.numel() for p in module.parameters()) > 1000

    def test_samples_of_each_epoch(self, trained):
        lines = (trained / "outputs" / "tiny" / "samples.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        assert [record["epoch"] for record in records] == [1, 2]
        assert all(record["text"].startswith(record["prompt"]) for record in records)

    def test_metrics(self, trained):
        folder = trained / "outputs" / "tiny"
        word_perplexity = losses(folder, "val/word_perplexity")
        assert len(word_perplexity) == 2
        for name in (
            "train/loss",
            "train/epoch_loss",
            "val/loss",
            "val/perplexity",
            "tokens_per_second",
            "learning_rate",
        ):
            assert losses(folder, name), name

    def test_default_names_are_numbered(self, tiny_config):
        config = tiny_config("trainer.max_steps=1")
        assert [train(config).name, train(config).name] == ["test-001", "test-002"]

    def test_a_run_is_never_overwritten(self, tiny_config):
        config = tiny_config("trainer.max_steps=1", "run_name=mine")
        folder = train(config)
        before = (folder / "checkpoints" / "last.ckpt").read_bytes()
        with pytest.raises(InputError, match="run_name=mine: .*exists; add resume=auto"):
            train(config)
        assert (folder / "checkpoints" / "last.ckpt").read_bytes() == before

    @pytest.mark.parametrize("kind", [ImdbConfig, TextConfig, PoemConfig])
    def test_the_fields_of_the_data_settings_choose_their_class(self, tmp_path, kind):
        data = kind(batch_size=7, **({"path": "my.txt"} if kind is TextConfig else {}))
        settings = {"model": {"vocab_size": 9}, "data": dataclasses.asdict(data)}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
        assert runs.read_data_settings(tmp_path) == (data, 9)

    def test_an_older_run_has_no_tokenizer_setting(self, tmp_path):
        settings = {"model": {"vocab_size": 9}, "data": {"path": "text.txt", "tokenizer": None}}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
        assert runs.read_data_settings(tmp_path)[0] == TextConfig(path="text.txt", tokenizer="word")

    def test_data_settings_that_no_class_has_are_refused(self, tmp_path):
        (tmp_path / "config.yaml").write_text("{model: {vocab_size: 9}, data: {path: a, poet: b}}")
        with pytest.raises(InputError, match="config.yaml: not the settings of a run"):
            runs.read_data_settings(tmp_path)

    def test_of_two_runs_that_start_together_one_is_refused(self, tmp_path):
        runs.make_run_folder(tmp_path, "mine", "test")  # it is still empty
        with pytest.raises(InputError, match="run_name=mine"):
            runs.make_run_folder(tmp_path, "mine", "test")

    def test_a_text_that_is_too_small_makes_no_folder(self, tiny_config, tmp_path):
        with pytest.raises(InputError, match="data.batch_size=512: the text has only 2[0-9][0-9] sequences"):
            train(tiny_config("data.batch_size=512"))
        assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["cache"]


class TestCommand:
    def test_resume_auto_after_ctrl_c(self, story, tmp_path):
        arguments = [*TINY_RUN, f"data.path={story}", "trainer.max_epochs=100000", "run_name=long", EVERY_STEP]
        process = subprocess.Popen(
            [sys.executable, "-m", "minigpt_pl.train", *arguments],
            cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        folder = tmp_path / "outputs" / "long"
        deadline = time.monotonic() + 600
        while not ((folder / "metrics.csv").exists() and losses(folder)):  # a step has ended
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=600)[1]
        assert process.returncode == 130
        assert "Traceback" not in error and "interrupted after" in error
        assert "To continue the run: python -m minigpt_pl.train resume=outputs/long\n" in error
        assert all(len(line) < 100 for line in error.splitlines())
        steps = checkpoint(folder)["global_step"]
        assert steps > 0 and runs.read_record(folder)["status"] == "interrupted"

        sampled = run_module("sample", "run=long", "prompt=the cat", "top_k=5", cwd=tmp_path)
        assert sampled.returncode == 0, sampled.stderr
        resumed = run_module("train", "resume=auto", f"trainer.max_steps={steps + 3}", cwd=tmp_path)
        assert resumed.returncode == 0, resumed.stderr
        assert checkpoint(folder)["global_step"] == steps + 3, "the run's own settings were lost"
        assert [path.name for path in (tmp_path / "outputs").glob("*/run.json")] == ["run.json"]

    def test_sweep(self, story, tmp_path):
        done = run_module(
            "train", *TINY_RUN, f"data.path={story}", "trainer.max_steps=1", "-m", "seed=1,2", cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        seeds = [json.loads(p.read_text())["overrides"][-1] for p in sorted((tmp_path / "outputs").glob("*/run.json"))]
        assert seeds == ["seed=1", "seed=2"]

    @pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
    def test_two_processes_train_as_one(self, story, tmp_path, launcher):
        options = [*TINY_RUN, f"data.path={story}", "model.dropout=0", EVERY_STEP, "trainer.max_epochs=2"]
        options += ["trainer.val_check_interval=5", "checkpoint.every_n_steps=4"]  # checkpoints inside each epoch
        one = run_module("train", *options, "run_name=one", cwd=tmp_path)
        assert one.returncode == 0, one.stderr
        if launcher == "lightning":
            two = run_module("train", *options, "trainer.devices=2", "run_name=two", cwd=tmp_path)
        else:
            command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "minigpt_pl.train"]
            two = subprocess.run(
                [sys.executable, *command, *options, "run_name=two"],
                cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=1800,
            )  # fmt: skip
        assert two.returncode == 0, two.stderr
        outputs = tmp_path / "outputs"
        assert sorted(path.name for path in outputs.iterdir()) == ["cache", "one", "two"]
        assert runs.read_record(outputs / "two")["processes"] == 2
        assert len((outputs / "two" / "samples.jsonl").read_text().splitlines()) == 2
        for name in ("train/loss", "train/perplexity", "train/epoch_loss", "val/loss", "val/word_loss"):
            a, b = losses(outputs / "one", name), losses(outputs / "two", name)
            assert a == pytest.approx(b, rel=1e-4), name
        weights = checkpoint(outputs / "one")["state_dict"], checkpoint(outputs / "two")["state_dict"]
        for name in weights[0]:
            assert_close(weights[1][name], weights[0][name], atol=1e-3, rtol=0)

    def test_a_signal_to_one_process_stops_both_at_the_same_step(self, story, tmp_path):
        """And the run continues exactly with one process."""
        options = [*TINY_RUN, f"data.path={story}", "model.dropout=0", EVERY_STEP, "trainer.max_epochs=10"]
        whole = run_module("train", *options, "run_name=whole", cwd=tmp_path)
        assert whole.returncode == 0, whole.stderr
        code = """
import os, signal
from minigpt_pl import train
from minigpt_pl.training.module import MiniGPTModule

step = MiniGPTModule.training_step

def with_signal(self, batch, batch_idx):
    if batch_idx == 4 and self.global_rank == 0 and self.current_epoch == 0:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self, batch, batch_idx)

MiniGPTModule.training_step = with_signal
train.main()
"""
        (tmp_path / "signalled.py").write_text(code)
        command = [sys.executable, "signalled.py", *options, "run_name=two", "trainer.devices=2"]
        two = subprocess.run(
            command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        assert two.returncode == 128 + signal.SIGTERM and "Traceback" not in two.stderr, two.stderr
        folder = tmp_path / "outputs" / "two"
        assert 5 <= checkpoint(folder)["global_step"] < checkpoint(tmp_path / "outputs" / "whole")["global_step"]
        assert runs.read_record(folder)["status"] == "interrupted"
        one = run_module("train", "resume=two", "trainer.devices=1", cwd=tmp_path)
        assert one.returncode == 0, one.stderr
        a, b = losses(tmp_path / "outputs" / "whole"), losses(folder)
        assert a == pytest.approx(b, rel=1e-4)

    def test_a_sweep_of_several_processes_is_refused(self, story, tmp_path):
        arguments = [*TINY_RUN, f"data.path={story}", "trainer.devices=2", "-m", "seed=1,2"]
        done = run_module("train", *arguments, cwd=tmp_path)
        assert done.returncode == 2 and "trainer.devices=2: each process would start the whole sweep" in done.stderr
