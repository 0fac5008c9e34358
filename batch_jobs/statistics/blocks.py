"""Outcomes by block, and what one setting does over all its blocks.

A block is one (scenario, seed): the same prompt and the same random numbers at every α, so its samples differ in α
alone. Blocks are independent of each other; the scenarios are fixed strata.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy import stats

from batch_jobs.statistics.rates import Cell

PERMUTATIONS: Final = 9999
MOST_SHUFFLED_BLOCKS: Final = 100
"""With more blocks the p comes from the normal distribution with the permutations' exact mean and variance."""
_SEED: Final = 20251116  # any constant: the same outcomes must give the same p in every run

Block = tuple[str, int]
"""Scenario and seed."""
Outcomes = Mapping[Block, Mapping[float, Cell]]
"""Block -> α -> successes and samples (>= 1)."""
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class BlockMean:
    """The mean of one number per block, with a 95 % interval and a permutation p."""

    blocks: int
    value: float
    low: float | None
    """None where the interval has no width to go by: all blocks of every scenario agree, or none has two blocks."""
    high: float | None
    p: float
    """Two-sided."""


def grid_slope(outcomes: Outcomes, *, permutations: int = PERMUTATIONS) -> BlockMean | None:
    """How much the rate rises from the lowest α to the highest: the mean over blocks of the block's own slope.

    A block's slope is least squares of its outcomes (0 or 1) on the place of α in the grid, scaled to 0 (lowest) ..
    1 (highest), so it is the fitted change of the rate over the whole grid. The p permutes the outcomes within each
    block; it needs no model of the rates and holds any differences between scenarios and seeds fixed.

    Args:
        outcomes: of one setting, α = 0 included.
        permutations: shuffles for `p`; fewer for simulations.

    Returns:
        None where no block has two α.
    """
    alphas = sorted({alpha for block in outcomes.values() for alpha in block})
    place = {alpha: index / max(len(alphas) - 1, 1) for index, alpha in enumerate(alphas)}
    slopes, strata, blocks = [], [], []
    for (scenario, _), cells in sorted(outcomes.items()):
        if len(cells) < 2:
            continue
        sizes = np.array([samples for _, samples in cells.values()], dtype=np.int64)
        hits = np.array([successes for successes, _ in cells.values()], dtype=np.int64)
        places = np.array([place[alpha] for alpha in cells])
        centred = places - places @ sizes / sizes.sum()
        coefficients = centred / (centred**2 @ sizes)
        varies = 0 < hits.sum() < sizes.sum()
        slopes.append(float(hits @ coefficients) if varies else 0.0)  # exactly 0: the sum would leave float dust
        strata.append(scenario)
        blocks.append((hits, sizes, coefficients))
    if not slopes:
        return None
    value = math.fsum(slopes) / len(slopes)
    low, high = stratified_t_interval(np.array(slopes), strata)
    return BlockMean(len(slopes), value, low, high, _slope_p(blocks, value, permutations))


def stratified_t_interval(values: Floats, strata: Sequence[str]) -> tuple[float | None, float | None]:
    """95 % interval of the mean of (B,) independent values with fixed strata, by Student's t.

    The variance is that within strata, pooled as Σ b² · s² / b over strata of b values, with Σ (b - 1) degrees of
    freedom. Strata of one value have no variance of their own and take the mean of the others'. None, None where no
    stratum has two values or nothing varies.
    """
    groups = [values[[one == stratum for one in strata]] for stratum in dict.fromkeys(strata)]
    variances = [float(group.var(ddof=1)) if len(group) > 1 else None for group in groups]
    known = [variance for variance in variances if variance is not None]
    if not known or max(known) <= 1e-24:
        return None, None
    usual = math.fsum(known) / len(known)
    total = math.fsum(
        len(group) * (usual if variance is None else variance)
        for group, variance in zip(groups, variances, strict=True)
    )
    freedom = sum(len(group) - 1 for group in groups)
    half = float(stats.t.ppf(0.975, freedom)) * math.sqrt(total) / len(values)
    mean = math.fsum(values) / len(values)
    return mean - half, mean + half


def _slope_p(blocks: Sequence[tuple[Integers, Integers, Floats]], value: float, permutations: int) -> float:
    observed = abs(value) * len(blocks)
    if len(blocks) > MOST_SHUFFLED_BLOCKS:
        variance = math.fsum(_permuted_variance(*block) for block in blocks)
        return 1.0 if variance == 0.0 else float(2 * stats.norm.sf(observed / math.sqrt(variance)))
    random = np.random.default_rng(_SEED)
    total = np.zeros(permutations)
    for hits, sizes, coefficients in blocks:
        # outcomes shuffled over the samples of a block: their counts by α are multivariate hypergeometric
        drawn = random.multivariate_hypergeometric(sizes, int(hits.sum()), permutations, method="marginals")
        total += drawn @ coefficients
    # the same sum in another order differs in its last bits and still counts as equal
    as_large = int((np.abs(total) >= observed - 1e-9).sum())
    return (1 + as_large) / (1 + permutations)


def _permuted_variance(hits: Integers, sizes: Integers, coefficients: Floats) -> float:
    """Variance of a block's slope under permutation; its mean is 0, since the coefficients sum to 0 over samples."""
    samples, total = int(sizes.sum()), int(hits.sum())
    rate = total / samples
    return float(coefficients**2 @ sizes) * rate * (1 - rate) * samples / (samples - 1)
