"""The loss curve of a run, from its metrics.csv."""

import csv
import logging
from pathlib import Path

from minigpt_pl.files import write_figure

log = logging.getLogger(__name__)


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Rows of metrics.csv in their order; each has `step` and what was logged there."""
    path = folder / "metrics.csv"
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def draw(folder: Path) -> None:
    """Draw train/loss and val/loss against steps into loss.png (needs the extra `show`)."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.info("No loss.png: pip install 'minigpt_pl[show]' draws it.")
        return
    rows = read_metrics(folder)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, style in (("train/loss", {"linewidth": 1}), ("val/loss", {"marker": "o"})):
        points = [(row["step"] + 1, row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, **style)
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=folder.name)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    write_figure(folder / "loss.png", figure)
