import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN, run_module
from torch.testing import assert_close

from minigpt_pl import generate_text, load, runs
from minigpt_pl.errors import InputError
from minigpt_pl.training.fit import fit


def checkpoint(folder: Path, name: str = "last") -> dict:
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


def losses(folder: Path, name: str = "train/loss") -> dict[int, float]:
    with (folder / "metrics.csv").open() as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row[name]}


def train(config, resume_from: Path | None = None) -> Path:
    return fit(config, "test", [], resume_from)


EVERY_STEP = "trainer.log_every_n_steps=1"
NO_DROPOUT = "model.dropout=0"


class TestRunFolder:
    def test_holds_all_that_a_run_leaves(self, trained):
        folder = trained / "outputs" / "tiny"
        assert {path.name for path in folder.iterdir()} >= {
            "run.json", "config.yaml", "tokenizer.json", "checkpoints", "metrics.csv", "samples.jsonl", "loss.png",
        }  # fmt: skip
        assert {path.name for path in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
        assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
        assert not list((trained).glob("*.log")) and not (trained / ".hydra").exists()

    def test_record_tells_where_the_model_is_from(self, trained):
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
            "lr-KerasAdam",
        ):
            assert losses(folder, name), name

    def test_a_name_is_made_and_numbered(self, tiny_config):
        config = tiny_config("trainer.max_steps=1")
        assert [train(config).name, train(config).name] == ["test-001", "test-002"]

    def test_a_run_is_never_overwritten(self, tiny_config):
        config = tiny_config("trainer.max_steps=1", "run_name=mine")
        folder = train(config)
        before = (folder / "checkpoints" / "last.ckpt").read_bytes()
        with pytest.raises(InputError, match="run_name=mine: .*exists; add resume=auto"):
            train(config)
        assert (folder / "checkpoints" / "last.ckpt").read_bytes() == before

    def test_a_run_that_ended_before_its_first_checkpoint_begins_again(self, tiny_config):
        folder = train(tiny_config("trainer.max_steps=1", "run_name=mine"))
        (folder / "checkpoints" / "last.ckpt").unlink()
        with pytest.raises(InputError, match="run_name=mine: .*exists"):
            train(tiny_config("trainer.max_steps=1", "run_name=mine"))
        train(tiny_config("trainer.max_steps=1", "run_name=mine", "resume=auto"))
        assert checkpoint(folder)["global_step"] == 1

    def test_of_two_that_start_together_one_is_refused(self, tmp_path):
        runs.make_run_folder(tmp_path, "mine", "test")  # nothing is in it yet
        with pytest.raises(InputError, match="run_name=mine"):
            runs.make_run_folder(tmp_path, "mine", "test")

    def test_no_folder_for_a_text_that_is_too_small(self, tiny_config, tmp_path):
        with pytest.raises(InputError, match="data.batch_size=512: the text gives only 2[0-9][0-9] sequences"):
            train(tiny_config("data.batch_size=512"))
        assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["cache"]


