"""AUROC of projections on one direction or on many at once, and its bootstrap interval.

Shape suffixes: N texts, K directions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

Projections = npt.NDArray[np.floating[Any]]


def auroc(empathic_NK: Projections, non_empathic_NK: Projections) -> npt.NDArray[np.float64]:
    """Chance that a random empathic text projects higher than a random non-empathic one; ties count one half.

    Source: the Mann-Whitney U statistic divided by the number of text pairs, which equals the area under the ROC curve.

    Args:
        empathic_NK: (N,) or (N, K) projections of the empathic texts, N >= 1.
        non_empathic_NK: the same for the non-empathic texts; their N may differ.

    Returns:
        (K,) float64 in 0..1; a 0-d array for (N,) projections.
    """
    positives, negatives = len(empathic_NK), len(non_empathic_NK)
    # midranks: tied texts share their mean rank, so a tie counts one half
    ranks = rankdata(np.concatenate([empathic_NK, non_empathic_NK]), axis=0)
    won = ranks[:positives].sum(axis=0) - positives * (positives + 1) / 2
    return np.asarray(won / (positives * negatives))


def auroc_interval(
    empathic_N: Projections, non_empathic_N: Projections, *, resamples: int, seed: int
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the AUROC.

    Both classes, (N,) projections each, are resampled with replacement, each at its own size. The same `seed` and class
    sizes draw the same texts, so the intervals of two layers use the same resamples. Where the classes do not overlap,
    every resample gives 1.0 and the interval has no width: it then says nothing about texts unlike those tested.
    """
    draw = np.random.default_rng(seed)
    low, high = np.percentile(
        auroc(
            empathic_N[draw.integers(len(empathic_N), size=(len(empathic_N), resamples))],
            non_empathic_N[draw.integers(len(non_empathic_N), size=(len(non_empathic_N), resamples))],
        ),
        [2.5, 97.5],
    )
    return float(low), float(high)
