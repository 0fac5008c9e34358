"""How well the outcome of a sample tells the α it was made with: the AUC of α."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

from batch_jobs.statistics.rates import Cell, Estimate

DRAWS: Final = 9999
"""Resamples of an interval."""
_SEED: Final = 20251116  # any constant: the same counts must give the same interval in every run

Floats = npt.NDArray[np.float64]


def alpha_auc(cells: Mapping[float, Cell], *, draws: int = DRAWS) -> Estimate | None:
    """P(α of a sample with the outcome > α of one without), ties one half, with a 95 % interval.

    0.5 means that the outcome does not depend on the order of the α. A perfect step (no sample with the outcome up to
    some α, all of them above it) gives 1, which Spearman's ρ of a 0/1 series cannot reach.

    The interval is a percentile bootstrap within each α: a cell of n samples draws n - 1, which makes its variance
    unbiased (Rao and Wu 1988), from (k + a) / (n + 2a), where the C cells share one half (a = 1 / (2C)), so that cells
    of 0 or 1 have width too.

    Args:
        cells: α -> successes and samples (>= 1), α = 0 included.
        draws: resamples of the interval; fewer for simulations.

    Returns:
        None where nothing varies: a single α, or equal outcomes.
    """
    ordered = tuple(cells[alpha] for alpha in sorted(cells))
    total = sum(successes for successes, _ in ordered)
    if len(ordered) < 2 or total in (0, sum(samples for _, samples in ordered)):
        return None
    return _estimate(ordered, draws)


@lru_cache(maxsize=4096)
def _estimate(cells: tuple[Cell, ...], draws: int) -> Estimate:
    hits, sizes = np.array(cells, dtype=np.float64).T
    (value,) = _auc(hits[None], sizes)
    share = 0.5 / len(cells)
    tries = np.maximum(sizes - 1, 1).astype(np.int64)
    drawn = np.random.default_rng(_SEED).binomial(tries, (hits + share) / (sizes + 2 * share), (draws, len(cells)))
    low, high = np.nanquantile(_auc(drawn / tries * sizes, sizes), (0.025, 0.975))
    return Estimate(float(value), float(min(low, value)), float(max(high, value)))


def _auc(hits: Floats, sizes: Floats) -> Floats:
    """(N,) AUC of N sets of cells in ascending α. `hits`: (N, C) successes; `sizes`: (C,). NaN where nothing varies."""
    misses = sizes - hits
    below = np.cumsum(misses, axis=1) - misses / 2
    pairs = hits.sum(axis=1) * misses.sum(axis=1)
    found = np.full(len(hits), np.nan)
    np.divide((hits * below).sum(axis=1), pairs, out=found, where=pairs > 0)
    return found