class TestLoss:
    def test_it_learns(self, tiny_config):
        folder = train(tiny_config("trainer.max_epochs=8", "optimizer.learning_rate=0.01", EVERY_STEP))
        assert list(losses(folder).values())[0] > 3, "it begins near log(26), all words alike"
        assert list(losses(folder, "val/loss").values())[-1] < 0.8

    def test_measures_of_a_validation(self, tiny_config):
        """Against the plain formula, on the weights of the checkpoint."""
        from minigpt_pl.data.datamodule import TextDataModule

        config = tiny_config("trainer.max_epochs=1", "data.loss_on_padding=true")
        folder = train(config)
        data = TextDataModule(config)
        network = load(folder / "checkpoints" / "last.ckpt").network
        end_id = data.corpus.tokenizer.token_to_id("[END]")
        every, words = [], []
        for batch in data.val_dataloader():
            with torch.no_grad():
                losses_BL = torch.nn.functional.cross_entropy(
                    network(batch.inputs)[0].transpose(1, 2), batch.targets, reduction="none"
                )
            every.append(losses_BL.flatten())
            words.append(losses_BL[(batch.targets > 1) & (batch.targets != end_id)])
        every, words = torch.cat(every).mean().item(), torch.cat(words).mean().item()
        assert losses(folder, "val/loss").popitem()[1] == pytest.approx(every, abs=1e-5)
        assert losses(folder, "val/word_loss").popitem()[1] == pytest.approx(words, abs=1e-5)
        assert every < words, "padding is easy, which is why it is left out by default"

    def test_the_epochs_mean_is_over_targets(self, tiny_config):
        from minigpt_pl.data.datamodule import TextDataModule

        config = tiny_config("trainer.max_epochs=1", EVERY_STEP, "data.cut=pack", "data.batch_size=50")
        folder = train(config)
        weights = [float(batch.targets_per_share) for batch in TextDataModule(config).train_dataloader()]
        steps = list(losses(folder).values())
        assert len(set(weights)) > 1, "the batches do not differ in size"
        mean = sum(w * s for w, s in zip(weights, steps, strict=True)) / sum(weights)
        assert losses(folder, "train/epoch_loss").popitem()[1] == pytest.approx(mean, abs=1e-5)

    @pytest.mark.parametrize("loss_on_padding", ["true", "false"])
    def test_unigram_bias_begins_at_the_words_shares(self, tiny_config, loss_on_padding):
        from minigpt_pl.data.datamodule import TextDataModule

        options = [EVERY_STEP, "trainer.max_steps=1", f"data.loss_on_padding={loss_on_padding}", "data.cut=pack"]
        without = losses(train(tiny_config(*options)))[0]
        config = tiny_config(*options, "unigram_bias=true", "optimizer.learning_rate=1e-30")
        folder = train(config)
        shares = torch.zeros(26)
        for batch in TextDataModule(config).train_dataloader():
            ids = batch.targets[batch.targets >= (loss_on_padding == "false")]
            shares += torch.bincount(ids.flatten(), minlength=26)
        bias = checkpoint(folder)["state_dict"]["model.output.bias"]
        assert_close(bias, ((shares + 1) / (shares + 1).sum()).log(), atol=1e-4, rtol=0)
        assert losses(folder)[0] < without - 0.2

    def test_accumulated_batches_are_one_large_batch(self, tiny_config):
        large = train(tiny_config("trainer.max_epochs=1", NO_DROPOUT, "data.batch_size=32"))
        small = train(tiny_config("trainer.max_epochs=1", NO_DROPOUT, "trainer.accumulate_grad_batches=2"))
        assert checkpoint(large)["global_step"] == checkpoint(small)["global_step"]
        for name, weight in checkpoint(large)["state_dict"].items():
            if "token_embedding" not in name:  # its second moment is by occurrence in each batch
                assert_close(checkpoint(small)["state_dict"][name], weight, atol=2e-4, rtol=0)

    def test_seed_fixes_everything(self, tiny_config):
        first, again, other = (
            checkpoint(train(tiny_config("trainer.max_steps=5", f"seed={seed}")))["state_dict"] for seed in (1, 1, 2)
        )
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not torch.equal(first["model.output.weight"], other["model.output.weight"])

    def test_texts_leave_training_as_it_was(self, tiny_config):
        without = train(tiny_config("trainer.max_epochs=2"))
        texts = train(tiny_config("trainer.max_epochs=2", "text_generator.every_n_epochs=1"))
        a, b = checkpoint(without)["state_dict"], checkpoint(texts)["state_dict"]
        assert all(torch.equal(a[name], b[name]) for name in a)


