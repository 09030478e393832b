"""The charts of the reports, as matplotlib figures."""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator

from minigpt_pl.exploration.metrics import FAILURES
from minigpt_pl.exploration.samples import Setting, is_greedy, label, value_text, varied_controls
from minigpt_pl.exploration.scaling import ComparedRun
from minigpt_pl.exploration.summary import Estimate, Summary, none_last, pareto_front

matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "minigpt_pl", "font.size": 9}
matplotlib.rcParams |= {"axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False}

BEHAVIOUR = {
    "ngram_loss": "n-gram loss (nats)",
    "loss": "own loss (nats)",
    "seen_4grams": "4-word sequences of the training text",
    "entropy": "entropy of the model (bits)",
    "repeated_4grams": "repeated 4-word sequences",
    "loop": "longest loop (words)",
    "distinct_2": "different pairs of words",
    "self_bleu": "self-BLEU",
    "failure: any": "texts with a failure",
}
REAL_TEXT_LINE: dict[str, Any] = {"color": "black", "linestyle": ":", "linewidth": 1.2, "label": "real text"}
GREEDY_LINE: dict[str, Any] = {"color": "#a33", "linestyle": "--", "linewidth": 1, "label": "greedy"}
BEST_COLOUR, OTHER_COLOUR = "#1b7837", "#4575b4"


def _plot_estimates(axis: Axes, x: Sequence[float], estimates: Sequence[Estimate], **style: Any) -> None:
    """Draw a line through the means, and a band for the intervals."""
    mean, low, high = np.array(estimates).T
    (line,) = axis.plot(x, mean, "o-", markersize=3, linewidth=1.3, **style)
    axis.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def behaviour(summaries: Sequence[Summary], grid: Sequence[Setting], real_text: Summary) -> Figure:
    """Each metric against the first varied control, with one line for each setting of the other controls."""
    x_name, *others = varied_controls(grid) or ["temperature"]
    sampled = [i for i, setting in enumerate(grid) if not is_greedy(setting)]
    lines: dict[str, list[int]] = {}
    for i in sampled:
        lines.setdefault(label(grid[i], others) if others else "", []).append(i)
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(lines)))
    ticks = sorted({grid[i][x_name] for i in sampled}, key=none_last)
    figure = Figure(figsize=(10, 9), layout="constrained")
    axes = figure.subplots(3, 3)
    for axis, (name, title) in zip(axes.flat, BEHAVIOUR.items(), strict=True):
        for colour, (text, line) in zip(colours, lines.items(), strict=True):
            x = [ticks.index(grid[i][x_name]) for i in line]
            _plot_estimates(axis, x, [summaries[i][name] for i in line], color=colour, label=text or None)
        for setting, summary in zip(grid, summaries, strict=True):
            if is_greedy(setting) and not np.isnan(summary[name].mean):
                axis.axhline(summary[name].mean, **GREEDY_LINE)
        if not np.isnan(real_text[name].mean):
            axis.axhline(real_text[name].mean, **REAL_TEXT_LINE)
        axis.set_title(title, fontsize=9)
        axis.set_xticks(range(len(ticks)), list(map(value_text, ticks)))
        axis.set_xlabel(x_name)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False)
    return figure


def trade_off(summaries: Sequence[Summary], grid: Sequence[Setting], real_text: Summary, best: Sequence[int]) -> Figure:
    """Coherence against diversity. Low is good in both."""
    diversity, title = "self_bleu", "self-BLEU (lower: more diverse)"
    if all(np.isnan(summary[diversity].mean) for summary in summaries):
        diversity, title = "repeated_4grams", "repeated 4-word sequences (lower: more diverse)"
    points = [(summary["ngram_loss"].mean, summary[diversity].mean) for summary in summaries]
    front, varied = pareto_front(points), varied_controls(grid)
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axis = figure.subplots()
    for i, summary in enumerate(summaries):
        if np.isnan(points[i]).any():
            continue
        x, y = summary["ngram_loss"], summary[diversity]
        style: dict[str, Any] = {"color": BEST_COLOUR if i in best else OTHER_COLOUR, "markersize": 4, "linewidth": 0.5}
        axis.errorbar(x.mean, y.mean, _error_bar(y), _error_bar(x), fmt="o", **style)
        if i in front or i in best[:1]:  # names of all points would overlap
            name = label(grid[i], varied).replace("temperature=", "T ").replace("top_k=", "k ")
            axis.annotate(name, points[i], xytext=(5, 5), textcoords="offset points", fontsize=7, color="#555")
    front_x, front_y = zip(*(points[i] for i in front), strict=True) if front else ((), ())
    axis.plot(front_x, front_y, color="#999", linewidth=1, label="no other setting is better in both")
    if not np.isnan(real_text["ngram_loss"].mean):
        axis.axvline(real_text["ngram_loss"].mean, **REAL_TEXT_LINE)
    axis.plot([], [], "o", color=BEST_COLOUR, label="best settings of the report")
    axis.set(xlabel="n-gram loss, nats (lower: more usual)", ylabel=title)
    axis.legend(frameon=False)
    return figure


