"""Agreement of raters who gave grades to the same rows: Cohen's κ of two, Krippendorff's α of any number.

Both are 1 for full agreement and 0 for that of raters who grade at random with the same frequencies of the grades. The
intervals are percentile bootstraps over rows: they hold for rows that are drawn independently, and are too narrow
where many rows share a prompt. A resample in which a coefficient is undefined is left out.

Sources: Cohen, "A coefficient of agreement for nominal scales" (1960) and "Weighted kappa" (1968); Krippendorff,
"Computing Krippendorff's alpha-reliability" (2011).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from sklearn.metrics import cohen_kappa_score

RESAMPLES = 2000
CONFIDENCE = 0.95

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Level = Literal["nominal", "ordinal"]


@dataclass(frozen=True)
class Estimate:
    """A coefficient with its interval. None where it is undefined: everybody gave the same grade to every row."""

    value: float | None
    low: float | None
    high: float | None


def cohen_kappa(
    first: npt.ArrayLike,
    second: npt.ArrayLike,
    *,
    grades: int,
    weights: Literal["quadratic"] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Cohen's κ of two raters.

    Args:
        first: grades of one rater, (N,), in 0 .. grades - 1.
        second: the other rater's grades of the same rows.
        grades: number of grades of the scale, whether or not all were given; the weights depend on it.
        weights: None counts every difference alike; "quadratic" by the square of its size.
        resamples: bootstrap resamples.
        seed: draws them.
    """
    labels = np.arange(grades)
    one, other = np.asarray(first, dtype=np.int64), np.asarray(second, dtype=np.int64)
    if not len(one) or len({*one.tolist(), *other.tolist()}) == 1:
        return Estimate(None, None, None)
    distance = (labels[:, None] - labels[None, :]).astype(np.float64) ** 2
    distance = distance if weights == "quadratic" else (distance > 0).astype(np.float64)
    # resampling rows draws the cells of the table of both grades from a multinomial distribution
    cells = np.bincount(one * grades + other, minlength=grades * grades)
    tables = _resample(cells, resamples, seed).reshape(-1, grades, grades)
    value = float(cohen_kappa_score(one, other, labels=labels, weights=weights))
    return _estimate(value, _kappas(tables, distance))


def krippendorff_alpha(counts: npt.ArrayLike, level: Level, *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Krippendorff's α of any number of raters, each of whom may have left out rows.

    Args:
        counts: number of raters who gave each grade to each row, (N, G), grades in ascending order. Rows with fewer
            than two grades do not count.
        level: whether differences of grades count alike, or by the number of ratings between them.
        resamples: bootstrap resamples.
        seed: draws them.
    """
    table = np.asarray(counts, dtype=np.int64)
    table = table[table.sum(axis=1) >= 2]
    if not len(table):
        return Estimate(None, None, None)
    # rows with the same counts are alike: a resample is how often it holds each kind of row
    kinds, frequency = np.unique(table, axis=0, return_counts=True)
    pairs = kinds[:, :, None] * kinds[:, None, :] - np.einsum("pg,gh->pgh", kinds, np.eye(kinds.shape[1], dtype=int))
    coincidences = pairs / (kinds.sum(axis=1) - 1)[:, None, None]
    value = _alphas(np.einsum("bp,pgh->bgh", frequency[None].astype(np.float64), coincidences), level)[0]
    if np.isnan(value):
        return Estimate(None, None, None)
    drawn = _resample(frequency, resamples, seed)
    return _estimate(float(value), _alphas(np.einsum("bp,pgh->bgh", drawn, coincidences), level))


def _resample(frequency: Integers, resamples: int, seed: int) -> Floats:
    """Bootstrap resamples of rows of P kinds, of which there are `frequency` (P,), as frequencies (B, P)."""
    total = int(frequency.sum())
    return np.random.default_rng(seed).multinomial(total, frequency / total, size=resamples).astype(np.float64)


def _kappas(tables: Floats, distance: Floats) -> Floats:
    """κ of each table of counts (B, G, G); NaN where it is undefined."""
    totals = tables.sum(axis=(1, 2))
    expected = tables.sum(axis=2)[:, :, None] * tables.sum(axis=1)[:, None, :] / totals[:, None, None]
    return _one_minus_ratio((tables * distance).sum(axis=(1, 2)), (expected * distance).sum(axis=(1, 2)))


def _alphas(coincidences: Floats, level: Level) -> Floats:
    """α of each matrix of coincidences (B, G, G); NaN where it is undefined."""
    ratings = coincidences.sum(axis=2)
    distance = _DISTANCES[level](ratings)
    expected = ratings[:, :, None] * ratings[:, None, :] / (ratings.sum(axis=1) - 1)[:, None, None]
    return _one_minus_ratio((coincidences * distance).sum(axis=(1, 2)), (expected * distance).sum(axis=(1, 2)))


def _nominal(ratings: Floats) -> Floats:
    return np.broadcast_to(1.0 - np.eye(ratings.shape[1]), (*ratings.shape, ratings.shape[1]))


def _ordinal(ratings: Floats) -> Floats:
    """Squared number of ratings between two grades, those with the two grades themselves counted half."""
    middle = np.cumsum(ratings, axis=1) - ratings / 2
    return np.asarray((middle[:, :, None] - middle[:, None, :]) ** 2)


_DISTANCES: dict[Level, Callable[[Floats], Floats]] = {"nominal": _nominal, "ordinal": _ordinal}


def _one_minus_ratio(observed: Floats, expected: Floats) -> Floats:
    undefined = expected <= 0
    return np.where(undefined, np.nan, 1.0 - observed / np.where(undefined, 1.0, expected))


def _estimate(value: float, resampled: Floats) -> Estimate:
    defined = resampled[np.isfinite(resampled)]
    if not len(defined):
        return Estimate(value, None, None)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    return Estimate(value, float(low), float(high))
