"""Reads metrics.csv of a run, and draws its loss curve."""

import csv
import logging
from pathlib import Path
from typing import Any

from minigpt_pl.files import complete_lines, write_figure

log = logging.getLogger(__name__)


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The rows of metrics.csv: `step` and the values of that step. The list is empty if there is no file."""
    path = folder / "metrics.csv"
    if not path.exists():
        return []
    rows = csv.DictReader(complete_lines(path))
    return [{name: float(value) for name, value in row.items() if value} for row in rows]


def draw(folder: Path) -> None:
    """Draw train/loss and val/loss against the steps: writes loss.png. Needs matplotlib, from the extra `show`.

    Does nothing if there is no metrics.csv yet.
    """
    if not (folder / "metrics.csv").exists():
        return
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.info("loss.png needs matplotlib: pip install 'minigpt_pl[show]'")
        return
    rows = read_metrics(folder)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    styles: dict[str, dict[str, Any]] = {"train/loss": {"linewidth": 1}, "val/loss": {"marker": "o"}}
    for name, style in styles.items():
        points = [(row["step"] + 1, row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, **style)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=folder.name)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    write_figure(folder / "loss.png", figure)