def _error_bar(estimate: Estimate) -> list[list[float]]:
    return [[estimate.mean - estimate.low], [estimate.high - estimate.mean]]


def failures(summaries: Sequence[Summary], grid: Sequence[Setting], real_text: Summary) -> Figure:
    """The share of texts with each failure. Real text is the first row, then one row for each setting."""
    names = ["real text", *(label(setting, varied_controls(grid)) for setting in grid)]
    table = np.array([[summary[name].mean for name in FAILURES] for summary in (real_text, *summaries)])
    figure = Figure(figsize=(8, 1.2 + 0.24 * len(names)), layout="constrained")
    axis = figure.subplots()
    axis.imshow(table, aspect="auto", cmap="Reds", vmin=0, vmax=1)
    axis.grid(False)
    for (row, column), value in np.ndenumerate(table):
        text, colour = "–" if np.isnan(value) else f"{value:.0%}", "white" if value > 0.6 else "black"
        axis.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    axis.set_xticks(range(len(FAILURES)), [name.removeprefix("failure: ") for name in FAILURES])
    axis.xaxis.tick_top()
    axis.set_yticks(range(len(names)), names, fontsize=7)
    return figure


def context(network_study: dict[str, Any]) -> Figure:
    """The effect of the words further back on the loss, the attention and the generated texts."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    of_texts = {context: estimates["ngram_loss"] for context, estimates in network_study["cut"].items()}
    axes = {"loss of a held-out word (nats)": (left, network_study["context"])}
    axes |= {"n-gram loss of generated texts (nats)": (right, of_texts)}
    for title, (axis, estimates) in axes.items():
        if estimates:
            _plot_estimates(axis, list(estimates), list(estimates.values()))
            axis.set_xscale("log")
            axis.set_xticks(list(estimates), [str(c) for c in estimates])
            axis.minorticks_off()
        axis.set(xlabel="words of context that the network sees")
        axis.set_title(title, fontsize=9)
    for block, heads in enumerate(network_study["attention"], start=1):
        for head, weights in enumerate(heads, start=1):
            middle.plot(weights, linewidth=1.2, label=f"block {block}, head {head}")
    if network_study["attention"]:
        middle.legend(frameon=False)
    middle.set(xlabel="words back")
    middle.set_title("mean attention weight", fontsize=9)
    return figure


def attention(maps: np.ndarray, words: Sequence[str]) -> Figure:
    """The attention weights of each head in one text of L words. `maps` is (blocks, H, L, L)."""
    blocks, heads, length, _ = maps.shape
    figure = Figure(figsize=(5 * heads, 5.2 * blocks), layout="constrained")
    for (block, head), axis in np.ndenumerate(figure.subplots(blocks, heads, squeeze=False)):
        axis.imshow(maps[block, head], cmap="magma_r", vmin=0)
        axis.grid(False)
        axis.set_xticks(range(length), words, rotation=90, fontsize=6)
        axis.set_yticks(range(length), words, fontsize=6)
        axis.set_title(f"block {block + 1}, head {head + 1}", fontsize=9)
    return figure


def compared(runs: Sequence[ComparedRun], record: dict[str, Any]) -> Figure:
    """Loss against parameters and tokens, with power laws, and by position. `record` is the content of compare.json."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    *scaling_axes, right = figure.subplots(1, 3)
    by_name = {run.name: run for run in runs}
    labels = {"parameters": "parameters", "tokens": "training tokens, counted in each pass"}
    for axis, (variable, text) in zip(scaling_axes, labels.items(), strict=True):
        for i, run in enumerate(runs):
            x, loss = getattr(run, variable), record["runs"][run.name]["word_loss"]
            axis.errorbar(x, loss.mean, _error_bar(loss), fmt="o", color=f"C{i}", markersize=4, linewidth=0.8)
        for fit in record["fits"]:
            if fit["against"] == variable and "exponent" in fit:
                x = np.geomspace(*(getattr(by_name[fit["of"][end]], variable) for end in (0, -1)))
                axis.plot(x, fit["scale"] * x ** -fit["exponent"].mean, "--", color="#999", linewidth=1)
        axis.set(xscale="log", xlabel=text, ylabel="loss of a word (nats)")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.minorticks_off()
    bands = [row["band"] for row in record["by_position"]]
    for i, run in enumerate(runs):
        losses = [row[run.name] for row in record["by_position"]]
        right.plot(bands, losses, "o-", markersize=3, color=f"C{i}", label=run.name)
    right.set(xlabel="number of tokens before it in the document", ylabel="loss (nats)")
    right.tick_params(axis="x", rotation=45)
    figure.legend(loc="outside lower center", ncols=8, frameon=False)
    return figure
