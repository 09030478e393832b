"""Shows the progress: as a bar in a terminal, as lines in a log file."""

import sys
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_only

LOG_SECONDS = 30  # between lines in a log file
BAR_SECONDS = 0.2  # between updates of the bar; each one waits for the GPU to read the loss


class Progress(L.Callback):
    """Shows epoch, step, loss, perplexity, tokens per second and time left.

    The bar needs the package rich and 60 columns. Without rich or without a terminal, a line is printed every 30 s. The
    result of each validation is also printed.

    Args:
        seconds_left: returns the seconds until `max_time`. If they are too few for all steps, they are shown.
    """

    bar: Any = None

    def __init__(self, seconds_left: Callable[[], float]):
        self.seconds_left = seconds_left

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.start = self.last_shown = time.monotonic()
        self.steps_before = trainer.global_step
        self.bar = _rich_bar() if sys.stderr.isatty() else None
        if self.bar is not None:
            total = pl_module.hparams["total_steps"]
            self.task = self.bar.add_task("", total=total, completed=self.steps_before, numbers="", left="")
            self.bar.start()

    @rank_zero_only
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        now, done, total = time.monotonic(), trainer.global_step, pl_module.hparams["total_steps"]
        due = now - self.last_shown >= (LOG_SECONDS if self.bar is None else BAR_SECONDS)
        metrics = trainer.callback_metrics
        # Several processes compute the loss only for rows of metrics.csv.
        if done == self.steps_before or "train/loss" not in metrics or not (due or done >= total):
            return
        self.last_shown = now
        numbers = (
            f"loss {metrics['train/loss']:.3f}  perplexity {metrics['train/perplexity']:,.1f}"
            f"  {metrics['tokens_per_second']:,.0f} tokens/s"
        )
        epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        # The mean time of a step includes the time of validations and generated texts.
        seconds = (now - self.start) / (done - self.steps_before) * (total - done)
        limit = self.seconds_left()
        end = "to max_time" if limit < seconds else "left"
        seconds = round(max(min(seconds, limit), 0))
        left = f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} {end}"
        if self.bar is not None:
            self.bar.update(self.task, completed=done, description=epoch, numbers=numbers, left=left)
        else:
            print(f"{epoch}  step {done}/{total}  {numbers}  {left}", file=sys.stderr, flush=True)

    @rank_zero_only
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics = trainer.callback_metrics
        print(
            f"epoch {trainer.current_epoch + 1}, step {trainer.global_step}: val/loss {metrics['val/loss']:.4f},"
            f" perplexity {metrics['val/perplexity']:,.2f}, word perplexity {metrics['val/word_perplexity']:,.2f}",
            file=sys.stderr,
            flush=True,
        )

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.bar is not None:
            self.bar.stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")


def _rich_bar() -> Any:
    try:
        from rich import progress
        from rich.console import Console
    except ImportError:
        print("For a progress bar: pip install 'minigpt_pl[show]'", file=sys.stderr)
        return None

    class TwoLines(progress.Progress):
        def get_renderables(self) -> Any:
            yield self.make_tasks_table(self.tasks)
            yield from (task.fields["numbers"] for task in self.tasks)

    return TwoLines(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=None),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("{task.fields[left]}"),
        console=Console(stderr=True),
        expand=True,
        redirect_stdout=False,  # the user may redirect the texts
    )
