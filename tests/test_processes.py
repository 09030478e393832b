"""The number of processes changes neither the losses nor the order of the sequences. They only exchange gradients."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import EVERY_STEP, TINY_RUN, checkpoint, losses, train
from torch.testing import assert_close

# An epoch has 6 steps: 11 batches of 16 sequences and one of 3, so some of 4 or 8 processes get no sequence of it.
OPTIONS = [
    *("model.dropout=0.3", "model.num_blocks=2", "trainer.max_epochs=2", "data.max_sequences=179"),
    *("trainer.accumulate_grad_batches=2", "trainer.gradient_clip_val=0.5", "optimizer.second_moment=by_occurrence"),
    *("trainer.precision=32-true", "text_generator.every_n_epochs=0"),
]
FP32 = 1e-5  # relative: sums in another order

COUNTED = """
import json
from pathlib import Path

from minigpt_pl import train
from minigpt_pl.training import checkpointing
from minigpt_pl.training.module import MiniGPTModule
from torch.profiler import profile

checkpointing.VOTE_SECONDS = 10**6  # only the first step votes
watch = profile()


def on_train_batch_start(self, batch, batch_idx):
    if (self.current_epoch, batch_idx) == (0, 4):
        watch.start()
    if (self.current_epoch, batch_idx) == (0, 10):
        watch.stop()
        counts = {event.key: event.count for event in watch.key_averages() if event.key.startswith("c10d::")}
        Path(f"{self.global_rank}.json").write_text(json.dumps(counts))


MiniGPTModule.on_train_batch_start = on_train_batch_start
train.main()
"""

# Checks refuse more processes than CPU cores.
ON_EIGHT_CORES = """
import os

from minigpt_pl import train

os.cpu_count = lambda: 8
train.main()
"""


def run(cwd, program, processes, *arguments):
    (cwd / "program.py").write_text(program)
    command = [sys.executable, "program.py", *arguments, f"trainer.devices={processes}"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def one(tiny_config):
    """The run of one process."""
    return train(tiny_config(*OPTIONS, EVERY_STEP))


def assert_equal_weights(folder, one):
    weights = checkpoint(folder)["state_dict"]
    for name, weight in checkpoint(one)["state_dict"].items():
        assert_close(weights[name], weight, atol=1e-5, rtol=1e-4)


def test_two_processes_exchange_gradients_and_their_squares_only(story, tmp_path, one):
    """In steps 3 to 5: before, DDP arranges its buckets. Step 4 is written to metrics.csv."""
    options = [*TINY_RUN, *OPTIONS, f"data.path={story}", "run_name=two", "trainer.log_every_n_steps=4"]
    run(tmp_path, COUNTED, 2, *options)
    folder = tmp_path / "outputs" / "two"
    for rank in range(2):
        counts = json.loads((tmp_path / f"{rank}.json").read_text())
        # Three steps: one bucket of gradients each, and the squares. And one row.
        assert counts == {"c10d::allreduce_": 3 + 3 + 1}
    found, expected = losses(folder), losses(one)
    assert found == pytest.approx({step: expected[step] for step in found}, rel=FP32) and [*found] == [3, 7, 11]
    for name in ("train/epoch_loss", "val/loss", "val/word_loss"):
        assert losses(folder, name) == pytest.approx(losses(one, name), rel=FP32)
    assert_equal_weights(folder, one)


def test_four_processes_stop_and_any_number_continues(story, tmp_path, one, tiny_config):
    """With dropout, inside an epoch. Equal losses mean the same sequences in the same order."""
    stopped = tmp_path / "outputs" / "stopped"
    options = [*TINY_RUN, *OPTIONS, f"data.path={story}", EVERY_STEP]
    run(tmp_path, ON_EIGHT_CORES, 4, *options, "run_name=stopped", "checkpoint.every_n_steps=4", "checkpoint.keep=9")
    assert losses(stopped) == pytest.approx(losses(one), rel=FP32) and len(losses(one)) == 12
    assert_equal_weights(stopped, one)
    for path in (stopped / "checkpoints").iterdir():
        if path.name != "step-00000004.ckpt":
            path.unlink()
    for processes in (1, 2, 8):
        folder = shutil.copytree(stopped, stopped.with_name(f"with-{processes}"))
        resumed = folder / "checkpoints" / "step-00000004.ckpt"
        if processes == 1:
            train(tiny_config(*OPTIONS, EVERY_STEP), resume_from=resumed)
        else:
            run(tmp_path, ON_EIGHT_CORES, processes, *options, f"resume={resumed}")
        for name in ("train/loss", "train/epoch_loss", "val/loss"):
            assert losses(folder, name) == pytest.approx(losses(one, name), rel=FP32), f"{processes} processes: {name}"
        assert_equal_weights(folder, one)
