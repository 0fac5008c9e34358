"""Intervals of rates and of their weighted sums.

A normal interval takes its width from the observed counts, so a group of cells that are all 0 or all 1 has none, and a
bootstrap of the counts has none either. Here the cells of a group share three eighths of a success and of a failure,
and a group of one cell has its Wilson interval. `docs/reference/statistics.md` has the coverage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

Z_95_PERCENT: Final = 1.959963984540054
SHARED_PSEUDO_COUNT: Final = 0.375
"""Successes, and as many failures, that the cells of a group share in the estimate of their variance."""

Cell = tuple[int, int]
"""Successes and samples of one condition."""


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share (Wilson 1927).

    Raises:
        ValueError: unless 0 <= successes <= trials and trials > 0.
    """
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"{successes} of {trials} is not a share; give 0 <= successes <= trials with trials >= 1.")
    share, z2 = successes / trials, Z_95_PERCENT**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z_95_PERCENT / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    # at a share of 0 or 1 the bound equals the share exactly; rounding must not push it past
    return min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))


def contrast_interval(groups: Sequence[Sequence[Cell]], weights: Sequence[float], value: float) -> Estimate:
    """95 % interval of Σ weight · (mean rate of a group's cells), by squaring and adding the groups' own distances.

    Source: Newcombe 1998 (method 10) for the difference of two rates, Zou and Donner 2008 for weighted sums. A group of
    one cell has its Wilson interval. A group of m cells has a normal interval, stratified by cell:
    variance Σ r(1 - r) / (n - 1) / m² with r = (k + a) / (n + 2a) and a = 0.375 / m. Only the width uses r.

    Args:
        groups: the cells of each group; every cell has at least one sample.
        weights: one for each group.
        value: the contrast of the observed rates.

    Returns:
        Bounds within those that rates in 0..1 allow.
    """
    below = above = least = most = 0.0
    for cells, weight in zip(groups, weights, strict=True):
        downwards, upwards = _distances(cells)
        below += (weight * (downwards if weight > 0 else upwards)) ** 2
        above += (weight * (upwards if weight > 0 else downwards)) ** 2
        least, most = least + min(weight, 0.0), most + max(weight, 0.0)
    return Estimate(value, max(least, value - math.sqrt(below)), min(most, value + math.sqrt(above)))


def mean_estimate(estimates: Sequence[Estimate]) -> Estimate:
    """Mean of independent estimates, its interval by squaring and adding their distances as in `contrast_interval`."""
    value = math.fsum(one.value for one in estimates) / len(estimates)
    below = math.hypot(*(one.value - one.low for one in estimates)) / len(estimates)
    above = math.hypot(*(one.high - one.value for one in estimates)) / len(estimates)
    return Estimate(value, value - below, value + above)


def _distances(cells: Sequence[Cell]) -> tuple[float, float]:
    """How far the ends of the interval of the mean rate lie below and above it."""
    if len(cells) == 1:
        successes, samples = cells[0]
        low, high = wilson_interval(successes, samples)
        return successes / samples - low, high - successes / samples
    share = SHARED_PSEUDO_COUNT / len(cells)
    rates = [((successes + share) / (samples + 2 * share), samples) for successes, samples in cells]
    # one sample alone says nothing of its variance; it counts as two would
    variance = math.fsum(rate * (1 - rate) / max(samples - 1, 1) for rate, samples in rates) / len(cells) ** 2
    return Z_95_PERCENT * math.sqrt(variance), Z_95_PERCENT * math.sqrt(variance)
