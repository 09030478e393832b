"""A run that was stopped and resumed equals a run that was not."""

import signal

import pytest
import torch
from conftest import EVERY_STEP, checkpoint, losses, train

from minigpt_pl import runs
from minigpt_pl.errors import InputError


class TestResume:
    OPTIONS = ("trainer.max_epochs=3", EVERY_STEP, "schedule.name=cosine", "schedule.warmup_steps=3")

    @pytest.mark.parametrize(
        ("stop", "options"),
        [
            ("in an epoch", []),
            ("before the last batch", []),
            ("after an epoch", []),
            ("after the first batch of the next", []),
            ("in an epoch", ["trainer.accumulate_grad_batches=2"]),
            ("in an epoch", ["trainer.ema_decay=0.9"]),
        ],
    )
    def test_continues_exactly_after_ctrl_c(self, tiny_config, monkeypatch, stop, options):
        from minigpt_pl.signals import Interrupted
        from minigpt_pl.training import checkpointing

        whole = train(tiny_config(*self.OPTIONS, *options, "run_name=whole"))
        per_epoch = checkpoint(whole)["global_step"] // 3
        batches = per_epoch * (2 if "trainer.accumulate_grad_batches=2" in options else 1)
        places = {"in an epoch": 4, "before the last batch": batches - 2, "after an epoch": batches - 1}
        number = places.get(stop, 0)  # a batch; 4 is the first of two that make a step
        epoch = int(stop == "after the first batch of the next")

        def press_ctrl_c(self, trainer, *args):
            if (trainer.current_epoch, args[-1]) == (epoch, number):
                signal.raise_signal(signal.SIGINT)

        with monkeypatch.context() as patch:
            patch.setattr(checkpointing.StopAtNaN, "on_train_batch_end", press_ctrl_c)
            with pytest.raises(Interrupted):
                train(tiny_config(*self.OPTIONS, *options, "run_name=parts"))
        parts = whole.with_name("parts")
        assert runs.read_record(parts)["status"] == "interrupted"
        self.resume(tiny_config, parts, *self.OPTIONS, *options)
        self.assert_equal(whole, parts)

    @pytest.mark.parametrize("limit", ["trainer.max_steps=7", "trainer.max_time='00:00:00:05'"])
    def test_continues_exactly_after_a_limit(self, tiny_config, monkeypatch, limit):
        from minigpt_pl.training import checkpointing

        options = ["trainer.max_epochs=3", EVERY_STEP]
        whole = train(tiny_config(*options, "run_name=whole"))
        seconds = iter(range(100))
        with monkeypatch.context() as patch:
            patch.setattr(checkpointing.SaveAndStop, "_seconds", lambda self: next(seconds))
            parts = train(tiny_config(*options, "run_name=parts", limit))
        assert 0 < checkpoint(parts)["global_step"] < checkpoint(whole)["global_step"] // 3, "not in epoch 1"
        assert len(losses(parts, "val/loss")) == 1, "there was no last validation"
        self.resume(tiny_config, parts, *options)
        self.assert_equal(whole, parts)

    def test_continues_exactly_after_an_early_stop_inside_an_epoch(self, tiny_config):
        """The weights do not change here, so the second validation is not better than the first."""
        options = ["trainer.max_epochs=2", EVERY_STEP, "trainer.val_check_interval=4", "optimizer.learning_rate=1e-30"]
        whole = train(tiny_config(*options, "run_name=whole"))
        parts = train(tiny_config(*options, "run_name=parts", "trainer.patience=1"))
        assert checkpoint(parts)["global_step"] == 8 < checkpoint(whole)["global_step"] // 2
        self.resume(tiny_config, parts, *options)
        self.assert_equal(whole, parts)

    def resume(self, tiny_config, folder, *options):
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
            ("data.batch_size=8", "data.batch_size: the checkpoint is inside an epoch that started with 16, not 8"),
            ("seed=3", "seed: the checkpoint is inside an epoch that started with 0, not 3"),
        ],
    )
    def test_the_order_of_a_started_epoch_must_not_change(self, tiny_config, override, message):
        folder = train(tiny_config("trainer.max_steps=3"))
        with pytest.raises(InputError, match=message):
            train(tiny_config(override), resume_from=folder / "checkpoints" / "last.ckpt")

    def test_no_steps_are_left(self, tiny_config, caplog):
        folder = train(tiny_config("trainer.max_epochs=2"))
        before = (folder / "checkpoints" / "last.ckpt").read_bytes()
        for override in ("trainer.max_epochs=1", "trainer.max_steps=1"):
            train(tiny_config(override), resume_from=folder / "checkpoints" / "last.ckpt")
        assert (folder / "checkpoints" / "last.ckpt").read_bytes() == before

    def test_texts_after_the_checkpoint_are_not_written_twice(self, tiny_config):
        options = ["trainer.max_epochs=3", "text_generator.every_n_epochs=1", "run_name=mine"]
        folder = train(tiny_config(*options))
        before = (folder / "samples.jsonl").read_text()
        first_epoch = folder / "checkpoints" / "first.ckpt"
        one = train(tiny_config("trainer.max_epochs=1", "text_generator.every_n_epochs=1"))
        (one / "checkpoints" / "last.ckpt").rename(first_epoch)
        train(tiny_config(*options), resume_from=first_epoch)
        assert (folder / "samples.jsonl").read_text() == before

    def test_another_size_is_refused(self, tiny_config):
        folder = train(tiny_config("trainer.max_steps=1"))
        with pytest.raises(InputError, match="model.embed_dim=8: the checkpoint has 16"):
            train(tiny_config("model.embed_dim=8"), resume_from=folder / "checkpoints" / "last.ckpt")
        assert runs.read_record(folder)["status"] == "finished", "the run must not change"

    def test_a_setting_that_an_old_checkpoint_lacks_has_its_default(self, tiny_config):
        folder = train(tiny_config("trainer.max_steps=1"))
        path = folder / "checkpoints" / "last.ckpt"
        contents = checkpoint(folder)
        del contents["hyper_parameters"]["model"]["tie_embeddings"], contents["hyper_parameters"]["optimizer"]["beta1"]
        torch.save(contents, path)
        with pytest.raises(InputError, match="optimizer.beta1=0.5: the checkpoint has 0.9"):
            train(tiny_config("optimizer.beta1=0.5"), resume_from=path)
        with pytest.raises(InputError, match="model.tie_embeddings=True: the checkpoint has False"):
            train(tiny_config("model.tie_embeddings=true"), resume_from=path)
        train(tiny_config("trainer.max_steps=2"), resume_from=path)
        assert checkpoint(folder)["global_step"] == 2

    def test_another_text_is_refused(self, tiny_config, tmp_path):
        folder = train(tiny_config("trainer.max_steps=1"))
        (tmp_path / "other.txt").write_text("another line of words\n" * 50)
        with pytest.raises(InputError, match="data: this is not the text"):
            other = tiny_config(f"data.path={tmp_path / 'other.txt'}", "data.validation_share=0")
            train(other, resume_from=folder / "checkpoints" / "last.ckpt")
