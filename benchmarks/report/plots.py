"""A plot of the records: the cost of the plugin, and its speed against hooks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness.rounds import interval
from benchmarks.report.labels import HOOKS, WAYS

COLOURS = ("#7b3294", "#0571b0", "#008837", "#d95f02")
GREY = "#666666"


def draw(records: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Write an SVG to `path` with one panel per record that ``PANELS`` names, side by side."""
    panels = [(records[name], panel) for name, panel in PANELS.items() if name in records]
    matplotlib.rcParams["svg.hashsalt"] = "vllm-steer"  # the same records give the same file
    figure = Figure(figsize=(7.5 * len(panels), 4.8), facecolor="white", layout="constrained")
    for place, (measured, panel) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), place)
        panel(axes, measured)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def overhead(axes: Axes, measured: Mapping[str, Any]) -> None:
    """Plot the throughput of every way against plain vLLM, one colour per batch size."""
    batches = {batch: measured["generated"][batch] for batch in sorted(measured["generated"], key=int)}
    names = [way for way in WAYS if way != "absent" and way in next(iter(batches.values()))["throughput"]]
    gap = 0.7 / len(batches)
    for number, (batch, figures) in enumerate(batches.items()):
        ratios = [figures["throughput"][name]["ratio"] for name in names]
        bounds = [interval(figures["throughput"][name]["ratios"]) for name in names]
        heights = [row + gap * (number - (len(batches) - 1) / 2) for row in range(len(names))]
        errors = [
            [ratio - low for ratio, (low, _) in zip(ratios, bounds, strict=True)],
            [high - ratio for ratio, (_, high) in zip(ratios, bounds, strict=True)],
        ]
        axes.errorbar(
            ratios,
            heights,
            xerr=errors,
            fmt="o",
            markersize=4,
            linewidth=1.2,
            color=COLOURS[number % len(COLOURS)],
            label=f"{batch} request{'s' if batch != '1' else ''} at once",
        )
    axes.axvline(1.0, color=GREY, linewidth=0.8)
    layers = len(measured["setup"]["layers"])
    axes.set_yticks(range(len(names)), [WAYS[name].format(layers=layers) for name in names], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("throughput against plain vLLM (median, 95 % interval)")
    axes.set_title("What the plugin costs", fontsize=11, loc="left")
    axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=len(batches))


def hooks(axes: Axes, measured: Mapping[str, Any]) -> None:
    """Plot the tokens per second of every way of running the grid, on a logarithmic scale."""
    figures = measured["grid"]["figures"]
    names = [way for way in HOOKS if way in figures]
    medians = [figures[name]["median"] for name in names]
    bars = axes.barh(range(len(names)), medians, color=[COLOURS[1], *[GREY] * (len(names) - 1)], height=0.6)
    axes.bar_label(bars, [f"{median:.1f}" for median in medians], padding=3, fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(right=max(medians) * 2)
    axes.set_yticks(range(len(names)), [HOOKS[name] for name in names], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("generated tokens a second")
    axes.set_title("The paper's grid, against forward hooks", fontsize=11, loc="left")


PANELS = {"overhead": overhead, "hf-hooks": hooks}
