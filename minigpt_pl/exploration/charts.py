"""The charts of the reports. Each chart is a list of panels, and a panel is a function that draws into axes.

Colours are readable on white and on black. Text and lines in `INK` take the colour of the page in report.html.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import EngFormatter

from minigpt_pl.exploration.metrics import METRICS
from minigpt_pl.exploration.samples import Setting, is_greedy, label, value_text, varied_controls
from minigpt_pl.exploration.scaling import ComparedRun
from minigpt_pl.exploration.summary import Estimate, Summary, none_last

INK = "#222222"
BEST_COLOUR, OTHER_COLOUR, GREEDY_COLOUR = "#1a8a4a", "#4a7fd0", "#c8553d"
# From low to high values. All have about the same brightness.
RAMP = LinearSegmentedColormap.from_list("ramp", ["#3d7fe0", "#8a63d2", "#c2479f", "#d3503f", "#b06a00"])
ATTENTION = LinearSegmentedColormap.from_list("attention", ["#2f7fd000", "#2f7fd0ff"])  # from transparent to blue
MARKERS = "os^Dv*P"
FEW_POINTS = 8  # a chart with more points names only some of them, because the names would overlap

matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "minigpt_pl", "font.size": 9, "axes.titlesize": 9}
matplotlib.rcParams |= {"axes.grid": True, "grid.alpha": 0.2, "axes.spines.top": False, "axes.spines.right": False}
matplotlib.rcParams |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "grid.color"), INK)
matplotlib.rcParams |= dict.fromkeys(("xtick.color", "ytick.color", "axes.titlecolor"), INK)

Panel = Callable[[Axes], object]

_SHOWN = ("ngram_loss", "loss", "seen_4grams", "entropy", "repeated_4grams", "loop", "distinct_2", "self_bleu")
BEHAVIOUR = {name: METRICS[name].label for name in _SHOWN} | {"failure: any": "texts with a failure"}
REAL_TEXT_LINE: dict[str, Any] = {"color": INK, "linestyle": ":", "linewidth": 1.4, "label": "real text"}
GREEDY_LINE: dict[str, Any] = {"color": GREEDY_COLOUR, "linestyle": "--", "linewidth": 1.2, "label": "greedy"}


def _plot_estimates(axis: Axes, x: Sequence[float], estimates: Sequence[Estimate], **style: Any) -> None:
    """Draw a line through the means, and a band for the intervals."""
    mean, low, high = np.array(estimates).T
    drawn: dict[str, Any] = {"marker": "o", "markersize": 4, "linewidth": 1.4} | style
    (line,) = axis.plot(x, mean, **drawn)
    axis.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def behaviour(summaries: Sequence[Summary], grid: Sequence[Setting], real_text: Summary) -> list[Panel]:
    """Each metric against the first varied control, with one line for each setting of the other controls."""
    x_name, *others = varied_controls(grid) or ["temperature"]
    sampled = [i for i, setting in enumerate(grid) if not is_greedy(setting)]
    lines: dict[str, list[int]] = {}
    for i in sampled:
        lines.setdefault(label(grid[i], others) if others else "", []).append(i)
    colours = RAMP(np.linspace(0, 1, len(lines)))
    ticks = sorted({grid[i][x_name] for i in sampled}, key=none_last)

    def panel(name: str, title: str, axis: Axes) -> None:
        for colour, marker, (text, line) in zip(colours, cycle(MARKERS), lines.items(), strict=False):
            x = [ticks.index(grid[i][x_name]) for i in line]
            style = {"color": colour, "marker": marker, "label": text or None}
            _plot_estimates(axis, x, [summaries[i][name] for i in line], **style)
        for setting, summary in zip(grid, summaries, strict=True):
            if is_greedy(setting) and not np.isnan(summary[name].mean):
                axis.axhline(summary[name].mean, **GREEDY_LINE)
        if not np.isnan(real_text[name].mean):
            axis.axhline(real_text[name].mean, **REAL_TEXT_LINE)
        axis.set_xticks(range(len(ticks)), list(map(value_text, ticks)))
        axis.set(title=title, xlabel=x_name)

    return [partial(panel, name, title) for name, title in BEHAVIOUR.items()]


def trade_off(summaries: Sequence[Summary], grid: Sequence[Setting], real_text: Summary, best: int) -> list[Panel]:
    """Unusual words against the similarity of texts."""
    diversity = "self_bleu"
    if all(np.isnan(summary[diversity].mean) for summary in summaries):
        diversity = "repeated_4grams"
    points = [(summary["ngram_loss"].mean, summary[diversity].mean) for summary in summaries]
    by_loss = sorted((i for i, point in enumerate(points) if not np.isnan(point).any()), key=lambda i: points[i])
    named = {*by_loss} if len(by_loss) <= FEW_POINTS else {best, *by_loss[:1], *by_loss[-1:]}
    varied = varied_controls(grid)

    def panel(axis: Axes) -> None:
        for i, summary in enumerate(summaries):
            if np.isnan(points[i]).any():
                continue
            x, y = summary["ngram_loss"], summary[diversity]
            shape: dict[str, Any] = (
                {"fmt": "s", "color": BEST_COLOUR} if i == best else {"fmt": "o", "color": OTHER_COLOUR}
            )
            axis.errorbar(x.mean, y.mean, _error_bar(y), _error_bar(x), markersize=4, linewidth=0.6, **shape)
            if i in named:
                name = "greedy" if is_greedy(grid[i]) else ", ".join(value_text(grid[i][control]) for control in varied)
                below = by_loss.index(i) % 2  # every second name is below its point, because neighbours can be close
                axis.annotate(name, points[i], xytext=(5, -12 if below else 5), textcoords="offset points", fontsize=8)
        if not np.isnan(real_text["ngram_loss"].mean):
            axis.axvline(real_text["ngram_loss"].mean, **REAL_TEXT_LINE)
        axis.plot([], [], "s", color=BEST_COLOUR, label="the first setting of the ranking")
        axis.margins(0.15)  # room for the names
        axis.set(
            title=f"beside a point: {', '.join(varied)}" if varied else "",
            xlabel="n-gram loss, nats (lower: more usual)",
            ylabel=f"{METRICS[diversity].label} (lower: more varied)",
        )

    return [panel]


def _error_bar(estimate: Estimate) -> list[list[float]]:
    return [[estimate.mean - estimate.low], [estimate.high - estimate.mean]]


def context(network_study: dict[str, Any]) -> list[Panel]:
    """The effect of the words further back on the loss, the attention and the generated texts."""
    attention = [
        (f"block {block}, head {head}", weights)
        for block, heads in enumerate(network_study["attention"], start=1)
        for head, weights in enumerate(heads, start=1)
    ]

    def losses(title: str, estimates: dict[int, Estimate], axis: Axes) -> None:
        _plot_estimates(axis, list(estimates), list(estimates.values()), color=OTHER_COLOUR)
        axis.set_xscale("log")
        axis.set_xticks(list(estimates), [str(c) for c in estimates])
        axis.minorticks_off()
        axis.set(title=title, xlabel="words of context that the network sees")

    def weights_by_distance(axis: Axes) -> None:
        for colour, (name, weights) in zip(RAMP(np.linspace(0, 1, len(attention))), attention, strict=True):
            axis.plot(weights, linewidth=1.4, color=colour, label=name)
        axis.set(title="mean attention weight", xlabel="words back")
        axis.legend(frameon=False, ncols=math.ceil(len(attention) / 8))  # the other panels have no heads

    of_texts = {context: estimates["ngram_loss"] for context, estimates in network_study["cut"].items()}
    panels = {
        "loss of a held-out word (nats)": network_study["context"],
        "n-gram loss of generated texts (nats)": of_texts,
    }
    drawn: list[Panel] = [partial(losses, title, estimates) for title, estimates in panels.items() if estimates]
    return [*drawn, weights_by_distance] if attention else drawn


def attention(maps: np.ndarray, words: Sequence[str]) -> list[Panel]:
    """The attention weights of each head in one text of L words. `maps` is (blocks, H, L, L)."""

    def panel(block: int, head: int, axis: Axes) -> None:
        axis.imshow(maps[block, head], cmap=ATTENTION, vmin=0, interpolation="none")
        axis.grid(False)
        axis.set_xticks(range(len(words)), words, rotation=90, fontsize=7)
        axis.set_yticks(range(len(words)), words, fontsize=7)
        axis.set_title(f"block {block + 1}, head {head + 1}")

    return [partial(panel, *place) for place in np.ndindex(*maps.shape[:2])]


def compared(runs: Sequence[ComparedRun], record: dict[str, Any], differing: Sequence[str]) -> list[Panel]:
    """Loss against parameters and tokens, with power laws, and by position. `record` is the content of compare.json.

    The legend has the settings that differ.
    """
    by_name = {run.name: run for run in runs}

    def scaling(variable: str, text: str, axis: Axes) -> None:
        for i, run in enumerate(runs):
            x, loss = getattr(run, variable), record["runs"][run.name]["word_loss"]
            axis.errorbar(x, loss.mean, _error_bar(loss), fmt="o", color=f"C{i}", markersize=4, linewidth=0.8)
        for fit in record["fits"]:
            if fit["against"] == variable and "exponent" in fit:
                x = np.geomspace(*(getattr(by_name[fit["of"][end]], variable) for end in (0, -1)))
                axis.plot(x, fit["scale"] * x ** -fit["exponent"].mean, "--", color="#999", linewidth=1)
        axis.set(xscale="log", xlabel=text, ylabel="loss of a word (nats)")
        sizes: list[float] = []
        for size in sorted(getattr(run, variable) for run in runs):
            sizes += [size] if not sizes or size > 1.3 * sizes[-1] else []  # the numbers must not overlap
        axis.set_xticks(sizes, map(EngFormatter(places=1, sep=""), sizes), rotation=45)
        axis.minorticks_off()

    def by_position(axis: Axes) -> None:
        bands = [row["band"] for row in record["by_position"]]
        for i, run in enumerate(runs):
            losses = [row[run.name] for row in record["by_position"]]
            settings = ", ".join(f"{name.split('.')[-1]}={run.settings[name]}" for name in differing)
            axis.plot(bands, losses, "o", markersize=4, color=f"C{i}", label=f"{run.name}: {settings}".rstrip(": "))
        axis.set(xlabel="number of tokens before it in the document", ylabel="loss (nats)")
        axis.tick_params(axis="x", rotation=45)

    labels = {"parameters": "parameters", "tokens": "tokens of training text"}
    return [*(partial(scaling, *item) for item in labels.items()), by_position]
