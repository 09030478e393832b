"""FSDP2: two processes equal DDP, and their sharded checkpoints are read by any number of processes."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
from enum import Enum
from pathlib import PosixPath
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import EVERY_STEP, TINY_RUN, losses, run_main, train
from torch.distributed.checkpoint.metadata import Metadata, TensorProperties, TensorStorageMetadata
from torch.testing import assert_close

from minigpt_pl import generate_text, load, runs, sharded_checkpoints
from minigpt_pl.checkpoints import DamagedError, newest_checkpoint, read_checkpoint, read_whole_checkpoint
from minigpt_pl.errors import InputError
from minigpt_pl.sharded_checkpoints import ShardReader
from minigpt_pl.signals import Interrupted
from minigpt_pl.training.checkpointing import CheckpointWriter, StopAtNaN
from minigpt_pl.training.module import MiniGPTModule

FSDP2 = "trainer.strategy=fsdp2"
OPTIONS = [
    *("model.num_blocks=2", "model.dropout=0", "trainer.max_epochs=2", "text_generator.num_tokens=5", EVERY_STEP),
    *("trainer.gradient_clip_val=0.5", "trainer.accumulate_grad_batches=2", "trainer.activation_checkpointing=true"),
]


def two_processes(cwd, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "minigpt_pl.train", *TINY_RUN, *OPTIONS, *arguments]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def outputs(story, tmp_path_factory):
    """The runs `ddp` and `fsdp2` of two processes: the same training. They keep the checkpoint of step 5, of 18."""
    cwd = tmp_path_factory.mktemp("fsdp2")
    for strategy in ("ddp", "fsdp2"):
        options = [f"data.path={story}", "checkpoint.every_n_steps=5", "checkpoint.keep=9", f"run_name={strategy}"]
        two_processes(cwd, *options, f"trainer.strategy={strategy}", "optimizer.second_moment=dense")
    return cwd / "outputs"


@pytest.fixture
def stopped(outputs, tmp_path):
    """A copy of the run `fsdp2` as it was after step 5."""
    folder = shutil.copytree(outputs / "fsdp2", tmp_path / "outputs" / "mine")
    for path in (folder / "checkpoints").iterdir():
        if path.name != "step-00000005.ckpt":
            shutil.rmtree(path)
    return folder


@pytest.fixture
def one_process():
    """Lets Lightning start a process group of one process, and ends it."""
    with mock.patch.dict(os.environ):
        yield
    if dist.is_initialized():
        dist.destroy_process_group()


def states(folder):
    """All weights and moments of the last checkpoint."""
    return sharded_checkpoints.split(read_whole_checkpoint(folder / "checkpoints" / "last.ckpt"))[1]


@pytest.mark.slow
class TestTwoProcesses:
    def test_losses_and_texts_are_those_of_ddp(self, outputs):
        for name in ("train/loss", "train/epoch_loss", "val/loss"):
            ddp, fsdp2 = (losses(outputs / run, name) for run in ("ddp", "fsdp2"))
            assert len(ddp) == (18 if name == "train/loss" else 2)
            assert fsdp2 == pytest.approx(ddp, rel=1e-6)
        texts = [(outputs / run / "samples.jsonl").read_text() for run in ("ddp", "fsdp2")]
        assert texts[0] == texts[1] and texts[0].count("\n") == 2

    def test_checkpoints_have_the_contents_of_ddp(self, outputs):
        assert len([*(outputs / "fsdp2" / "checkpoints" / "last.ckpt").glob("*.distcp")]) == 2
        ddp, fsdp2 = states(outputs / "ddp"), states(outputs / "fsdp2")
        assert ddp.keys() == fsdp2.keys() and len(ddp) == 3 * 35 + 3
        for name, tensor in ddp.items():
            assert_close(fsdp2[name], tensor, atol=1e-5, rtol=1e-4)

    def test_a_resumed_run_is_equal_bit_for_bit(self, outputs, stopped, story):
        options = [f"data.path={story}", FSDP2, f"resume={stopped}", "checkpoint.every_n_steps=5"]
        two_processes(stopped.parent.parent, *options)
        whole, parts = states(outputs / "fsdp2"), states(stopped)
        assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())
        assert (stopped / "samples.jsonl").read_text() == (outputs / "fsdp2" / "samples.jsonl").read_text()

    @pytest.mark.parametrize("how", ["fsdp2", "auto", "one file"])
    def test_one_process_continues(self, outputs, stopped, tiny_config, one_process, how):
        strategy = "auto" if how == "auto" else "fsdp2"
        options = [*OPTIONS, "text_generator.every_n_epochs=1", f"trainer.strategy={strategy}"]
        checkpoint = newest_checkpoint(stopped)
        if how == "one file":
            target = checkpoint.with_name("joined.ckpt")
            options.append("trainer.devices=1")
            done = run_main("convert", f"to_torch={target}", f"run={checkpoint}", cwd=stopped)
            assert done.returncode == 0, done.stderr
            shutil.rmtree(checkpoint)
            checkpoint = target
        train(tiny_config(*options, "optimizer.second_moment=dense"), resume_from=checkpoint)
        assert (stopped / "checkpoints" / "last.ckpt").is_dir() == (strategy == "fsdp2")
        for name, tensor in states(outputs / "fsdp2").items():
            assert_close(states(stopped)[name], tensor, atol=1e-5, rtol=1e-4)

    def test_other_commands_read_it(self, outputs, tmp_path):
        """Directly, or as one file after `convert`."""
        checkpoint, file = outputs / "fsdp2" / "checkpoints" / "last.ckpt", outputs / "fsdp2" / "checkpoints" / "a.ckpt"
        convert = [f"to_torch={file}", f"run={checkpoint}"]
        done = run_main("convert", *convert, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        contents = torch.load(file, weights_only=True)
        assert contents.keys() == torch.load(outputs / "ddp" / "checkpoints" / "last.ckpt", weights_only=True).keys()
        texts = [generate_text(load(path), "the cat", num_tokens=9, seed=1) for path in (checkpoint, file)]
        assert texts[0] == texts[1]
        again = run_main("convert", *convert, cwd=tmp_path)
        assert again.returncode == 2 and f"error: to_torch={file}: exists; choose another name" in again.stderr
        done = run_main("sample", f"run={outputs / 'fsdp2'}", "prompt=the cat", "seed=1", cwd=tmp_path)
        assert done.stdout.startswith("the cat") and "checkpoints/best.ckpt" in done.stderr

    @pytest.mark.parametrize("name", ["__1_0.distcp", ".metadata", "meta.pt"])
    @pytest.mark.parametrize("how", ["one bit", "missing"])
    def test_damage_is_noticed(self, outputs, tmp_path, caplog, name, how):
        folder = shutil.copytree(outputs / "fsdp2", tmp_path / "mine")
        path = folder / "checkpoints" / "last.ckpt" / name
        contents = bytearray(path.read_bytes())
        contents[contents.index(b"global_step") if name == "meta.pt" else len(contents) // 2] ^= 1
        path.write_bytes(contents) if how == "one bit" else path.unlink()
        problem = f"{name} is missing" if how == "missing" else "wrong checksum of"
        with pytest.raises(DamagedError, match=f"last.ckpt: cannot be read .*{problem}.*it is damaged"):
            read_checkpoint(path.parent)
        for _ in range(2):  # an older damaged one is in the way the second time
            assert newest_checkpoint(folder).name == "step-00000015.ckpt"
            assert "It is kept as last.ckpt.damaged, and step-00000015.ckpt is used" in caplog.text
            shutil.copytree(folder / "checkpoints" / "last.ckpt.damaged", folder / "checkpoints" / "last.ckpt")


class TestOneProcess:
    def test_the_newest_and_the_best_are_kept(self, tiny_config, one_process):
        options = [FSDP2, "trainer.max_epochs=1", "trainer.val_check_interval=3", "checkpoint.every_n_steps=4"]
        folder = train(tiny_config(*options, "optimizer.learning_rate=0.01"))
        found = sorted(path.name for path in (folder / "checkpoints").iterdir())
        assert found == ["best.ckpt", "last.ckpt", "step-00000016.ckpt"]
        val = losses(folder, "val/loss")
        assert len(val) == 6 and min(val, key=val.get) > 3, "best.ckpt was never replaced"
        assert read_checkpoint(folder / "checkpoints" / "best.ckpt")["global_step"] == min(val, key=val.get) + 1
        assert (
            read_checkpoint(folder / "checkpoints" / "last.ckpt")["hyper_parameters"]["optimizer"]["second_moment"]
            == "dense"
        )

    def test_an_interrupted_validation_is_repeated_before_the_training(self, tiny_config, one_process, monkeypatch):
        start, signals = MiniGPTModule.on_validation_epoch_start, [signal.SIGTERM]

        def with_signal(module):
            start(module)
            if signals:
                signal.raise_signal(signals.pop())

        monkeypatch.setattr(MiniGPTModule, "on_validation_epoch_start", with_signal)
        config = tiny_config(FSDP2, "trainer.max_epochs=2", "run_name=mine", "trainer.val_check_interval=6")
        with pytest.raises(Interrupted):
            train(config)
        folder = runs.Path(config.output_dir) / "mine"
        assert read_checkpoint(newest_checkpoint(folder))["global_step"] == 6
        dist.destroy_process_group()
        train(config, resume_from=newest_checkpoint(folder))
        assert [*losses(folder, "val/loss")] == [5, 11, 17, 23, 29, 35]

    def test_a_kill_between_the_renames_leaves_the_old_best(self, tmp_path, monkeypatch):
        best, rename = tmp_path / "checkpoints" / "best.ckpt", runs.Path.replace
        best.mkdir(parents=True)
        (best / "old").touch()

        def be_killed(path, target):
            if target == best:
                raise KeyboardInterrupt
            return rename(path, target)

        monkeypatch.setattr(runs.Path, "replace", be_killed)
        with (
            pytest.raises(KeyboardInterrupt),
            CheckpointWriter(keep=2, max_failures=3)._new_checkpoint(best, 3) as new,
        ):
            new.mkdir()
        assert [path.relative_to(best.parent).as_posix() for path in best.parent.rglob("*")] == [
            "best.ckpt.replaced",
            "best.ckpt.replaced/old",
        ]

    def test_an_older_checkpoint_of_the_same_step_is_replaced(self, tmp_path):
        """As after `resume` from an older checkpoint."""
        checkpoints = tmp_path / "checkpoints"
        for name in ("last.ckpt", "step-00000007.ckpt"):
            (checkpoints / name).mkdir(parents=True)
            (checkpoints / name / name).touch()
        writer = CheckpointWriter(keep=2, max_failures=3)
        writer.step_of_last = 7
        with writer._new_checkpoint(checkpoints / "last.ckpt", 9) as new:
            new.mkdir()
        found = sorted(path.relative_to(checkpoints).as_posix() for path in checkpoints.rglob("*"))
        assert found == ["last.ckpt", "step-00000007.ckpt", "step-00000007.ckpt/last.ckpt"]

    def test_a_full_disk(self, tiny_config, one_process, monkeypatch, caplog):
        """A real limit of file sizes. The training continues until the third failure, and nothing is left."""
        resource = pytest.importorskip("resource")
        save, calls = sharded_checkpoints.save, []

        def save_to_full_disk(tensors, storage_writer):
            calls.append(storage_writer)
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
            try:
                save(tensors, storage_writer=storage_writer)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
                signal.signal(signal.SIGXFSZ, handler)

        monkeypatch.setattr(sharded_checkpoints, "save", save_to_full_disk)
        config = tiny_config(FSDP2, "trainer.max_epochs=3", "run_name=mine", "checkpoint.every_n_steps=5")
        with pytest.raises(
            InputError, match="max_failures=3: .*last.ckpt cannot be written .*continue with resume=mine"
        ):
            train(config)
        folder = runs.Path(config.output_dir) / "mine"
        assert len(calls) == 3 and caplog.text.count("The training continues, and tries again.") == 2
        assert [*(folder / "checkpoints").iterdir()] == [], "a part of a checkpoint is left"

    def test_a_diverged_training_writes_no_checkpoint(self, tiny_config, one_process, monkeypatch):
        step = MiniGPTModule.training_step
        monkeypatch.setattr(MiniGPTModule, "training_step", lambda *args: step(*args) * torch.nan)
        monkeypatch.setattr(StopAtNaN, "on_train_batch_end", lambda *args: None)  # the loss itself is finite
        config = tiny_config(FSDP2, "trainer.max_steps=1")
        with pytest.raises(InputError, match="the training has diverged"):
            train(config)
        assert not [*runs.Path(config.output_dir).glob("*/checkpoints/*")]

    def test_a_large_model_scaled_down(self, tiny_config, one_process):
        sizes = ["embed_dim=24", "num_heads=12", "head_dim=2", "feed_forward_dim=96"]
        options = [
            "experiment=large",
            *(f"model.{size}" for size in sizes),
            "data.batch_size=16",
            "trainer.max_steps=2",
        ]
        assert len(load(train(tiny_config(*options, FSDP2))).network.blocks) == 12


def test_code_in_the_metadata_is_not_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    for attack in (Attack(), {"name": "torch.distributed.checkpoint.metadata\nos.mkdir"}):
        (tmp_path / ".metadata").write_bytes(pickle.dumps(attack))
        with pytest.raises((pickle.UnpicklingError, AttributeError)):
            ShardReader(tmp_path).read_metadata()
    assert not (tmp_path / "attacked").exists()


def test_members_of_an_enum_as_python_3_11_2_writes_them(tmp_path):
    """Debian 12 has this Python. It pickles a member as `getattr(kind, name)`, other versions as `kind(value)`."""

    class Pickler(pickle.Pickler):
        def reducer_override(self, value):
            return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented

    properties = TensorProperties(memory_format=torch.preserve_format)
    metadata = Metadata({"a": TensorStorageMetadata(properties, torch.Size([1]), [])})
    with (tmp_path / ".metadata").open("wb") as file:
        Pickler(file).dump(metadata)
    assert b"getattr" in (tmp_path / ".metadata").read_bytes()
    assert ShardReader(tmp_path).read_metadata() == metadata
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Attribute()))
    with pytest.raises(pickle.UnpicklingError, match="contains builtins.getattr of .*PosixPath"):
        ShardReader(tmp_path).read_metadata()


class Attribute:
    """An attribute of a class that is no enum."""

    def __reduce__(self):
        return getattr, (PosixPath, "home")
