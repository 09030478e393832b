"""What checkpoints cost at the notebook's size: the seconds of a save, and its share of the training time.

python benchmarks/checkpoints.py
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from minigpt_pl.cli import app
from minigpt_pl.config import CheckpointConfig
from minigpt_pl.training import checkpointing
from minigpt_pl.training import fit as fit_module

STEPS, EVERY = 60, 6


def main() -> None:
    saves: list[float] = []  # seconds
    steps: list[float] = []
    sizes: list[int] = []  # bytes
    ended = [0.0]
    save, on_train_batch_end = checkpointing.SaveAndStop._save, checkpointing.SaveAndStop.on_train_batch_end

    def timed_save(self, trainer, name):
        start = time.perf_counter()
        result = save(self, trainer, name)
        saves.append(time.perf_counter() - start)
        sizes.append((self.folder / name).stat().st_size)
        return result

    def timed_step(self, *args):
        steps.append(time.perf_counter() - ended[-1])
        on_train_batch_end(self, *args)
        ended.append(time.perf_counter())

    checkpointing.SaveAndStop._save, checkpointing.SaveAndStop.on_train_batch_end = timed_save, timed_step
    with tempfile.TemporaryDirectory() as folder:
        words = np.array([f"w{i}" for i in range(19_997)])
        text = np.concatenate([words, np.random.default_rng(0).choice(words, 81 * 128 * STEPS - len(words))])
        Path(folder, "text.txt").write_text("\n".join(" ".join(row) for row in text.reshape(-1, 81)))
        options = ["data=text", f"data.path={folder}/text.txt", "data.validation_share=0", "trainer=cpu"]
        options += [f"output_dir={folder}", "trainer.max_epochs=1", "text_generator.every_n_epochs=0"]
        options += [f"checkpoint.every_n_steps={EVERY}", "trainer.precision=auto"]
        fit_module.fit(app.to_settings(app.compose("train", options)), "bench", [], None)
    seconds, step, minutes = statistics.median(saves), statistics.median(steps[1:]), CheckpointConfig.every_minutes
    print(f"{len(saves)} checkpoints of {sizes[0] / 1e6:.0f} MB: median {seconds:.2f} s, slowest {max(saves):.2f} s")
    print(f"a step: median {step:.3f} s; a checkpoint takes as long as {seconds / step:.1f} steps")
    print(f"every {minutes:g} minutes: {seconds / (60 * minutes):.2%} of the time")


if __name__ == "__main__":
    main()
