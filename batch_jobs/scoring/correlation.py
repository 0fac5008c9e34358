"""Correlate the projections of texts with behaviour grades, and detect grade 2 against grade 0 from the projection.

Grades are 0 (non-empathic), 1, 2 (empathic), as in the paper's section on behavioural correlation. Its grade 1 is
"moderate"; by keywords it is no evidence, a text with as many empathy words as task words, mostly none of both. Needs
numpy, scipy and scikit-learn only.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from batch_jobs.directions.auroc import auroc
from vllm_steer.errors import SteerError

Floats = npt.NDArray[np.float64]

NON_EMPATHIC, BETWEEN, EMPATHIC = GRADES = (0, 1, 2)


class CorrelationError(SteerError):
    """Projections and grades do not fit together; the message says which and why."""


@dataclass(frozen=True)
class Correlation:
    """Pearson's r and Spearman's ρ over n points, each with its two-sided p."""

    n: int
    pearson_r: float | None
    pearson_p: float | None
    """From the exact distribution of r under bivariate normality, as in scipy's `pearsonr`."""
    spearman_rho: float | None
    spearman_p: float | None
    """From the t approximation, as in scipy's `spearmanr`; rough below about ten points."""
    undefined: str | None
    """Why the four values are None; None when they are numbers."""


@dataclass(frozen=True)
class Detection:
    """Detection of grade 2 (positive) against grade 0 from the projection alone. Grade 1 is left out."""

    n: int
    threshold: float | None
    """Midpoint of the two class means, in units of the residual stream. A projection at or above it counts as empathic.
    It is fitted on the evaluated points, so the metrics that use it are optimistic. `auroc` needs no threshold."""
    accuracy: float | None
    precision: float | None
    recall: float | None
    f1: float | None
    specificity: float | None
    auroc: float | None
    tp: int
    fp: int
    tn: int
    fn: int
    undefined: str | None
    """Why the numbers are None and the four counts are 0; None when detection is defined."""


@dataclass(frozen=True)
class BehaviouralCorrelation:
    """Correlation and detection of the same points."""

    correlation: Correlation
    """Over all grades."""
    detection: Detection


def behavioural_correlation(projections: npt.ArrayLike, grades: npt.ArrayLike) -> BehaviouralCorrelation:
    """Correlate projections with grades, and detect grade 2 against grade 0 from the projection.

    Method: paper, section on behavioural correlation. Its binary numbers use 10 of its 12 points, without those of
    grade 1.

    Args:
        projections: (N,) finite, in units of the residual stream.
        grades: (N,) of 0, 1, 2.

    Raises:
        CorrelationError: the shapes differ, a projection is not finite, or there is another grade.
    """
    projections, grades = _paired(projections, grades)
    if stray := sorted(set(grades.tolist()) - set(GRADES)):
        raise CorrelationError(f"Got the grades {stray[:5]}; allowed: {', '.join(map(str, GRADES))}.")
    return BehaviouralCorrelation(correlate(projections, grades), _detect(projections, grades))


def condition_correlation(
    projections: npt.ArrayLike, grades: npt.ArrayLike, conditions: Sequence[Hashable]
) -> Correlation:
    """Correlate mean projection with mean grade, one point per condition.

    Samples of one condition share prompt and α. Counting them as independent points would overstate n.

    Args:
        projections: (N,) finite, in units of the residual stream.
        grades: (N,) finite.
        conditions: (N,) keys, equal for samples of one condition.

    Raises:
        CorrelationError: the lengths differ, or a value is not finite.
    """
    projections, grades = _paired(projections, grades)
    if len(conditions) != len(projections):
        raise CorrelationError(f"Got {len(conditions)} conditions for {len(projections)} points; give one per point.")
    number = {key: index for index, key in enumerate(dict.fromkeys(conditions))}
    condition_of_point = np.array([number[key] for key in conditions], dtype=np.intp)
    counts = np.bincount(condition_of_point, minlength=len(number))
    means = [np.bincount(condition_of_point, values, len(number)) / counts for values in (projections, grades)]
    return correlate(means[0], means[1])


def correlate(first: npt.ArrayLike, second: npt.ArrayLike) -> Correlation:
    """Pearson's r and Spearman's ρ of two (N,) finite series. Undefined for N < 3 or a constant series.

    Raises:
        CorrelationError: the shapes differ, or a value is not finite.
    """
    first, second = _paired(first, second)
    reason = None
    if len(first) < 3:
        reason = f"{len(first)} points; a correlation needs 3"
    elif _constant(first) or _constant(second):
        reason = f"all {len(first)} values of one side are the same"
    if reason is not None:
        return Correlation(len(first), None, None, None, None, reason)
    pearson, spearman = stats.pearsonr(first, second), stats.spearmanr(first, second)
    return Correlation(
        n=len(first),
        pearson_r=float(pearson.statistic),
        pearson_p=float(pearson.pvalue),
        spearman_rho=float(spearman.statistic),
        spearman_p=float(spearman.pvalue),
        undefined=None,
    )


def _detect(projections: Floats, grades: Floats) -> Detection:
    extreme = grades != BETWEEN
    scores, empathic = projections[extreme], grades[extreme] == EMPATHIC
    reason = None
    if not empathic.any() or empathic.all():
        counts = f"{int(empathic.sum())} of grade {EMPATHIC}, {int((~empathic).sum())} of grade {NON_EMPATHIC}"
        reason = f"detection needs both classes and has {counts}"
    elif _constant(scores):
        reason = f"all {len(scores)} projections are the same"
    if reason is not None:
        return Detection(len(scores), None, None, None, None, None, None, None, 0, 0, 0, 0, reason)
    threshold = float(scores[empathic].mean() + scores[~empathic].mean()) / 2
    read_as_empathic = scores >= threshold
    tn, fp, fn, tp = (int(count) for count in confusion_matrix(empathic, read_as_empathic).ravel())
    # the largest projection always reaches the threshold, so precision never divides by zero
    precision, recall, f1, _ = precision_recall_fscore_support(
        empathic, read_as_empathic, average="binary", zero_division=np.nan
    )
    return Detection(
        n=len(scores),
        threshold=threshold,
        accuracy=(tp + tn) / len(scores),
        precision=float(precision),
        recall=float(recall),
        f1=float(f1),
        specificity=tn / (tn + fp),
        auroc=float(auroc(scores[empathic], scores[~empathic])),
        tp=tp,
        fp=fp,
        tn=tn,
        fn=fn,
        undefined=None,
    )


def _constant(values: Floats) -> bool:
    # relative tolerance: float noise around one value is a constant too, and scipy would warn about it
    return float(np.ptp(values)) <= 1e-12 * float(np.abs(values).max())


def _paired(first: Any, second: Any) -> tuple[Floats, Floats]:
    first, second = (np.asarray(values, dtype=np.float64) for values in (first, second))
    if first.ndim != 1 or first.shape != second.shape:
        raise CorrelationError(f"Got series of shapes {first.shape} and {second.shape}; both must be (N,), N the same.")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise CorrelationError("One of the series holds NaN or infinity; leave those points out.")
    return first, second
