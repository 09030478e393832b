"""The callback that writes the record of a run."""

import dataclasses
import logging
import sys
from importlib.metadata import version
from pathlib import Path

import lightning.pytorch as L
import yaml
from lightning.pytorch.utilities import rank_zero_only

from minigpt_pl import runs
from minigpt_pl.config import TrainConfig
from minigpt_pl.data.corpus import Corpus
from minigpt_pl.files import write_text
from minigpt_pl.signals import Interrupted
from minigpt_pl.training import loss_curve

log = logging.getLogger(__name__)
PACKAGES = ("minigpt_pl", "torch", "lightning", "tokenizers", "datasets", "numpy")


class RunRecord(L.Callback):
    """Writes config.yaml, tokenizer.json and run.json at the start, and loss.png at the end (see `runs.py`).

    Args:
        folder: the run folder.
        config: the settings of the run.
        corpus: the text of the run.
    """

    def __init__(self, folder: Path, config: TrainConfig, corpus: Corpus):
        self.folder, self.config, self.corpus = folder, config, corpus

    @rank_zero_only
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        write_text(self.folder / "tokenizer.json", self.corpus.tokenizer.to_str(pretty=True))
        write_text(self.folder / "config.yaml", yaml.safe_dump(dataclasses.asdict(self.config), sort_keys=False))
        runs.update_record(
            self.folder,
            text=self.corpus.record,
            precision=trainer.precision,
            processes=trainer.world_size,
            device=str(trainer.strategy.root_device),
            versions={"python": sys.version.split()[0]} | {name: version(name) for name in PACKAGES},
        )
        parameters = sum(parameter.numel() for parameter in pl_module.parameters())
        log.info("Run: %s (%s parameters, %s)", self.folder, f"{parameters:,}", trainer.precision)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        planned, patience = pl_module.hparams["total_steps"], trainer.early_stopping_callback
        if planned and trainer.global_step < planned:
            lost_patience = patience is not None and patience.wait_count >= patience.patience
            setting = "trainer.patience" if lost_patience else "trainer.max_time"
            log.info("%s ended the training at step %s of %s.", setting, f"{trainer.global_step:,}", f"{planned:,}")
        self._finish(trainer, "finished")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        stopped_by_user = isinstance(exception, Interrupted | KeyboardInterrupt | SystemExit)
        if self.folder.exists():  # else somebody has removed it
            self._finish(trainer, "interrupted" if stopped_by_user else "failed")

    @rank_zero_only
    def _finish(self, trainer: L.Trainer, status: str) -> None:
        finish(self.folder, status, trainer.current_epoch, trainer.global_step)


def finish(folder: Path, status: str, epochs: int, steps: int) -> None:
    """Draw loss.png, and write the end of a run into its record."""
    if status == "finished":
        loss_curve.draw(folder)  # first: if it is interrupted, resume=auto draws it
    runs.update_record(folder, status=status, epochs=epochs, steps=steps)
    log.info("Run %s: %s after %s steps.", folder, status, steps)
    if status == "interrupted":
        log.info(runs.how_to_continue(folder))
    if status != "finished":
        loss_curve.draw(folder)  # last: the scheduler may soon kill the process
