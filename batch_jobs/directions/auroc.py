"""AUROC of projections on one direction or on many at once, and its bootstrap interval.

Shape suffixes: N texts, K directions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

Projections = npt.NDArray[np.floating[Any]]


def auroc(positive_NK: Projections, negative_NK: Projections) -> npt.NDArray[np.float64]:
    """Chance that a random positive text projects higher than a random negative one; ties count one half.

    Source: the Mann-Whitney U statistic divided by the number of text pairs, which equals the area under the ROC curve.

    Args:
        positive_NK: (N,) or (N, K) projections of the positive texts, N >= 1.
        negative_NK: the same for the negative texts; their N may differ.

    Returns:
        (K,) float64 in 0..1; a 0-d array for (N,) projections.
    """
    positives, negatives = len(positive_NK), len(negative_NK)
    # midranks: tied texts share their mean rank, so a tie counts one half
    ranks = rankdata(np.concatenate([positive_NK, negative_NK]), axis=0)
    won = ranks[:positives].sum(axis=0) - positives * (positives + 1) / 2
    return np.asarray(won / (positives * negatives))


def auroc_interval(
    positive_N: Projections, negative_N: Projections, *, resamples: int, seed: int
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the AUROC.

    Both classes, (N,) projections each, are resampled with replacement, each at its own size. The same `seed` and class
    sizes draw the same texts, so the intervals of two layers use the same resamples. Where the classes do not overlap,
    every resample gives 1.0 and the interval has no width: it then says nothing about texts unlike those tested.
    """
    draw = np.random.default_rng(seed)
    low, high = np.percentile(
        auroc(
            positive_N[draw.integers(len(positive_N), size=(len(positive_N), resamples))],
            negative_N[draw.integers(len(negative_N), size=(len(negative_N), resamples))],
        ),
        [2.5, 97.5],
    )
    return float(low), float(high)
