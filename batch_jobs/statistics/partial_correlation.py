"""Correlation of two series within cells: whether they go together where α and scenario are the same."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy import stats

PERMUTATIONS: Final = 9999
MOST_SHUFFLED_POINTS: Final = 2000
"""Above this the permutation p comes from the normal distribution with the permutations' exact mean and variance."""
_SEED: Final = 20251116  # any constant: the same points must give the same p in every run

Floats = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.intp]


@dataclass(frozen=True)
class PartialCorrelation:
    """Pearson's r of what is left of two series after the mean of each cell is taken off."""

    n: int
    """Points in cells of at least two."""
    cells: int
    """Cells of at least two points."""
    r: float | None
    low: float | None
    """95 % interval, with points of one cluster taken as dependent; None where `r` is, or with fewer than three
    clusters."""
    high: float | None
    p: float | None
    """Two-sided p by permutation of the points within each cell."""
    undefined: str | None
    """Why the values are None; None when `r` is a number."""


def partial_correlation(
    first: npt.ArrayLike,
    second: npt.ArrayLike,
    cells: Sequence[Hashable],
    clusters: Sequence[Hashable],
    *,
    permutations: int = PERMUTATIONS,
) -> PartialCorrelation:
    """Correlate two series with the cell held fixed.

    Each series loses its cell means; r is Pearson's of the rest, which equals the partial correlation given indicators
    of the cells. The interval is symmetric on Fisher's z scale with a cluster-robust standard error: the sum over
    clusters of squared influences, times n / (n - cells) · C / (C - 1), and Student's t with C - 1 degrees of freedom.

    Args:
        first: (N,) finite.
        second: (N,) finite.
        cells: (N,) keys, equal for points that share what is held fixed, such as (scenario, α).
        clusters: (N,) keys, equal for points that depend on each other, such as (scenario, seed).
        permutations: shuffles for `p`; fewer for simulations.
    """
    cell_N, size_C = _numbered(cells)
    kept = size_C[cell_N] > 1
    cell_N, size_C = _numbered(cell_N[kept].tolist())
    one_N, two_N = (_centred(np.asarray(series, dtype=np.float64)[kept], cell_N, size_C) for series in (first, second))
    count, groups = len(cell_N), len(size_C)
    reason = None
    if count - groups < 2:
        reason = (
            f"{count} points in {groups} cells of two or more; a partial correlation needs two more points than cells"
        )
    elif not (_varies(one_N, first) and _varies(two_N, second)):
        reason = "one side does not vary within any cell"
    if reason is not None:
        return PartialCorrelation(count, groups, None, None, None, None, reason)
    spread = math.sqrt(float(one_N @ one_N) * float(two_N @ two_N))
    r = max(-1.0, min(1.0, float(one_N @ two_N) / spread))
    cluster_N, size_K = _numbered([key for key, keep in zip(clusters, kept.tolist(), strict=True) if keep])
    low, high = _interval(r, one_N, two_N, cluster_N, len(size_K), groups)
    p = _permutation_p(one_N, two_N, cell_N, size_C, permutations)
    return PartialCorrelation(count, groups, r, low, high, p, None)


def _interval(
    r: float, one_N: Floats, two_N: Floats, cluster_N: Numbers, clusters: int, cells: int
) -> tuple[float | None, float | None]:
    if clusters < 3:
        return None, None
    if abs(r) > 1 - 1e-12:
        return r, r
    count = len(one_N)
    one, two = one_N / math.sqrt(float(one_N @ one_N) / count), two_N / math.sqrt(float(two_N @ two_N) / count)
    # influence of a point on atanh(r); see Devlin, Gnanadesikan and Kettenring 1975 for that on r
    influence = (one * two - r * (one**2 + two**2) / 2) / (1 - r**2)
    sums = np.bincount(cluster_N, influence, clusters)
    variance = float(sums @ sums) / count**2 * (count / (count - cells)) * (clusters / (clusters - 1))
    half = float(stats.t.ppf(0.975, clusters - 1)) * math.sqrt(variance)
    return math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half)


def _permutation_p(one_N: Floats, two_N: Floats, cell_N: Numbers, size_C: Numbers, permutations: int) -> float:
    observed = abs(float(one_N @ two_N))
    if len(one_N) > MOST_SHUFFLED_POINTS:
        squares = (np.bincount(cell_N, series**2, len(size_C)) for series in (one_N, two_N))
        variance = float(np.prod(list(squares), axis=0) @ (1 / (size_C - 1)))
        return float(2 * stats.norm.sf(observed / math.sqrt(variance)))
    random = np.random.default_rng(_SEED)
    order = np.argsort(cell_N, kind="stable")
    one_N, two_N = one_N[order], two_N[order]
    total = np.zeros(permutations)
    for start, size in zip(np.cumsum(size_C) - size_C, size_C, strict=True):
        place = slice(start, start + size)
        shuffled = random.permuted(np.broadcast_to(two_N[place], (permutations, size)), axis=1)
        total += shuffled @ one_N[place]
    # the same sum in another order differs in its last bits and still counts as equal
    as_large = int((np.abs(total) >= observed * (1 - 1e-9)).sum())
    return (1 + as_large) / (1 + permutations)


def _numbered(keys: Sequence[Hashable]) -> tuple[Numbers, Numbers]:
    """(N,) number of each key, in the order of their first appearance, and how often each occurs."""
    number = {key: index for index, key in enumerate(dict.fromkeys(keys))}
    numbers = np.array([number[key] for key in keys], dtype=np.intp)
    return numbers, np.bincount(numbers, minlength=len(number))


def _centred(series_N: Floats, cell_N: Numbers, size_C: Numbers) -> Floats:
    return series_N - (np.bincount(cell_N, series_N, len(size_C)) / size_C)[cell_N]


def _varies(centred_N: Floats, series: npt.ArrayLike) -> bool:
    # relative tolerance: float noise around one value does not vary
    scale = float(np.abs(np.asarray(series, dtype=np.float64)).max())
    return bool(centred_N.size) and float(np.abs(centred_N).max()) > 1e-12 * scale
