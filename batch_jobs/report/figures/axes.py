"""The axes that figures share: shares, decoder blocks, α."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from batch_jobs.report.number_text import number

MAX_ALPHA_LABELS = 7


def share_axis(axes: Axes, label: str, lowest: float = 0.0) -> None:
    """A y axis of shares up to 1, from the fifth below `lowest` (but not above 0.4, so that chance stays in), with room
    for marks at the ends."""
    first = min(2, math.floor(lowest * 5))
    axes.set_ylim(first / 5 - 0.03, 1.03)
    axes.set_yticks([tick / 5 for tick in range(first, 6)])
    axes.set_ylabel(label)


def block_axis(axes: Axes) -> None:
    """An x axis of decoder blocks."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("block whose output was read")


def alpha_axis(axes: Axes, alphas: Sequence[float], in_norms: dict[float, float] | None = None) -> None:
    """An x axis of α with a tick at each value, labels only where they do not touch; above it, where known, the same
    in multiples of the mean residual norm."""
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
    """Labels that would touch made empty: zero stays, then the outermost, then inwards."""
    span = (positions[-1] - positions[0]) or 1.0
    taken: list[float] = []
    kept = set()
    for place in sorted(range(len(positions)), key=lambda place: (positions[place] != 0, -abs(positions[place]))):
        if all(abs(positions[place] - other) / span >= 1 / MAX_ALPHA_LABELS for other in taken):
            taken.append(positions[place])
            kept.add(place)
    return [label if place in kept else "" for place, label in enumerate(labels)]
