"""Several ways of doing the same work, each in turn, and how they compare.

A machine's speed drifts, and neighbours take their share. So every round does all ways one after the other, each time
beginning with another way and every second time in the opposite order, and ways are compared within a round only. What
is quoted is the median over the rounds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

Measured = TypeVar("Measured")
Round = dict[str, float]
"""What each way measured in one round."""


@dataclass(frozen=True)
class Figure:
    """One way over all rounds, beside the way that it is compared with.

    Attributes:
        median: of what was measured, in its own unit.
        ratio: median over the rounds of measured / measured of the other way in the same round.
        ratio_low, ratio_high: lowest and highest of these.
        ratios: all of them, in the order of the rounds; or one for each start (see ``figures_of_starts``).
    """

    median: float
    ratio: float
    ratio_low: float
    ratio_high: float
    ratios: list[float]


def in_turn(ways: Mapping[str, Callable[[], Measured]], num_rounds: int) -> list[dict[str, Measured]]:
    """Measure all ways, `num_rounds` times. Warm up before: the first round counts."""
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
    """``figures``, where the processes that were measured were started anew before each of these series of rounds.

    One process can be slower than the next one of its kind from its start to its end, so behind several starts each
    counts as one pair: ``ratios`` are the medians over the rounds of each.
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
    """Where the median of `ratios` lies with 95 % confidence, by 10,000 bootstrap samples; the same at every call."""
    samples = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    low, high = np.percentile(np.median(samples, axis=1), (2.5, 97.5))
    return float(low), float(high)
