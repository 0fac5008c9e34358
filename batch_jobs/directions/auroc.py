"""AUROC of projections on one direction or on many at once, and its score interval.

Shape suffixes: N texts, K directions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.stats import norm, rankdata

Projections = npt.NDArray[np.floating[Any]]

_Z = float(norm.ppf(0.975))
_NEAR_ONE = 1.0 - 1e-9
"""Where the search for the lower end begins at an AUROC of 1, which itself solves the equation of the interval."""


@dataclass(frozen=True)
class AurocEstimate:
    """An AUROC, 0..1, with the ends of its 95 % score interval."""

    auroc: float
    low: float
    high: float


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


def auroc_interval(auroc: float, positives: int, negatives: int) -> tuple[float, float]:
    """95 % score interval of an AUROC.

    The ends are the values θ that lie z = 1.96 of their own standard errors from the observed AUROC. The variance is
    Hanley and McNeil's for exponential scores, with both class sizes in its numerator replaced by their mean. The
    interval keeps a width where the classes do not overlap: 0.865 to 1 for an AUROC of 1 with 15 texts a side.

    Source: Newcombe, Statistics in Medicine 25 (2006) 559, method 5.

    Args:
        auroc: the observed AUROC, 0..1.
        positives: number of positive texts, >= 1.
        negatives: number of negative texts, >= 1.
    """
    # the variance is symmetric about 0.5
    return _lower_end(auroc, positives, negatives), 1.0 - _lower_end(1.0 - auroc, positives, negatives)


def estimate_auroc(positive_N: Projections, negative_N: Projections) -> AurocEstimate:
    """The AUROC of (N,) scores of both classes, with its interval."""
    observed = float(auroc(positive_N, negative_N))
    return AurocEstimate(observed, *auroc_interval(observed, len(positive_N), len(negative_N)))


def _lower_end(observed: float, positives: int, negatives: int) -> float:
    def excess(theta: float) -> float:
        size = (positives + negatives) / 2 - 1
        spread = 1 + size * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        variance = theta * (1 - theta) * spread / (positives * negatives)
        return (observed - theta) ** 2 - _Z**2 * variance

    if observed <= 0.0:
        return 0.0
    return float(brentq(excess, 0.0, min(observed, _NEAR_ONE), xtol=1e-10))
