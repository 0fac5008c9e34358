from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from batch_jobs.scoring.correlation import (
    CorrelationError,
    behavioural_correlation,
    condition_correlation,
    correlate,
)


def test_the_published_correlation_is_reproduced(paper_data: Path) -> None:
    published = json.loads((paper_data / "phi3_eia_correlation.json").read_text(encoding="utf-8"))
    points = published["detailed_results"]
    got = behavioural_correlation([point["probe_score"] for point in points], [point["true_score"] for point in points])
    assert got.correlation.n == published["num_test_cases"] == 12
    # both sides are float64 arithmetic on the same 12 numbers, so they differ only by rounding
    assert got.correlation.pearson_r == pytest.approx(published["pearson_correlation"], rel=1e-9)
    assert got.correlation.pearson_p == pytest.approx(published["pearson_p_value"], rel=1e-9)
    assert got.correlation.spearman_rho == pytest.approx(published["spearman_correlation"], rel=1e-9)
    assert got.correlation.spearman_p == pytest.approx(published["spearman_p_value"], rel=1e-9)
    detection = got.detection
    assert detection.n == 10  # the two moderate completions are left out
    assert detection.accuracy == published["binary_accuracy"] == 1.0
    assert [[detection.tn, detection.fp], [detection.fn, detection.tp]] == published["confusion_matrix"]
    assert (detection.precision, detection.recall, detection.f1, detection.specificity) == (1.0, 1.0, 1.0, 1.0)


def test_detection_agrees_with_a_count_by_hand() -> None:
    # grade 2 at 1, 4, 7 (mean 4), grade 0 at -3, 0, 3, 0 (mean 0): threshold 2, so 1 is missed and 3 a false alarm
    got = behavioural_correlation([1, 4, 7, -3, 0, 3, 0, 99], [2, 2, 2, 0, 0, 0, 0, 1]).detection
    assert (got.n, got.threshold) == (7, 2.0)
    assert (got.tp, got.fp, got.tn, got.fn) == (2, 1, 3, 1)
    assert got.accuracy == pytest.approx(5 / 7)
    assert got.precision == pytest.approx(2 / 3)
    assert got.recall == pytest.approx(2 / 3)
    assert got.f1 == pytest.approx(2 / 3)
    assert got.specificity == pytest.approx(3 / 4)
    assert got.auroc == pytest.approx(11 / 12)  # of 12 pairs only (1, 3) is the wrong way round


def test_a_projection_that_points_the_wrong_way_has_an_auroc_below_one_half() -> None:
    got = behavioural_correlation([-1, -2, -3, 3, 2, 1], [2, 2, 2, 0, 0, 0])
    assert got.detection.auroc == 0.0
    assert got.correlation.pearson_r is not None
    assert got.correlation.pearson_r < 0


@pytest.mark.parametrize(
    ("projections", "grades", "said"),
    [
        ([], [], "0 points"),
        ([1.0, 2.0], [0, 2], "2 points"),
        ([1.0, 2.0, 3.0], [1, 1, 1], "are the same"),
        ([0.1, 0.1, 0.1], [0, 1, 2], "are the same"),
    ],
)
def test_an_undefined_correlation_gives_its_reason(projections: list[float], grades: list[int], said: str) -> None:
    got = behavioural_correlation(projections, grades).correlation
    assert got.undefined is not None
    assert said in got.undefined
    assert (got.pearson_r, got.pearson_p, got.spearman_rho, got.spearman_p) == (None, None, None, None)


def test_detection_of_one_class_is_undefined_with_its_reason() -> None:
    got = behavioural_correlation([1, 2, 3, 4], [2, 2, 1, 2]).detection
    assert got.undefined is not None
    assert "3 of grade 2, 0 of grade 0" in got.undefined
    assert (got.n, got.threshold, got.accuracy, got.auroc) == (3, None, None, None)


def test_detection_by_constant_projections_is_undefined_with_its_reason() -> None:
    # float64 makes the mean of three 0.1 slightly more than 0.1, so a threshold would stand above every point
    got = behavioural_correlation([0.1] * 6, [2, 2, 2, 0, 0, 0]).detection
    assert got.undefined == "all 6 projections are the same"
    assert (got.precision, got.f1, got.auroc) == (None, None, None)


def test_conditions_are_correlated_by_their_means() -> None:
    # within each condition the samples run against the trend; the means (1, 0), (3, 1), (5, 2) lie on a line
    projections, grades = [0, 2, 2, 4, 4, 6], [0, 0, 2, 0, 2, 2]
    conditions = ["a", "a", "b", "b", "c", "c"]
    got = condition_correlation(projections, grades, conditions)
    assert got.n == 3
    assert got.pearson_r == pytest.approx(1.0)
    samples = correlate(projections, grades).pearson_r
    assert samples is not None
    assert samples < 0.9


def test_conditions_need_not_lie_next_to_each_other() -> None:
    rng = np.random.default_rng(0)
    projections, grades = rng.normal(size=60), rng.integers(0, 3, size=60)
    conditions = [("scenario", alpha) for alpha in (-1.0, 0.0, 1.0)] * 20
    order = sorted(range(60), key=lambda index: conditions[index])
    apart = condition_correlation(projections, grades, conditions)
    together = condition_correlation(projections[order], grades[order], [conditions[index] for index in order])
    assert apart.pearson_r == pytest.approx(together.pearson_r)


@pytest.mark.parametrize(
    ("projections", "grades", "said"),
    [
        ([1.0, 2.0], [0], r"shapes \(2,\) and \(1,\)"),
        ([1.0, math.nan], [0, 2], "NaN or infinity"),
        ([1.0, 2.0], [0, 3], r"grades \[3.0\]"),
    ],
)
def test_series_that_do_not_fit_are_refused(projections: list[float], grades: list[int], said: str) -> None:
    with pytest.raises(CorrelationError, match=said):
        behavioural_correlation(projections, grades)
