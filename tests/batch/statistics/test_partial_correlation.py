from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import LinearRegression

from batch_jobs.statistics import partial_correlation as module
from batch_jobs.statistics.partial_correlation import partial_correlation


def points(seed: int, count: int = 60) -> tuple[np.ndarray, np.ndarray, list[int], list[int]]:
    random = np.random.default_rng(seed)
    cells = random.integers(0, 5, count)
    first = random.normal(size=count) + 3.0 * cells
    second = np.clip(np.round(0.5 * (first - 3.0 * cells) + random.normal(size=count) + cells / 2), 0, 2)
    return first, second, cells.tolist(), list(range(count))


def test_it_is_the_correlation_of_what_a_regression_on_the_cells_leaves() -> None:
    first, second, cells, clusters = points(0)
    indicators = np.eye(5)[cells]
    left = [series - LinearRegression().fit(indicators, series).predict(indicators) for series in (first, second)]
    found = partial_correlation(first, second, cells, clusters)
    assert found.r == pytest.approx(np.corrcoef(*left)[0, 1])
    assert (found.n, found.cells) == (60, 5)
    assert np.corrcoef(first, second)[0, 1] > (found.r or 1.0) + 0.1  # the cells move both


def test_the_interval_of_independent_normal_points_is_close_to_fishers() -> None:
    random = np.random.default_rng(3)
    first = random.normal(size=4000)
    second = 0.5 * first + random.normal(size=4000)
    found = partial_correlation(first, second, [0] * 4000, list(range(4000)))
    fisher = stats.pearsonr(first, second).confidence_interval()
    # at 4000 points the two standard errors differ by a few per cent
    assert (found.low, found.high) == pytest.approx((fisher.low, fisher.high), abs=0.003)


def test_points_that_repeat_each_other_widen_the_interval_when_they_are_one_cluster() -> None:
    first, second, cells, clusters = points(1)
    twice = [np.concatenate([series, series]) for series in (first, second)]
    once = partial_correlation(first, second, cells, clusters)
    together = partial_correlation(*twice, cells * 2, clusters * 2)
    apart = partial_correlation(*twice, cells * 2, list(range(120)))
    widths = [(one.high or 0.0) - (one.low or 0.0) for one in (once, together, apart)]
    # 60 points in 5 cells against 120 in the same: the correction for cells is 60 / 55 against 120 / 115 in variance
    assert widths[1] == pytest.approx(widths[0], rel=0.05)
    assert widths[2] < 0.8 * widths[0]


def test_the_p_is_the_share_of_all_orders_within_cells() -> None:
    first, second, cells = [1.0, 2.0, 4.0, 0.0, 5.0, 7.0], [0, 1, 2, 0, 1, 1], ["a", "a", "a", "b", "b", "b"]

    def covariance(order: tuple[int, ...], other: tuple[int, ...]) -> float:
        one = sum(first[k] * second[order[k]] for k in range(3))
        return one + sum(first[3 + k] * second[3 + other[k]] for k in range(3))

    orders = list(itertools.permutations(range(3)))
    all_of_them = np.array([covariance(one, two) for one in orders for two in orders])
    centred = all_of_them - all_of_them.mean()
    exact = float((np.abs(centred) >= abs(centred[0]) - 1e-9).mean())
    found = partial_correlation(first, second, cells, range(6))
    # five standard errors of a share of 9999 draws
    assert found.p == pytest.approx(exact, abs=5 * np.sqrt(exact * (1 - exact) / 9999) + 1e-4)


def test_the_normal_p_of_many_points_agrees_with_permutations(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(4)
    first, cells = random.normal(size=600), random.integers(0, 6, 600).tolist()
    second = np.round(0.06 * first + random.normal(size=600))
    by_permutation = partial_correlation(first, second, cells, range(600))
    monkeypatch.setattr(module, "MOST_SHUFFLED_POINTS", 100)
    by_normal = partial_correlation(first, second, cells, range(600))
    assert by_permutation.p is not None
    assert 0.01 < by_permutation.p < 0.9
    assert by_normal.p == pytest.approx(by_permutation.p, abs=0.02)


@pytest.mark.parametrize(
    ("first", "second", "cells", "said"),
    [
        ([1.0, 2.0], [0, 1], ["a", "b"], "0 points in 0 cells"),
        ([1.0, 2.0], [0, 1], ["a", "a"], "2 points in 1 cells"),
        ([1.0, 2.0, 3.0, 4.0], [0, 0, 1, 1], ["a", "a", "b", "b"], "does not vary within any cell"),
    ],
)
def test_what_leaves_nothing_to_correlate_is_undefined_with_its_reason(
    first: list[float], second: list[int], cells: list[str], said: str
) -> None:
    found = partial_correlation(first, second, cells, range(len(first)))
    assert found.undefined is not None
    assert said in found.undefined
    assert (found.r, found.low, found.high, found.p) == (None, None, None, None)


def test_an_exact_relation_has_no_width() -> None:
    found = partial_correlation([1.0, 2.0, 3.0, 5.0], [2.0, 4.0, 6.0, 10.0], ["a"] * 4, range(4))
    assert (found.r, found.low, found.high) == pytest.approx((1.0, 1.0, 1.0))
