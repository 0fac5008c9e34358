"""Power of a grid: the chance to see a given rise of the outcome's rate, in one condition and in the trend over α.

Both are exact: every possible set of counts is weighed by its probability, but for a trend over very many samples. A
condition is compared with the unsteered samples by Boschloo's exact test, the trend by the exact permutation test of
Spearman's ρ over single samples, both one-sided, in the direction of the rise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import binom, hypergeom, norm

from batch_jobs.errors import StudyError

LEVEL = 0.05
LOW, HIGH = 0.3, 0.7
"""Rates at the two ends of the rise, by default."""
MOST_SAMPLES = 100
"""Most samples of a condition whose power is computed; from there on a condition shows such a rise almost surely."""
MOST_CELLS = 400_000
"""Most pairs of (number of successes, rank sum) that the trend's exact distribution is computed over; larger grids are
computed with the normal approximation of the rank sum."""
_NUISANCE_RATES = np.linspace(0.0, 1.0, 401)[1:-1]
"""Common rates over which Boschloo's p is the largest. Its maximum lies between two of them with an error far below
what a power is read to."""
_ROUNDING = 1e-9

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Power:
    """Power of a design at one significance level, each a probability in 0..1."""

    samples: int
    alphas: int
    """Levels of α, 0 included."""
    low: float
    high: float
    level: float
    condition: float
    """One condition at `high` against unsteered samples at `low`: the whole rise between the two."""
    condition_in_trend: float
    """The highest α against the unsteered samples where the rate rises as for `trend`, so that the unsteered rate lies
    within the rise."""
    trend: float
    """The trend over α in one group, as the rate rises evenly from `low` at the lowest α to `high` at the highest."""
    comparisons: int
    """Conditions of all groups; `groups` is the number of trends."""
    groups: int
    condition_corrected: float
    """As `condition` at `level` over `comparisons`: what the smallest of all p must pass by Holm's rule."""
    trend_corrected: float
    """As `trend` at `level` over `groups`."""


