"""The report's charts, as matplotlib figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator

from minigpt_pl.exploration.samples import Setting, is_greedy, label, varied_controls
from minigpt_pl.exploration.scaling import Fit, Run
from minigpt_pl.exploration.summary import FAILURES, Estimate, frontier
from minigpt_pl.files import write_figure

matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "minigpt_pl", "font.size": 9, "axes.grid": True,
                        "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False}  # fmt: skip

BEHAVIOUR = {
    "ngram_loss": "n-gram loss (nats)", "loss": "own loss (nats)", "seen_4grams": "4-word runs seen in training",
    "entropy": "entropy of the model (bits)", "repeated_4grams": "repeated 4-word runs", "loop": "longest loop (words)",
    "distinct_2": "different pairs", "self_bleu": "self-BLEU", "failure: any": "texts with a failure",
}  # fmt: skip
REAL_TEXT_LINE = {"color": "black", "linestyle": ":", "linewidth": 1.2}
GREEDY_COLOUR = "#a33"

Summary = Sequence[dict[str, Estimate]]


def behaviour(summary: Summary, grid: Sequence[Setting], real: dict[str, Estimate]) -> Figure:
    """Each measure against the first control that varies, a line for each value of the others, with its interval."""
    varied = varied_controls(grid) or ["temperature"]
    x_name, others = varied[0], varied[1:]
    figure = Figure(figsize=(10, 9), layout="constrained")
    axes = figure.subplots(3, 3)
    places = [i for i, setting in enumerate(grid) if summary[i] and not is_greedy(setting)]
    lines: dict[str, list[int]] = {}
    for i in places:
        lines.setdefault(label({**grid[i], "temperature": 1.0, x_name: 1.0}, others) if others else "", []).append(i)
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, max(len(lines), 1)))
    ticks = sorted({grid[i][x_name] for i in places}, key=lambda v: (v is None, v))
    for axis, (name, title) in zip(axes.flat, BEHAVIOUR.items(), strict=True):
        for colour, (text, line) in zip(colours, lines.items(), strict=True):
            x = [ticks.index(grid[i][x_name]) for i in line]
            mean, low, high = (np.array([summary[i][name][k] for i in line]) for k in range(3))
            axis.plot(x, mean, "o-", color=colour, markersize=3, linewidth=1.3, label=text or None)
            axis.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
        for i, setting in enumerate(grid):
            if is_greedy(setting) and summary[i] and not np.isnan(summary[i][name].mean):
                axis.axhline(summary[i][name].mean, color=GREEDY_COLOUR, linestyle="--", linewidth=1, label="greedy")
        if not np.isnan(real[name].mean):
            axis.axhline(real[name].mean, **REAL_TEXT_LINE, label="real text")
        axis.set_title(title, fontsize=9)
        axis.set_xticks(range(len(ticks)), ["all" if tick is None else f"{tick:g}" for tick in ticks])
        axis.set_xlabel(x_name)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False)
    return figure


def trade_off(summary: Summary, grid: Sequence[Setting], real: dict[str, Estimate], best: Sequence[int]) -> Figure:
    """Coherence against diversity: low is good in both, and no setting has both."""
    diversity, title = ("self_bleu", "self-BLEU (lower: more diverse)")
    if all(np.isnan(estimates[diversity].mean) for estimates in summary if estimates):
        diversity, title = ("repeated_4grams", "repeated 4-word runs (lower: more diverse)")
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axis = figure.subplots()
    nowhere = Estimate(*[float("nan")] * 3)
    points = [(estimates.get("ngram_loss", nowhere).mean, estimates.get(diversity, nowhere).mean)
              for estimates in summary]  # fmt: skip
    varied, edge = varied_controls(grid), frontier(points)
    for i, (x, y) in enumerate(points):
        if np.isnan([x, y]).any():
            continue
        spread = [[[v - e.low], [e.high - v]] for v, e in ((x, summary[i]["ngram_loss"]), (y, summary[i][diversity]))]
        colour = "#1b7837" if i in best else "#4575b4"
        axis.errorbar(x, y, xerr=spread[0], yerr=spread[1], fmt="o", color=colour, markersize=4, linewidth=0.5)
        if i in edge or i in best[:1]:  # all names would cover each other
            name = label(grid[i], varied).replace("temperature=", "T ").replace("top_k=", "k ")
            axis.annotate(name, (x, y), xytext=(5, 5), textcoords="offset points", fontsize=7, color="#555")
    axis.plot(
        *zip(*(points[i] for i in edge), strict=True), color="#999", linewidth=1, label="no setting is better in both"
    )
    axis.axvline(real["ngram_loss"].mean, **REAL_TEXT_LINE, label="real text")
    axis.plot([], [], "o", color="#1b7837", label="picked by the rule")
    axis.set(xlabel="n-gram loss, nats (lower: more usual)", ylabel=title)
    axis.legend(frameon=False)
    return figure


def failures(summary: Summary, grid: Sequence[Setting], real: dict[str, Estimate]) -> Figure:
    """The share of texts with each failure, a row a setting, real text first."""
    varied = varied_controls(grid)
    rows = [("real text", real), *((label(s, varied), e) for s, e in zip(grid, summary, strict=True) if e)]
    table = np.array([[estimates[name].mean for name in FAILURES] for _, estimates in rows])
    figure = Figure(figsize=(8, 1.2 + 0.24 * len(rows)), layout="constrained")
    axis = figure.subplots()
    axis.imshow(table, aspect="auto", cmap="Reds", vmin=0, vmax=1)
    axis.grid(False)
    for (row, column), value in np.ndenumerate(table):
        colour = "white" if value > 0.6 else "black"
        axis.text(column, row, f"{value:.0%}", ha="center", va="center", fontsize=7, color=colour)
    axis.set_xticks(range(len(FAILURES)), [name.removeprefix("failure: ") for name in FAILURES])
    axis.xaxis.tick_top()
    axis.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=7)
    return figure


def context(study: dict[str, Any]) -> Figure:
    """What the words further back do: for the loss, for the attention, and for the texts when they are cut off."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for axis, estimates, title in (
        (left, study["context"], "loss of a held-out word (nats)"),
        (right, {c: e["ngram_loss"] for c, e in study["cut"].items()}, "n-gram loss of texts written (nats)"),
    ):
        if estimates:
            mean, low, high = zip(*estimates.values(), strict=True)
            axis.plot(list(estimates), mean, "o-", markersize=3)
            axis.fill_between(list(estimates), low, high, alpha=0.2, linewidth=0)
            axis.set_xscale("log")
            axis.set_xticks(list(estimates), [str(c) for c in estimates])
            axis.minorticks_off()
        axis.set(xlabel="words of context that the network sees")
        axis.set_title(title, fontsize=9)
    for block, heads in enumerate(study["attention"]):
        for head, weights in enumerate(heads):
            middle.plot(weights, linewidth=1.2, label=f"block {block + 1}, head {head + 1}")
    if study["attention"]:
        middle.legend(frameon=False)
    middle.set(xlabel="words back")
    middle.set_title("mean attention weight", fontsize=9)
    return figure