class TestResume:
    OPTIONS = ("trainer.max_epochs=3", EVERY_STEP, "schedule.name=cosine", "schedule.warmup_steps=3")

    @pytest.mark.parametrize(
        ("stop", "options"),
        [
            ("in an epoch", []),
            ("before the last batch", []),
            ("behind an epoch", []),
            ("behind the first batch of the next", []),
            ("in an epoch", ["trainer.accumulate_grad_batches=2"]),
            ("in an epoch", ["trainer.ema_decay=0.9"]),
        ],
    )
    def test_goes_on_exactly_after_ctrl_c(self, tiny_config, monkeypatch, stop, options):
        from minigpt_pl.training import callbacks

        whole = train(tiny_config(*self.OPTIONS, *options, "run_name=whole"))
        per_epoch = checkpoint(whole)["global_step"] // 3
        batches = per_epoch * (2 if "trainer.accumulate_grad_batches=2" in options else 1)
        places = {"in an epoch": 4, "before the last batch": batches - 2, "behind an epoch": batches - 1}
        number = places.get(stop, 0)  # a batch; 4 is the first of two that make a step
        epoch = int(stop == "behind the first batch of the next")

        def press_ctrl_c(self, trainer, *args):
            if (trainer.current_epoch, args[-1]) == (epoch, number):
                signal.raise_signal(signal.SIGINT)

        with monkeypatch.context() as patch:
            patch.setattr(callbacks.Throughput, "on_train_batch_end", press_ctrl_c)
            with pytest.raises(callbacks.Interrupted):
                train(tiny_config(*self.OPTIONS, *options, "run_name=parts"))
        parts = whole.with_name("parts")
        assert runs.read_record(parts)["status"] == "interrupted"
        self.go_on(tiny_config, parts, *self.OPTIONS, *options)
        self.assert_equal(whole, parts)

    @pytest.mark.parametrize("limit", ["trainer.max_steps=7", "trainer.max_time='00:00:00:05'"])
    def test_goes_on_exactly_after_a_limit(self, tiny_config, monkeypatch, limit):
        from minigpt_pl.training import callbacks

        options = ["trainer.max_epochs=3", EVERY_STEP]
        whole = train(tiny_config(*options, "run_name=whole"))
        seconds = iter(range(100))
        with monkeypatch.context() as patch:
            patch.setattr(callbacks.Ending, "_seconds", lambda self: next(seconds))
            parts = train(tiny_config(*options, "run_name=parts", limit))
        assert 0 < checkpoint(parts)["global_step"] < checkpoint(whole)["global_step"] // 3, "not in the first epoch"
        assert len(losses(parts, "val/loss")) == 1, "no last validation"
        self.go_on(tiny_config, parts, *options)
        self.assert_equal(whole, parts)

    def go_on(self, tiny_config, folder, *options):
        train(tiny_config(*options, "run_name=parts"), resume_from=folder / "checkpoints" / "last.ckpt")
        assert runs.read_record(folder)["status"] == "finished"

    def assert_equal(self, whole, parts):
        a, b = checkpoint(whole), checkpoint(parts)
        assert a["global_step"] == b["global_step"]
        assert all(torch.equal(a["state_dict"][name], b["state_dict"][name]) for name in a["state_dict"])
        for name in ("train/loss", "train/epoch_loss", "val/loss"):
            assert losses(whole, name).items() <= losses(parts, name).items(), name

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("data.batch_size=8", "data.batch_size: the checkpoint stands inside an epoch that began with 16, not 8"),
            ("seed=3", "seed: the checkpoint stands inside an epoch that began with 0, not 3"),
        ],
    )
    def test_the_order_of_a_begun_epoch_must_stay(self, tiny_config, override, message):
        folder = train(tiny_config("trainer.max_steps=3"))
        with pytest.raises(InputError, match=message):
            train(tiny_config(override), resume_from=folder / "checkpoints" / "last.ckpt")

    def test_fewer_epochs_than_are_done(self, tiny_config, caplog):
        folder = train(tiny_config("trainer.max_epochs=2"))
        before = (folder / "checkpoints" / "last.ckpt").read_bytes()
        for override in ("trainer.max_epochs=1", "trainer.max_steps=1"):
            train(tiny_config(override), resume_from=folder / "checkpoints" / "last.ckpt")
        assert (folder / "checkpoints" / "last.ckpt").read_bytes() == before

    def test_texts_after_the_checkpoint_are_not_kept_twice(self, tiny_config):
        options = ["trainer.max_epochs=3", "text_generator.every_n_epochs=1", "run_name=mine"]
        folder = train(tiny_config(*options))
        before = (folder / "samples.jsonl").read_text()
        first_epoch = folder / "checkpoints" / "first.ckpt"
        one = train(tiny_config("trainer.max_epochs=1", "text_generator.every_n_epochs=1"))
        (one / "checkpoints" / "last.ckpt").rename(first_epoch)
        train(tiny_config(*options), resume_from=first_epoch)
        assert (folder / "samples.jsonl").read_text() == before

    def test_other_sizes_are_refused_and_named(self, tiny_config):
        folder = train(tiny_config("trainer.max_steps=1"))
        with pytest.raises(InputError, match="model.embed_dim=8: the checkpoint has 16"):
            train(tiny_config("model.embed_dim=8"), resume_from=folder / "checkpoints" / "last.ckpt")
        assert runs.read_record(folder)["status"] == "finished", "the run must not be harmed"

    def test_another_text_is_refused(self, tiny_config, tmp_path):
        folder = train(tiny_config("trainer.max_steps=1"))
        (tmp_path / "other.txt").write_text("another line of words\n" * 50)
        with pytest.raises(InputError, match="data: the text is not the one"):
            other = tiny_config(f"data.path={tmp_path / 'other.txt'}", "data.validation_share=0")
            train(other, resume_from=folder / "checkpoints" / "last.ckpt")