def design_power(
    samples: int,
    alphas: int,
    groups: int = 1,
    *,
    below_zero: int | None = None,
    low: float = LOW,
    high: float = HIGH,
    level: float = LEVEL,
) -> Power:
    """Power of a grid of `alphas` levels of α (0 included) and `samples` samples each, in `groups` groups.

    A group is a scenario at one layer along one direction: it has one trend, and a condition for each α but 0.
    `below_zero`: levels below 0; None stands for half of those that are not 0.

    Raises:
        StudyError: a number is out of its range.
    """
    if samples < 1 or alphas < 2 or groups < 1:
        raise StudyError(
            f"samples is {samples}, the levels of α are {alphas}, the groups {groups}; allowed: at least 1, 2 and 1."
        )
    if not (0.0 <= low < high <= 1.0 and 0.0 < level < 1.0):
        raise StudyError(
            f"the rise is from {low:g} to {high:g} and the level {level:g}; allowed: rates with 0 <= from < to <= 1 "
            "and a level between 0 and 1."
        )
    rates = np.linspace(low, high, alphas)
    unsteered = float(rates[(alphas - 1) // 2 if below_zero is None else below_zero])
    comparisons = groups * (alphas - 1)
    return Power(
        samples=samples,
        alphas=alphas,
        low=low,
        high=high,
        level=level,
        condition=condition_power(samples, low, high, level),
        condition_in_trend=condition_power(samples, unsteered, high, level),
        trend=trend_power(samples, rates, level),
        comparisons=comparisons,
        groups=groups,
        condition_corrected=condition_power(samples, low, high, level / comparisons),
        trend_corrected=trend_power(samples, rates, level / groups),
    )


def condition_power(samples: int, low: float, high: float, level: float) -> float:
    """Chance that Boschloo's one-sided exact test of `samples` at rate `high` against as many at `low` has p <= level.

    More than 100 samples are taken as 100, which understates the power.
    """
    samples = min(samples, MOST_SAMPLES)
    rejected = boschloo_p(samples) <= level * (1 + _ROUNDING)
    counts = np.arange(samples + 1)
    chances = np.outer(binom.pmf(counts, samples, high), binom.pmf(counts, samples, low))
    return float(chances[rejected].sum())


def boschloo_p(samples: int) -> Floats:
    """Boschloo's one-sided p of every 2×2 table of two groups of `samples`.

    Returns:
        (samples + 1, samples + 1): p of row many successes in the group expected to have more, column many in the
        other. It is the largest chance, over the common rate, of a table whose Fisher p is at most that of this one.
    """
    counts = np.arange(samples + 1)
    fisher = hypergeom.sf(counts[:, None] - 1, 2 * samples, counts[:, None] + counts[None, :], samples).reshape(-1)
    fisher = np.minimum(np.nan_to_num(fisher, nan=1.0), 1.0)
    order = np.argsort(fisher, kind="stable")
    # equal up to rounding: the same table mirrored has the same Fisher p
    ends = np.searchsorted(fisher[order], fisher[order] * (1 + _ROUNDING), side="right") - 1
    largest = np.zeros(fisher.size)
    for rate in _NUISANCE_RATES:
        each = binom.pmf(counts, samples, rate)
        np.maximum(largest, np.outer(each, each).reshape(-1)[order].cumsum()[ends], out=largest)
    p = np.empty(fisher.size)
    p[order] = np.minimum(largest, 1.0)
    return p.reshape(samples + 1, samples + 1)


def trend_power(samples: int, rates: Floats, level: float) -> float:
    """Chance that the one-sided exact permutation test of the trend has p <= level, for these rates at ascending α.

    The statistic is the rank sum of the successes, which orders outcomes as Spearman's ρ of α and outcome does. Beyond
    `MOST_CELLS` its distributions are taken as normal.
    """
    levels = len(rates)
    total, ranks = samples * levels, samples * levels * (levels - 1) // 2
    if (total + 1) * (ranks + 1) > MOST_CELLS:
        return _normal_trend_power(samples, rates, level)
    counts = np.arange(samples + 1)
    # at one common rate the chances given the total are those of the permutations, whatever the rate
    null = _rank_sums([binom.pmf(counts, samples, 0.5)] * levels, samples)
    chances = _rank_sums([binom.pmf(counts, samples, rate) for rate in rates], samples)
    p = null[:, ::-1].cumsum(axis=1)[:, ::-1] / null.sum(axis=1, keepdims=True)
    return float(chances[p <= level * (1 + _ROUNDING)].sum())


def _rank_sums(chances: list[Floats], samples: int) -> Floats:
    """(total + 1, largest rank sum + 1): the joint distribution of all successes and of their rank sum, each success of
    the level at place k counting k; `chances[k]` are those of 0 .. `samples` successes there."""
    levels = len(chances)
    joint = np.zeros((samples * levels + 1, samples * levels * (levels - 1) // 2 + 1))
    joint[0, 0] = 1.0
    for place, level in enumerate(chances):
        following = np.zeros_like(joint)
        for count, chance in enumerate(level):
            shift = count * place
            following[count:, shift:] += chance * joint[: joint.shape[0] - count, : joint.shape[1] - shift]
        joint = following
    return joint


def _normal_trend_power(samples: int, rates: Floats, level: float) -> float:
    places = np.arange(len(rates)) - (len(rates) - 1) / 2
    pooled = rates.mean()
    spread_without = np.sqrt(samples * pooled * (1 - pooled) * (places**2).sum())
    spread = np.sqrt(samples * (rates * (1 - rates) * places**2).sum())
    shift = samples * (rates * places).sum()
    if spread == 0.0:  # every outcome is certain
        return float(shift > norm.isf(level) * spread_without)
    return float(norm.cdf((shift - norm.isf(level) * spread_without) / spread))
