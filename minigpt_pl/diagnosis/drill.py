"""A short training that is killed and continued."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

from minigpt_pl.config import DoctorConfig
from minigpt_pl.diagnosis.machine import Check, scratch_folder

STEPS = 400
LIMIT = 60.0  # seconds for each training
SETTINGS = (
    *("trainer=cpu", f"trainer.max_steps={STEPS}", "trainer.progress_bar=false", "checkpoint.every_n_steps=20"),
    *("model.vocab_size=500", "model.max_length=32", "model.embed_dim=64", "model.feed_forward_dim=64"),
    *("data=text", "data.batch_size=32", "text_generator.every_n_epochs=0"),
)


def drill(config: DoctorConfig) -> Check:
    """Kill a training on the CPU and continue it. Its weights must equal those of an undisturbed one, bit for bit."""
    import torch

    from minigpt_pl.checkpoints import read_checkpoint

    numbers = random.Random(0)
    documents = [" ".join(str(numbers.randrange(500)) for _ in range(20)) for _ in range(2000)]
    with scratch_folder(config) as scratch:
        (scratch / "text.txt").write_text("\n".join(documents))
        quoted = str(scratch.absolute()).replace("'", r"\'")
        folders = f"data.path='{quoted}/text.txt'", f"output_dir='{quoted}'"
        command = [sys.executable, "-m", "minigpt_pl.train", *SETTINGS, *folders]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}  # the model is too small to gain from threads
        undisturbed, killed = (scratch / name / "checkpoints" / "last.ckpt" for name in ("undisturbed", "killed"))
        try:
            _train([*command, "run_name=undisturbed"], environment)
            if not _is_killed([*command, "run_name=killed"], environment, killed):
                return Check("drill", False, "the training ended before it could be killed; repeat the drill")
            steps = read_checkpoint(killed)["global_step"]
            _train([*command, "run_name=killed", "resume=auto"], environment)
        except subprocess.TimeoutExpired:
            return Check("drill", False, f"a training of {STEPS} steps takes more than {LIMIT:g} s; end other programs")
        except subprocess.CalledProcessError as error:
            return Check("drill", False, f"the training has failed: {error.stderr.strip().splitlines()[-1]}")
        weights = [read_checkpoint(path)["state_dict"] for path in (undisturbed, killed)]
        if not all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items()):
            return Check("drill", False, f"killed after {steps} steps and continued: the weights differ; report this")
    return Check("drill", True, f"killed after {steps} of {STEPS} steps and continued: the weights are the same")


def _train(command: list[str], environment: dict[str, str]) -> None:
    subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=LIMIT)


def _is_killed(command: list[str], environment: dict[str, str], checkpoint: Path) -> bool:
    """Kill the training when it has written a checkpoint."""
    deadline = time.monotonic() + LIMIT
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not checkpoint.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
    if time.monotonic() > deadline:
        raise subprocess.TimeoutExpired(command, LIMIT)
    return process.returncode != 0