class TestCommand:
    def test_ctrl_c_leaves_a_checkpoint_that_resume_auto_goes_on_with(self, story, tmp_path):
        arguments = [*TINY_RUN, f"data.path={story}", "trainer.max_epochs=100000", "run_name=long"]
        process = subprocess.Popen(
            [sys.executable, "-m", "minigpt_pl.train", *arguments],
            cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        metrics = tmp_path / "outputs" / "long" / "metrics.csv"
        deadline = time.monotonic() + 120
        while not metrics.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=60)[1]
        assert process.returncode == 130
        assert "Traceback" not in error and "interrupted after" in error
        folder = tmp_path / "outputs" / "long"
        steps = checkpoint(folder)["global_step"]
        assert steps > 0 and runs.read_record(folder)["status"] == "interrupted"

        sampled = run_module("sample", "run=long", "prompt=the cat", "top_k=5", cwd=tmp_path)
        assert sampled.returncode == 0, sampled.stderr
        resumed = run_module("train", "resume=auto", f"trainer.max_steps={steps + 3}", cwd=tmp_path)
        assert resumed.returncode == 0, resumed.stderr
        assert checkpoint(folder)["global_step"] == steps + 3, "the run's own settings were not taken up"
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
        options = [*TINY_RUN, f"data.path={story}", NO_DROPOUT, EVERY_STEP, "trainer.max_epochs=2"]
        one = run_module("train", *options, "run_name=one", cwd=tmp_path)
        assert one.returncode == 0, one.stderr
        if launcher == "lightning":
            two = run_module(
                "train", *options, "trainer.strategy=ddp", "trainer.devices=2", "run_name=two", cwd=tmp_path
            )
        else:
            command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "minigpt_pl.train"]
            two = subprocess.run(
                [sys.executable, *command, *options, "run_name=two"],
                cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
            )  # fmt: skip
        assert two.returncode == 0, two.stderr
        outputs = tmp_path / "outputs"
        assert sorted(path.name for path in outputs.iterdir()) == ["cache", "one", "two"]
        assert runs.read_record(outputs / "two")["processes"] == 2
        assert len((outputs / "two" / "samples.jsonl").read_text().splitlines()) == 2
        for name in ("train/loss", "train/epoch_loss", "val/loss", "val/word_loss"):
            a, b = losses(outputs / "one", name), losses(outputs / "two", name)
            assert a == pytest.approx(b, abs=1e-4), name
        weights = checkpoint(outputs / "one")["state_dict"], checkpoint(outputs / "two")["state_dict"]
        for name in weights[0]:
            assert_close(weights[1][name], weights[0][name], atol=1e-3, rtol=0)

    def test_a_sweep_of_several_processes_is_refused(self, story, tmp_path):
        arguments = [*TINY_RUN, f"data.path={story}", "trainer.strategy=ddp", "trainer.devices=2", "-m", "seed=1,2"]
        done = run_module("train", *arguments, cwd=tmp_path)
        assert done.returncode == 2 and "trainer.devices=2: each process would start the whole sweep" in done.stderr


