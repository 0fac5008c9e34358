"""AUROC of projections, for one direction or many at once, and its bootstrap interval.

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

    Projections of the two classes, (N,) or (N, K); the two N may differ, each >= 1. Returns one value in 0..1 for
    each of the K columns, a 0-d array for (N,). Source: the Mann-Whitney rank sum over the number of text pairs, which
    equals the area under the ROC curve.
    """
    positives, negatives = len(empathic_NK), len(non_empathic_NK)
    # midranks: tied texts share their mean rank, which is what counts a tie as one half
    ranks = rankdata(np.concatenate([empathic_NK, non_empathic_NK]), axis=0)
    won = ranks[:positives].sum(axis=0) - positives * (positives + 1) / 2
    return np.asarray(won / (positives * negatives))


def auroc_interval(
    empathic_N: Projections, non_empathic_N: Projections, *, resamples: int, seed: int
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the AUROC: both classes drawn with replacement, each at its own size.

    The same `seed` and class sizes draw the same texts, so intervals of two layers answer to the same resamples. Where
    the classes do not overlap every resample gives 1.0, and the interval has no width: it then says nothing about
    texts unlike those tested.
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
