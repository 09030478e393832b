"""Checkpoints: when they are written, that damage is noticed, and that a run continues exactly from each of them."""

import errno
import json
import shutil
import signal
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import EVERY_STEP, checkpoint, train

from minigpt_pl import runs
from minigpt_pl.checkpoints import DamagedError, newest_checkpoint, read_checkpoint
from minigpt_pl.config import CheckpointConfig
from minigpt_pl.errors import InputError
from minigpt_pl.signals import SIGNALS, Interrupted
from minigpt_pl.training import checkpointing, resume
from minigpt_pl.training.loss_curve import read_metrics


def checkpoints(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def damage(path, how):
    contents = bytearray(path.read_bytes())
    if how == "one bit":
        contents[len(contents) // 2] ^= 1
    elif how == "cut":
        del contents[-1000:]
    else:
        contents[:] = bytes(len(contents))
    path.write_bytes(contents)


@pytest.fixture(scope="module")
def finished(story, tmp_path_factory):
    """A run with last.ckpt (30 steps), step-00000025.ckpt and best.ckpt."""
    from conftest import TINY_RUN

    from minigpt_pl.cli import app

    outputs = tmp_path_factory.mktemp("finished")
    options = [*TINY_RUN, f"data.path={story}", f"output_dir={outputs}", "run_name=mine", "trainer.max_steps=30"]
    options += ["checkpoint.every_n_steps=25", "text_generator.every_n_epochs=0", "trainer.max_epochs=2"]
    return train(app.to_settings(app.compose("train", options)))


@pytest.fixture
def run(finished, tmp_path):
    """A copy of this run."""
    return shutil.copytree(finished, tmp_path / "outputs" / "mine")


class TestDamage:
    @pytest.mark.parametrize("how", ["one bit", "cut", "zeros"])
    def test_is_noticed(self, run, how):
        path = run / "checkpoints" / "last.ckpt"
        assert read_checkpoint(path)["global_step"] == 30
        damage(path, how)
        with pytest.raises(DamagedError, match="last.ckpt: cannot be read .*damaged"):
            read_checkpoint(path)

    def test_a_damaged_one_is_set_aside_and_the_one_before_is_used(self, run, caplog):
        damage(run / "checkpoints" / "last.ckpt", "one bit")
        damaged = (run / "checkpoints" / "last.ckpt").read_bytes()
        assert newest_checkpoint(run).name == "step-00000025.ckpt"
        assert "last.ckpt.damaged, and step-00000025.ckpt is used" in caplog.text
        assert (run / "checkpoints" / "last.ckpt.damaged").read_bytes() == damaged
        damage(run / "checkpoints" / "step-00000025.ckpt", "cut")
        assert newest_checkpoint(run).name == "best.ckpt"

    def test_all_are_damaged(self, run):
        for path in (run / "checkpoints").iterdir():
            damage(path, "zeros")
        with pytest.raises(InputError, match=r"tried last.ckpt, step-00000025.ckpt, best.ckpt.*restore one"):
            newest_checkpoint(run)
        assert checkpoints(run) == ["best.ckpt", "last.ckpt", "step-00000025.ckpt"]

    def test_a_file_without_permission_is_not_called_damaged(self, run, monkeypatch):
        def refuse(*args, **options):
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(checkpointing.torch, "load", refuse)
        with pytest.raises(InputError, match="cannot be read .Permission denied"):
            newest_checkpoint(run)
        assert "last.ckpt" in checkpoints(run)


class TestWriting:
    def test_after_steps_and_the_newest_are_kept(self, tiny_config):
        folder = train(tiny_config("trainer.max_epochs=1", "checkpoint.every_n_steps=4", "checkpoint.keep=3"))
        steps = checkpoint(folder)["global_step"]
        assert steps == 18
        assert checkpoints(folder) == ["best.ckpt", "last.ckpt", "step-00000012.ckpt", "step-00000016.ckpt"]
        assert checkpoint(folder, "step-00000012")["global_step"] == 12

    def test_after_minutes(self, tiny_config):
        folder = train(tiny_config("trainer.max_epochs=1", "checkpoint.every_minutes=1e-9", "checkpoint.keep=100"))
        assert len(checkpoints(folder)) == 19  # 18 steps, and best.ckpt
        folder = train(tiny_config("trainer.max_epochs=1", "checkpoint.every_minutes=null"))
        assert checkpoints(folder) == ["best.ckpt", "last.ckpt"]

    def test_a_kill_during_the_write_leaves_the_old_checkpoints(self, run, monkeypatch):
        writer = checkpointing.CheckpointWriter(keep=2, max_failures=1)
        contents = checkpoint(run)

        def be_killed(checkpoint, file):
            file.write(b"half")
            raise KeyboardInterrupt

        monkeypatch.setattr(torch, "save", be_killed)
        with pytest.raises(KeyboardInterrupt):
            writer.save_checkpoint(contents, run / "checkpoints" / "last.ckpt")
        assert checkpoints(run) == ["best.ckpt", "last.ckpt", "step-00000025.ckpt"]
        assert newest_checkpoint(run).name == "last.ckpt"

    def test_what_a_killed_process_left_is_removed(self, run, tiny_config):
        left = run / "checkpoints" / ".last.ckpt.123.tmp"
        left.write_bytes(b"half")
        train(tiny_config("trainer.max_epochs=2"), resume_from=run / "checkpoints" / "last.ckpt")
        assert not left.exists()

    def test_a_full_disk(self, tiny_config, monkeypatch, caplog):
        """A real limit of file sizes, as torch.save meets it. The training continues until the third failure."""
        resource = pytest.importorskip("resource")
        save, failures = torch.save, []

        def save_to_full_disk(contents, file):
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
            failures.append(contents["global_step"])
            try:
                save(contents, file)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
                signal.signal(signal.SIGXFSZ, handler)

        config = tiny_config("trainer.max_epochs=3", "run_name=mine", "checkpoint.every_n_steps=5")
        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", lambda *args: (save if len(failures) >= 2 else save_to_full_disk)(*args))
            folder = train(config)
        assert failures == [5, 10] and checkpoint(folder)["global_step"] == 54
        assert caplog.text.count("last.ckpt: cannot be written (File too large). The training continues") == 2
        shutil.rmtree(folder)
        monkeypatch.setattr(torch, "save", save_to_full_disk)
        with pytest.raises(InputError, match="max_failures=3: .*cannot be written .*continue with resume=mine"):
            train(config)
        assert runs.read_record(folder)["status"] == "failed" and failures[2:] == [5, 10, 15]
        assert checkpoints(folder) == [], "a part of a file is left"

    def test_a_run_folder_that_is_removed_during_the_training(self, tiny_config, monkeypatch):
        config = tiny_config("run_name=mine", "trainer.max_epochs=2")
        folder = runs.Path(config.output_dir) / "mine"
        monkeypatch.setattr(
            checkpointing.StopAtNaN, "on_train_batch_end", lambda *args: shutil.rmtree(folder, ignore_errors=True)
        )
        with pytest.raises(InputError, match="mine: the folder was removed during the training"):
            train(config)
        assert not folder.exists()


class TestExactness:
    """A run that was stopped at any moment and continued equals a run that was not stopped."""

    OPTIONS = (
        *("trainer.max_epochs=3", EVERY_STEP, "schedule.name=cosine", "text_generator.every_n_epochs=1"),
        *("text_generator.num_tokens=5", "trainer.val_check_interval=6", "run_name=mine"),
    )

    def assert_equal(self, whole, parts):
        for name in ("last", "best"):
            a, b = checkpoint(whole, name), checkpoint(parts, name)
            assert a["global_step"] == b["global_step"], name
            assert all(torch.equal(a["state_dict"][key], b["state_dict"][key]) for key in a["state_dict"]), name
        assert (whole / "samples.jsonl").read_text() == (parts / "samples.jsonl").read_text()
        a, b = ([row | {"tokens_per_second": 0} for row in read_metrics(folder)] for folder in (whole, parts))
        assert a == b
        assert runs.read_record(parts)["status"] == "finished"

    @pytest.mark.parametrize(
        "options", [[], ["trainer.accumulate_grad_batches=2"], ["trainer.ema_decay=0.9", "softmax_candidates=4"]]
    )
    def test_after_every_kind_of_step(self, tiny_config, tmp_path, options):
        config = tiny_config(*self.OPTIONS, *options, "checkpoint.every_n_steps=1", "checkpoint.keep=100")
        whole = train(config)
        per_epoch = 9 if options == ["trainer.accumulate_grad_batches=2"] else 18
        steps = [1, 3, 6, per_epoch - 1, per_epoch, per_epoch + 1, 2 * per_epoch]
        for name in [f"step-{step:08d}.ckpt" for step in steps]:
            parts = tmp_path / name / "mine"
            shutil.copytree(whole, parts, ignore=shutil.ignore_patterns("*.ckpt"))
            kept = ["best.ckpt", name] if name != "step-00000001.ckpt" else [name]
            for file in kept:
                shutil.copy(whole / "checkpoints" / file, parts / "checkpoints" / file)
            train(config, resume_from=newest_checkpoint(parts))
            self.assert_equal(whole, parts)

    def test_after_a_validation(self, tiny_config):
        """Only best.ckpt is left."""
        options = [*self.OPTIONS, "schedule.name=constant"]
        whole = train(tiny_config(*options))
        whole = whole.rename(whole.with_name("whole"))
        parts = train(tiny_config(*options, "trainer.max_epochs=1"))
        (parts / "checkpoints" / "last.ckpt").unlink()
        assert newest_checkpoint(parts).name == "best.ckpt"
        train(tiny_config(*options), resume_from=newest_checkpoint(parts))
        self.assert_equal(whole, parts)

    @pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
    def test_a_signal(self, tiny_config, monkeypatch, number):
        places = ["step", "validation", "last validation", "texts", "last step"]
        self.check(tiny_config, monkeypatch, number, places[SIGNALS.index(number) % 5], [])

    @pytest.mark.parametrize("options", [["trainer.accumulate_grad_batches=2"], ["trainer.ema_decay=0.9"]])
    @pytest.mark.parametrize(
        "place",
        [
            *("step", "step before a validation", "last step", "validation", "last validation"),
            *("very last validation", "texts", "last texts"),
        ],
    )
    def test_a_signal_with(self, tiny_config, monkeypatch, place, options):
        self.check(tiny_config, monkeypatch, signal.SIGTERM, place, options)

    def check(self, tiny_config, monkeypatch, number, place, options):
        from minigpt_pl.training import module, text_generator

        whole = train(tiny_config(*self.OPTIONS, *options))
        whole = whole.rename(whole.with_name("whole"))
        calls = 0
        owner, name, at = {
            "step": (module.MiniGPTModule, "training_step", 20),
            "step before a validation": (module.MiniGPTModule, "training_step", 24),
            "last step": (module.MiniGPTModule, "training_step", 18),
            "validation": (module.MiniGPTModule, "validation_step", 1),
            "last validation": (module.MiniGPTModule, "validation_step", 3),
            "very last validation": (module.MiniGPTModule, "validation_step", 9),
            "texts": (text_generator, "generate_texts", 2),
            "last texts": (text_generator, "generate_texts", 3),
        }[place]
        function = getattr(owner, name)

        def with_signal(*args, **values):
            nonlocal calls
            calls += 1
            if calls == at:
                signal.raise_signal(number)
            return function(*args, **values)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, with_signal)
            with pytest.raises(Interrupted) as interrupted:
                train(tiny_config(*self.OPTIONS, *options))
        assert interrupted.value.number == number and calls <= at + 1, "it did not stop at once"
        parts = whole.with_name("mine")
        assert runs.read_record(parts)["status"] == "interrupted"
        train(tiny_config(*self.OPTIONS, *options), resume_from=newest_checkpoint(parts))
        self.assert_equal(whole, parts)

    @pytest.mark.parametrize("steps", [21, 24])  # after step 24, there is a validation anyway
    def test_a_stop_inside_an_epoch_leaves_no_trace(self, tiny_config, steps):
        """The last validation and the texts of a run that stops at max_steps are removed when it continues."""
        options = [*self.OPTIONS, "schedule.name=constant"]
        whole = train(tiny_config(*options))
        whole = whole.rename(whole.with_name("whole"))
        parts = train(tiny_config(*options, f"trainer.max_steps={steps}"))
        assert read_metrics(parts)[-2]["val/loss"] and f'"step": {steps}' in (parts / "samples.jsonl").read_text()
        train(tiny_config(*options), resume_from=newest_checkpoint(parts))
        self.assert_equal(whole, parts)

    def test_a_stop_in_an_epoch_without_validation(self, tiny_config):
        options = [*self.OPTIONS, "schedule.name=constant", "trainer.check_val_every_n_epoch=2"]
        whole = train(tiny_config(*options))
        whole = whole.rename(whole.with_name("whole"))
        parts = train(tiny_config(*options, "trainer.max_steps=6"))
        train(tiny_config(*options), resume_from=newest_checkpoint(parts))
        self.assert_equal(whole, parts)

    def test_tensorboard(self, tiny_config, monkeypatch):
        monkeypatch.setitem(sys.modules, "tensorboard.compat.notf", ModuleType("notf"))  # do not import TensorFlow
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        options = [*self.OPTIONS, "logger=tensorboard", "checkpoint.every_n_steps=10"]
        folder = train(tiny_config(*options, "trainer.max_steps=25"))
        (folder / "checkpoints" / "last.ckpt").unlink()  # as after a kill: the events of steps 21 to 25 are written
        train(tiny_config(*options), resume_from=newest_checkpoint(folder))
        events = EventAccumulator(str(folder)).Reload()
        assert [event.step for event in events.Scalars("train/loss")] == list(range(54))
        assert [event.step for event in events.Scalars("train/epoch_loss")] == [17, 35, 53]

    def test_metrics_of_an_older_version(self, tiny_config):
        folder = train(tiny_config("trainer.max_epochs=1", EVERY_STEP, "run_name=mine"))
        rows = read_metrics(folder)
        contents = checkpoint(folder)
        del contents["callbacks"]["Metrics"]
        torch.save(contents, folder / "checkpoints" / "last.ckpt")
        text = "epoch,lr-KerasAdam,step,train/loss\n" + "".join(f"0,0.001,{step},{step}.5\n" for step in range(20))
        (folder / "metrics.csv").write_text(text)
        train(tiny_config("trainer.max_epochs=2", EVERY_STEP), resume_from=newest_checkpoint(folder))
        found = read_metrics(folder)
        assert found[3] == {"epoch": 0, "step": 3, "train/loss": 3.5}
        assert [row["step"] for row in found if "train/loss" in row] == list(range(36)) and rows[0]["learning_rate"]


class TestChoice:
    """What resume=auto continues."""

    def choose(self, run, run_name=None):
        return resume.choose(run.parent, run_name, "auto")

    @pytest.mark.parametrize("run_name", [None, "mine"])
    def test_a_run_without_a_checkpoint_begins_again(self, run, run_name):
        runs.update_record(run, status="running")
        shutil.rmtree(run / "checkpoints")
        assert self.choose(run, run_name) == run

    def test_only_the_best_checkpoint_is_left(self, run):
        for path in (run / "checkpoints").iterdir():
            path.unlink() if path.name != "best.ckpt" else None
        assert self.choose(run, "mine").name == "best.ckpt"

    def test_a_killed_run_with_all_steps_is_finished(self, run, tiny_config):
        runs.update_record(run, status="running")
        (run / "loss.png").unlink()
        with pytest.raises(SystemExit) as ended:
            self.choose(run)
        assert ended.value.code is None and runs.read_record(run)["status"] == "finished"
        assert (run / "loss.png").exists()

    def test_a_broken_record_does_not_stop_the_search(self, run, caplog):
        runs.update_record(run, status="interrupted")
        for name, text in (("torn", '{"status": "run'), ("list", "[1]"), ("no-date", '{"status": "running"}')):
            (run.parent / name).mkdir()
            (run.parent / name / "run.json").write_text(text)
        contents = checkpoint(run)
        contents["hyper_parameters"]["total_steps"] = 100
        torch.save(contents, run / "checkpoints" / "last.ckpt")
        assert self.choose(run) == run / "checkpoints" / "last.ckpt"
        assert caplog.text.count("left out, because its run.json is damaged") == 3

    def test_no_run_yet(self, tmp_path):
        assert resume.choose(tmp_path, None, "auto") is None
        assert resume.choose(tmp_path, "mine", "auto") is None

    def test_all_runs_are_finished(self, run, caplog):
        caplog.set_level("INFO")
        with pytest.raises(SystemExit) as ended:
            self.choose(run)
        assert ended.value.code is None and "resume=auto: nothing is left to do" in caplog.text

    def test_a_run_whose_checkpoints_are_damaged_does_not_stop_the_search(self, run, caplog):
        older = shutil.copytree(run, run.with_name("older"))
        runs.update_record(older, status="running")
        shutil.rmtree(older / "checkpoints")
        runs.update_record(run, status="running")
        for path in (run / "checkpoints").iterdir():
            damage(path, "zeros")
        assert self.choose(run) == older and "This run is left out" in caplog.text
        shutil.rmtree(older)
        with pytest.raises(InputError, match="mine: all its checkpoints are damaged"):
            self.choose(run)

    @pytest.mark.parametrize("limit", ["trainer.patience=1", "trainer.max_time='00:00:00:05'"])
    def test_a_finished_run_is_not_trained_further(self, tiny_config, monkeypatch, caplog, limit):
        """A job script always says resume=auto run_name=NAME."""
        seconds = iter(range(1000))
        monkeypatch.setattr(checkpointing.SaveAndStop, "_seconds", lambda self: next(seconds))
        options = ["trainer.max_epochs=9", "optimizer.learning_rate=1e-30", "run_name=mine", limit]
        caplog.set_level("INFO")
        folder = train(tiny_config(*options))
        assert f"{limit.partition('=')[0]} ended the training at step " in caplog.text
        before = (folder / "checkpoints" / "last.ckpt").read_bytes()
        train(tiny_config(*options, "resume=auto"), resume_from=newest_checkpoint(folder))
        assert (folder / "checkpoints" / "last.ckpt").read_bytes() == before
        assert "The run is finished." in caplog.text

    def test_a_smaller_limit_does_not_finish_a_run(self, run, tiny_config):
        runs.update_record(run, status="interrupted")
        contents = checkpoint(run)
        contents["hyper_parameters"]["total_steps"] = 100
        torch.save(contents, run / "checkpoints" / "last.ckpt")
        train(tiny_config("trainer.max_steps=3"), resume_from=run / "checkpoints" / "last.ckpt")
        assert runs.read_record(run)["status"] == "interrupted"

    def test_a_run_that_stopped_early_is_complete(self, run):
        contents = checkpoint(run)
        contents["hyper_parameters"]["total_steps"] = 100
        contents["callbacks"]["EarlyStopping{}"] = {"wait_count": 3, "patience": 3}
        torch.save(contents, run / "checkpoints" / "last.ckpt")
        runs.update_record(run, status="failed")
        with pytest.raises(SystemExit):
            self.choose(run)


def test_a_run_that_is_killed_while_it_encodes_is_known(tiny_config, monkeypatch):
    """Its record exists before, and resume=auto begins it again."""
    from minigpt_pl.data import encoding

    class Killed(BaseException):
        pass

    def be_killed(*args):
        raise Killed

    config = tiny_config("run_name=mine", "trainer.max_steps=1")
    with monkeypatch.context() as patch:
        patch.setattr(encoding, "encode", be_killed)
        with pytest.raises(Killed):
            train(config)
    folder = runs.Path(config.output_dir) / "mine"
    assert json.loads((folder / "run.json").read_text())["status"] == "running"
    assert resume.choose(folder.parent, None, "auto") == folder
    train(config, resume_from=folder)
    assert checkpoint(folder)["global_step"] == 1 and runs.read_record(folder)["status"] == "finished"


class TestVotes:
    """Two processes vote about every two seconds. The time between two calls does not matter."""

    @pytest.fixture
    def votes(self, monkeypatch, tmp_path):
        """A function that makes calls at this interval, and returns the numbers of those that vote."""
        now, voted, count = [0.0], [], [0]

        def reduce(votes, reduce_op):
            voted.append(count[0])
            return votes

        strategy = SimpleNamespace(root_device="cpu", reduce=reduce)
        trainer = SimpleNamespace(world_size=2, strategy=strategy)
        monkeypatch.setattr(checkpointing.time, "monotonic", lambda: now[0])
        callback = checkpointing.SaveAndStop(tmp_path, CheckpointConfig())
        callback.on_fit_start(trainer, None)

        def calls(number: int, seconds: float, hook=callback._vote) -> list[int]:
            voted.clear()
            for count[0] in range(1, number + 1):
                now[0] += seconds
                hook(trainer)
            return [*voted]

        calls.callback, calls.trainer = callback, trainer
        return calls

    @pytest.mark.parametrize(("seconds", "expected"), [(0.125, [1, 17, 33]), (2.5, [1, 2, 3])])
    def test_of_steps(self, votes, seconds, expected):
        assert votes(60, seconds)[:3] == expected

    @pytest.mark.parametrize("of_validation", [0.01, 5.0])
    def test_after_the_start_and_the_end_of_a_validation(self, votes, of_validation):
        """The first batch of a validation comes at once after the vote of a step."""
        assert votes(3, 2.5) == [1, 2, 3]
        votes.callback.on_validation_start(votes.trainer, None)
        during = votes(50, of_validation, votes.callback.on_validation_batch_start)
        assert during[:3] == [2, 3, 4] if of_validation > 2 else len(during) <= 1
        votes.callback.on_validation_epoch_end(votes.trainer, None)
        assert votes(4, 2.5) == [2, 3, 4]
