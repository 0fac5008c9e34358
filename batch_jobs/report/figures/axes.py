"""Axes that several figures use: shares, decoder blocks, α."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from batch_jobs.report.number_text import number

MAX_ALPHA_LABELS = 7


def share_axis(axes: Axes, label: str, lowest: float = 0.0) -> None:
    """Set up a y axis of shares, with a margin for marks at both ends.

    It runs to 1 from the multiple of 0.2 at or below `lowest`, at most 0.4, so that chance (0.5) stays visible.
    """
    first = min(2, math.floor(lowest * 5))
    axes.set_ylim(first / 5 - 0.03, 1.03)
    axes.set_yticks([tick / 5 for tick in range(first, 6)])
    axes.set_ylabel(label)


def block_axis(axes: Axes) -> None:
    """Set up an x axis of decoder blocks."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("block whose output was read")


def alpha_axis(axes: Axes, alphas: Sequence[float], in_norms: dict[float, float] | None = None) -> None:
    """Set up an x axis of α, with a tick at each value and labels where they do not touch.

    `in_norms`: α -> α over the mean residual norm; if given, a second axis at the top shows these values.
    """
    alphas = sorted(alphas)
    axes.xaxis.set_major_locator(FixedLocator(alphas))
    axes.set_xticklabels(_thinned(alphas, [number(alpha) for alpha in alphas]))
    axes.set_xlabel("\u03b1")
    if in_norms:
        known = sorted(in_norms)
        top = axes.secondary_xaxis("top")
        top.xaxis.set_major_locator(FixedLocator(known))
        top.set_xticklabels(_thinned(known, [number(in_norms[alpha]) for alpha in known]))
        top.xaxis.set_minor_formatter(FuncFormatter(lambda value, place: ""))
        top.set_xlabel("\u03b1 / mean residual norm")
        top.tick_params(labelsize=7)


def _thinned(positions: Sequence[float], labels: Sequence[str]) -> list[str]:
    """The labels, with those that would touch emptied. Zero has priority, then the outermost, then inwards."""
    span = (positions[-1] - positions[0]) or 1.0
    taken: list[float] = []
    kept = set()
    for place in sorted(range(len(positions)), key=lambda place: (positions[place] != 0, -abs(positions[place]))):
        if all(abs(positions[place] - other) / span >= 1 / MAX_ALPHA_LABELS for other in taken):
            taken.append(positions[place])
            kept.add(place)
    return [label if place in kept else "" for place, label in enumerate(labels)]