class TestSettings:
    """What a setting of Lightning's changes."""

    @pytest.mark.parametrize("optimizer", ["keras_adam", "adamw"])
    def test_bf16_fused_and_clipped(self, tiny_config, optimizer):
        dense = ["optimizer.second_moment=dense", f"optimizer.name={optimizer}", "optimizer.epsilon=1", NO_DROPOUT]
        options = [*dense, "trainer.max_steps=1", "trainer.precision=bf16-mixed"]
        free = checkpoint(train(tiny_config(*options, "trainer.gradient_clip_val=1e9")))["state_dict"]
        clipped = checkpoint(train(tiny_config(*options, "trainer.gradient_clip_val=0.01")))["state_dict"]
        start = checkpoint(train(tiny_config(*options, "optimizer.learning_rate=1e-30")))["state_dict"]
        moved = [(w["model.output.bias"] - start["model.output.bias"]).norm() for w in (free, clipped)]
        assert moved[1] < 0.5 * moved[0], "with an epsilon of 1 a step is as long as its gradient"
        exact = checkpoint(train(tiny_config(*dense, "trainer.max_steps=1")))["state_dict"]
        assert not torch.equal(exact["model.output.weight"], free["model.output.weight"]), "not in bf16"
        assert free["model.output.weight"].dtype == torch.float32

    def test_clipping_reaches_the_squares_by_occurrence(self, tiny_config):
        options = ["trainer.max_steps=1", "optimizer.epsilon=1e-12", NO_DROPOUT]
        free = checkpoint(train(tiny_config(*options)))["state_dict"]
        clipped = checkpoint(train(tiny_config(*options, "trainer.gradient_clip_val=0.001")))["state_dict"]
        name = "model.token_embedding.weight"
        assert_close(clipped[name], free[name], atol=1e-6, rtol=0)  # Adam's first step knows no scale

    def test_ema(self, tiny_config):
        options = ["trainer.max_epochs=1", "text_generator.every_n_epochs=1", "optimizer.learning_rate=0.1"]
        folder = train(tiny_config(*options, "trainer.ema_decay=0.9"))
        contents = checkpoint(folder)
        weight = "model.output.weight"
        assert not torch.equal(contents["state_dict"][weight], contents["current_model_state"][weight])
        record = json.loads((folder / "samples.jsonl").read_text())
        controls = {name: record[name] for name in ("prompt", "num_tokens", "temperature", "top_k", "seed")}
        last = load(folder / "checkpoints" / "last.ckpt")
        assert generate_text(last, **controls) == record["text"], "not written by the average, which is saved"

    def test_early_stopping(self, tiny_config):
        folder = train(tiny_config("trainer.max_epochs=50", "trainer.patience=2", "optimizer.learning_rate=1e-12"))
        assert runs.read_record(folder)["epochs"] <= 4

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (["trainer.patience=2", "data.validation_share=0"], "trainer.patience=2: nothing is held out"),
            (["trainer.accelerator=gpu"], "trainer.accelerator=gpu: PyTorch finds no GPU here"),
            (["trainer.val_check_interval=999"], "trainer.val_check_interval=999: an epoch has only"),
            (["data.batch_size=1", "trainer.devices=2"], "data.batch_size=1: must be at least the number of processes"),
            (
                ["text_generator.every_n_epochs=1", "text_generator.top_k=99"],
                "text_generator.top_k=99: the text has only 26",
            ),
            (["logger=wandb"], r"logger.name=wandb: not installed; pip install 'minigpt_pl\[wandb\]'"),
        ],
    )
    def test_what_the_surroundings_lack(self, tiny_config, tmp_path, monkeypatch, overrides, message):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(InputError, match=message):
            train(tiny_config(*overrides))
        assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["cache"]

    def test_without_held_out_text_there_is_the_last_checkpoint(self, tiny_config):
        folder = train(tiny_config("trainer.max_epochs=1", "data.validation_share=0"))
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["last.ckpt"]

    def test_last_is_the_last_though_an_earlier_one_is_best(self, tiny_config):
        folder = train(tiny_config("trainer.max_epochs=4", "optimizer.learning_rate=0.3"))
        val = losses(folder, "val/loss")
        assert checkpoint(folder)["epoch"] == 3
        assert checkpoint(folder, "best")["global_step"] == min(val, key=val.get) + 1

    def test_max_steps_ends_with_a_validation_and_a_text(self, tiny_config):
        folder = train(tiny_config("trainer.max_steps=3", "text_generator.every_n_epochs=1"))
        assert checkpoint(folder)["global_step"] == 3
        assert list(losses(folder, "val/loss")) == [2]
        assert (folder / "samples.jsonl").exists()

    def test_max_time(self, tiny_config):
        start = time.monotonic()
        folder = train(tiny_config("trainer.max_epochs=100000", "trainer.max_time='00:00:00:02'"))
        assert time.monotonic() - start < 60
        assert runs.read_record(folder)["status"] == "finished"
        steps = checkpoint(folder)["global_step"]
        again = tiny_config("trainer.max_epochs=100000", "trainer.max_time='00:00:00:02'")
        train(again, resume_from=folder / "checkpoints" / "last.ckpt")
        assert checkpoint(folder)["global_step"] == steps + 1, "the time before a resume counts"

    def test_a_diverged_training_stops_and_harms_nothing(self, tiny_config):
        folder = train(tiny_config("trainer.max_epochs=1", "run_name=mine"))
        last = folder / "checkpoints" / "last.ckpt"
        before = last.read_bytes()
        contents = torch.load(last, weights_only=True)
        contents["state_dict"]["model.output.bias"].fill_(torch.nan)
        torch.save(contents, folder / "checkpoints" / "broken.ckpt")
        with pytest.raises(InputError, match="optimizer.learning_rate=0.001: the loss is no number any more at step"):
            train(tiny_config("trainer.max_epochs=2"), resume_from=folder / "checkpoints" / "broken.ckpt")
        assert last.read_bytes() == before and runs.read_record(folder)["status"] == "failed"

    def test_learning_rate_finder(self, tiny_config, tmp_path):
        train(tiny_config("find_learning_rate=true"))
        assert (tmp_path / "outputs" / "learning_rate.png").exists()

    def test_logger(self, tiny_config):
        folder = train(tiny_config("trainer.max_steps=2", "logger=tensorboard", EVERY_STEP))
        assert list(folder.glob("events.out.tfevents*")) and losses(folder)

    def test_profiler(self, story, tmp_path):
        options = [*TINY_RUN, f"data.path={story}", "trainer.max_steps=2", "trainer.profiler=simple"]
        done = run_module("train", *options, cwd=tmp_path)
        assert "Action" in done.stderr and "run_training_batch" in done.stderr

    def test_overfitting(self, tiny_config):
        options = ["debug=overfit", "model.embed_dim=32", "optimizer.learning_rate=0.01", "trainer.max_epochs=80"]
        folder = train(tiny_config(*options, "text_generator.every_n_epochs=0"))
        assert list(losses(folder).values())[-1] < 0.5
