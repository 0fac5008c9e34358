from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from batch_jobs.statistics import blocks
from batch_jobs.statistics.blocks import Outcomes, grid_slope, stratified_t_interval

ALPHAS = (-2.0, -1.0, 0.0, 5.0)


def grid(*outcomes: str) -> Outcomes:
    """One block for each string of 0 and 1, in the order of ALPHAS, all in one scenario."""
    return {
        ("s", seed): {alpha: (int(digit), 1) for alpha, digit in zip(ALPHAS, digits, strict=True) if digit in "01"}
        for seed, digits in enumerate(outcomes)
    }


def test_the_effect_is_the_mean_of_least_squares_slopes_over_the_grid() -> None:
    strings = ("0011", "0101", "0001", "1001")
    found = grid_slope(grid(*strings))
    places = np.arange(4) / 3
    slopes = [np.polyfit(places, [int(digit) for digit in digits], 1)[0] for digits in strings]
    assert found is not None
    assert found.value == pytest.approx(np.mean(slopes))
    assert (found.low, found.high) == pytest.approx(
        stats.t.interval(0.95, 3, loc=np.mean(slopes), scale=stats.sem(slopes))
    )


def test_the_p_is_the_share_of_all_orders_within_blocks() -> None:
    strings = ("0011", "0101", "0001")
    places = np.arange(4) / 3 - 0.5
    orders = [np.array(list(itertools.permutations(map(int, digits)))) @ places for digits in strings]
    totals = np.array([sum(each) for each in itertools.product(*orders)])
    observed = sum(np.array([int(digit) for digit in digits]) @ places for digits in strings)
    exact = float((np.abs(totals) >= observed - 1e-9).mean())
    found = grid_slope(grid(*strings))
    assert found is not None
    # five standard errors of a share of 9999 draws
    assert found.p == pytest.approx(exact, abs=5 * np.sqrt(exact * (1 - exact) / 9999) + 1e-4)


def test_the_normal_p_of_many_blocks_agrees_with_permutations(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    many = grid(*("".join(map(str, random.binomial(1, [0.4, 0.45, 0.5, 0.5]))) for _ in range(101)))
    by_normal = grid_slope(many)
    monkeypatch.setattr(blocks, "MOST_SHUFFLED_BLOCKS", 1000)
    by_permutation = grid_slope(many)
    assert by_normal is not None
    assert by_permutation is not None
    assert 0.01 < by_permutation.p < 0.9
    # steps of the discrete sum, and five standard errors of the permutations
    assert by_normal.p == pytest.approx(by_permutation.p, abs=0.03)


def test_several_samples_of_an_alpha_and_missing_ones_count_as_they_are() -> None:
    outcomes = {("s", 0): {-1.0: (1, 3), 0.0: (1, 2), 1.0: (2, 2)}, ("t", 1): {-1.0: (0, 1), 1.0: (1, 1)}}
    found = grid_slope(outcomes)
    first = np.polyfit([0, 0, 0, 0.5, 0.5, 1, 1], [1, 0, 0, 1, 0, 1, 1], 1)[0]
    assert found is not None
    assert (found.blocks, found.low) == (2, None)  # two scenarios of one block each
    assert found.value == pytest.approx((first + 1.0) / 2)


def test_blocks_that_all_agree_have_no_interval_and_a_small_p() -> None:
    found = grid_slope(grid(*["0011"] * 8))
    assert found is not None
    assert (found.low, found.high) == (None, None)
    assert found.p < 0.01
    assert grid_slope({("s", 0): {0.0: (1, 1)}}) is None
    flat = grid_slope(grid("0000", "1111"))
    assert flat is not None
    assert (flat.value, flat.p) == (0.0, 1.0)


def test_scenarios_are_strata_so_their_differences_do_not_widen_the_interval() -> None:
    values = np.array([0.0, 0.1, 0.2, 10.0, 10.1, 10.2])
    low, high = stratified_t_interval(values, ["s"] * 3 + ["t"] * 3)
    assert low is not None
    assert high is not None
    # both strata have variance .01, so the mean of six has .01 / 6
    assert high - low == pytest.approx(2 * stats.t.ppf(0.975, 4) * np.sqrt(0.01 / 6))
    assert (low + high) / 2 == pytest.approx(5.1)
