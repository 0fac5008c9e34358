"""Does the projection of a text go with how empathically it acts? Correlation with grades, and detection of the
extremes.

Grades are 0 (non-empathic), 1 (moderate), 2 (empathic), as in the paper's section on behavioural correlation. Needs
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

NON_EMPATHIC, MODERATE, EMPATHIC = GRADES = (0, 1, 2)


class CorrelationError(SteerError):
    """Projections and grades that do not fit together; the message says which and why."""


@dataclass(frozen=True)
class Correlation:
    """Pearson's r and Spearman's ρ over n points, each with its two-sided p."""

    n: int
    pearson_r: float | None
    pearson_p: float | None
    """Of the exact distribution of r under bivariate normality, as scipy's `pearsonr` gives it."""
    spearman_rho: float | None
    spearman_p: float | None
    """Of the t approximation, as scipy's `spearmanr` gives it; rough below about ten points."""
    undefined: str | None
    """Why the four are None; None when they are numbers."""


@dataclass(frozen=True)
class Detection:
    """The binary question: grade 2 (positive) against grade 0, from the projection alone. Grade 1 is left out."""

    n: int
    threshold: float | None
    """Midpoint of the two class means, in the units of the residual stream; at or above it reads as empathic. It is
    fitted on the very points it is judged on, so what follows from it is optimistic. `auroc` needs no threshold."""
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
    """Why the numbers are None and the four counts 0; None when they are not."""


@dataclass(frozen=True)
class BehaviouralCorrelation:
    """Both views of the same points."""

    correlation: Correlation
    """Over all grades."""
    detection: Detection


def behavioural_correlation(projections: npt.ArrayLike, grades: npt.ArrayLike) -> BehaviouralCorrelation:
    """Correlate projections with grades, and tell grade 2 from grade 0 by the projection.

    `projections`: (N,) finite, units of the residual stream. `grades`: (N,) of 0, 1, 2. Method: paper, section on
    behavioural correlation (its binary numbers leave the moderate grade out: 10 of its 12 points). Raises
    CorrelationError for shapes that differ, a projection that is not finite, or another grade.
    """
    projections, grades = _paired(projections, grades)
    if stray := sorted(set(grades.tolist()) - set(GRADES)):
        raise CorrelationError(f"Got the grades {stray[:5]}; allowed: {', '.join(map(str, GRADES))}.")
    return BehaviouralCorrelation(correlate(projections, grades), _detect(projections, grades))


def condition_correlation(
    projections: npt.ArrayLike, grades: npt.ArrayLike, conditions: Sequence[Hashable]
) -> Correlation:
    """Correlate each condition's mean projection with its mean grade: one point a condition.

    Samples of one condition share prompt and α, so treating them as independent points overstates n; this does not.
    `conditions`: (N,) keys, equal for samples of one condition. Raises CorrelationError as `behavioural_correlation`.
    """
    projections, grades = _paired(projections, grades)
    if len(conditions) != len(projections):
        raise CorrelationError(f"Got {len(conditions)} conditions for {len(projections)} points; give one a point.")
    number = {key: index for index, key in enumerate(dict.fromkeys(conditions))}
    condition_of_point = np.array([number[key] for key in conditions], dtype=np.intp)
    counts = np.bincount(condition_of_point, minlength=len(number))
    means = [np.bincount(condition_of_point, values, len(number)) / counts for values in (projections, grades)]
    return correlate(means[0], means[1])


def correlate(first: npt.ArrayLike, second: npt.ArrayLike) -> Correlation:
    """Both coefficients of two (N,) finite series. Undefined, with a reason, for N < 3 or a constant series. Raises
    CorrelationError for shapes that differ or a value that is not finite."""
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
    extreme = grades != MODERATE
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
    # the largest projection always reaches the threshold, so precision has no zero to divide by
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
    # relative: float noise around one value is a constant too, and scipy would warn about it
    return float(np.ptp(values)) <= 1e-12 * float(np.abs(values).max())


def _paired(first: Any, second: Any) -> tuple[Floats, Floats]:
    first, second = (np.asarray(values, dtype=np.float64) for values in (first, second))
    if first.ndim != 1 or first.shape != second.shape:
        raise CorrelationError(f"Got series of shapes {first.shape} and {second.shape}; both must be (N,), N the same.")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise CorrelationError("One of the series holds NaN or infinity; leave those points out.")
    return first, second
