"""Measures several ways of doing the same work in turn, and compares them.

A machine's speed drifts, and its other users take their share. Every round therefore runs all ways one after the other,
each time beginning with another way and every second time in the opposite order. Ways are compared only within a round.
The figure to quote is the median over the rounds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

Measured = TypeVar("Measured")
Round = dict[str, float]
"""Way -> its measurement in one round."""


@dataclass(frozen=True)
class Figure:
    """One way over all rounds, compared with a baseline.

    Attributes:
        median: median measurement, in its own unit.
        ratio: median over the rounds of the measurement divided by the baseline's in the same round.
        ratio_low, ratio_high: lowest and highest of these ratios.
        ratios: all of them, in the order of the rounds; or one per start (see ``figures_of_starts``).
    """

    median: float
    ratio: float
    ratio_low: float
    ratio_high: float
    ratios: list[float]


def at_least(bound: float, low: float, high: float) -> str:
    """Whether a ratio is at least `bound`: "held", "missed", or "undecided" if its interval holds the bound."""
    if low >= bound:
        return "held"
    return "missed" if high < bound else "undecided"


def in_turn(ways: Mapping[str, Callable[[], Measured]], num_rounds: int) -> list[dict[str, Measured]]:
    """Measure all ways `num_rounds` times. Warm up before the call, since the first round counts."""
    rounds = []
    for number in range(num_rounds):
        first = number // 2 % len(ways)
        names = [*list(ways)[first:], *list(ways)[:first]]
        rounds.append({name: ways[name]() for name in (names if number % 2 == 0 else reversed(names))})
    return rounds


def figures(rounds: Sequence[Round], baseline: str) -> dict[str, Figure]:
    """A figure for each way, compared with the way `baseline`, whose own ratios are 1."""
    return {name: _figure(rounds, name, baseline) for name in rounds[0]}


def figures_of_starts(starts: Sequence[Sequence[Round]], baseline: str) -> dict[str, Figure]:
    """``figures`` of several series of rounds, with all measured processes restarted before each series.

    A process can be slower than the next one of its kind for its whole life, so each of several starts counts as one
    ratio: ``ratios`` holds, for each start, the median over its rounds.
    """
    if len(starts) == 1:
        return figures(starts[0], baseline)
    each = [figures(rounds, baseline) for rounds in starts]
    by_ratio = figures([{name: one[name].ratio for name in one} for one in each], baseline)
    return {
        name: replace(figure, median=statistics.median(one[name].median for one in each))
        for name, figure in by_ratio.items()
    }


def _figure(rounds: Sequence[Round], name: str, baseline: str) -> Figure:
    ratios = [one[name] / one[baseline] for one in rounds]
    return Figure(
        median=statistics.median(one[name] for one in rounds),
        ratio=statistics.median(ratios),
        ratio_low=min(ratios),
        ratio_high=max(ratios),
        ratios=ratios,
    )


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """The 95 % confidence interval of the median of `ratios`, by 10,000 bootstrap samples; the same at every call."""
    samples = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    low, high = np.percentile(np.median(samples, axis=1), (2.5, 97.5))
    return float(low), float(high)