def attention(maps: np.ndarray, words: Sequence[str]) -> Figure:
    """Where each head looks in one text: (blocks, H, L, L) and the L words."""
    blocks, heads, size, _ = maps.shape
    figure = Figure(figsize=(5 * heads, 5.2 * blocks), layout="constrained")
    for place, axis in enumerate(figure.subplots(blocks, heads, squeeze=False).flat):
        block, head = divmod(place, heads)
        axis.imshow(maps[block, head], cmap="magma_r", vmin=0)
        axis.grid(False)
        axis.set_xticks(range(size), words, rotation=90, fontsize=6)
        axis.set_yticks(range(size), words, fontsize=6)
        axis.set_title(f"block {block + 1}, head {head + 1}", fontsize=9)
    return figure


def compared(
    runs: Sequence[Run], by_document: dict[str, tuple[Estimate, Estimate | None]], by_position: Sequence[dict],
    fits: Sequence[tuple[str, list[str], Fit | None]],
) -> Figure:  # fmt: skip
    """Loss of a word against parameters and tokens, with the power laws that were fitted, and by position."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    *against, right = figure.subplots(1, 3)
    place = {run.name: run for run in runs}
    for axis, what in zip(against, ("parameters", "tokens"), strict=True):
        for number, run in enumerate(runs):
            mean, low, high = by_document[run.name][0]
            axis.errorbar(getattr(run, what), mean, [[mean - low], [high - mean]], fmt="o", color=f"C{number}",
                          markersize=4, linewidth=0.8)  # fmt: skip
        for _, names, fit in (entry for entry in fits if entry[0] == what and entry[2] is not None):
            x = np.geomspace(*(getattr(place[names[end]], what) for end in (0, -1)))
            axis.plot(x, fit.scale * x**-fit.exponent.mean, "--", color="#999", linewidth=1)
        axis.set(xscale="log", xlabel=what if what == "parameters" else "tokens trained on, repeats counted",
                 ylabel="loss of a word (nats)")  # fmt: skip
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.minorticks_off()
    for number, run in enumerate(runs):
        right.plot([row["band"] for row in by_position], [row[run.name] for row in by_position], "o-", markersize=3,
                   color=f"C{number}", label=run.name)  # fmt: skip
    right.set(xlabel="tokens before it in its document", ylabel="loss (nats)")
    right.tick_params(axis="x", rotation=45)
    figure.legend(loc="outside lower center", ncols=8, frameon=False)
    return figure


def save(figure: Figure, path: Path) -> str:
    """Write a PNG, aside and renamed, and return the same chart as SVG for the page."""
    from io import StringIO

    write_figure(path, figure, dpi=130)
    text = StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
