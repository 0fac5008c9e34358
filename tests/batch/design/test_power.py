"""Power of a design, against enumerations that share no code with it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import binom, boschloo_exact, fisher_exact, spearmanr

from batch_jobs.design import power
from batch_jobs.design.power import boschloo_p, condition_power, design_power, trend_power
from batch_jobs.errors import StudyError


@pytest.mark.parametrize("samples", [3, 5])
def test_the_p_of_every_table_is_scipys(samples: int) -> None:
    counts = range(samples + 1)
    expected = [
        [boschloo_exact([[a, b], [samples - a, samples - b]], alternative="greater", n=64).pvalue for b in counts]
        for a in counts
    ]
    # both search the worst common rate, on grids of their own; a wrong formula errs by far more
    np.testing.assert_allclose(boschloo_p(samples), expected, atol=1e-5)


def test_a_condition_sees_a_rise_as_often_as_its_tables_are_drawn() -> None:
    drawn = np.random.default_rng(0).binomial(5, [[0.7], [0.3]], (2, 20_000))
    p = {
        (a, b): boschloo_exact([[a, b], [5 - a, 5 - b]], alternative="greater", n=32).pvalue
        for a, b in set(zip(*drawn.tolist(), strict=True))
    }
    share = np.mean([p[pair] <= 0.05 for pair in zip(*drawn.tolist(), strict=True)])
    # 20,000 draws at 0.25 have a standard error of 0.003
    assert condition_power(5, 0.3, 0.7, 0.05) == pytest.approx(share, abs=0.012)


def test_the_trends_power_is_that_of_all_permutations() -> None:
    """Three levels of two samples: all 64 outcomes, each with the p over all 6! orders of its outcomes."""
    rates, levels = np.array([0.2, 0.5, 0.9]), np.repeat([0, 1, 2], 2)
    expected = 0.0
    for outcome in itertools.product((0, 1), repeat=6):
        if len(set(outcome)) == 1:
            continue  # nothing varies, so p is 1
        observed = spearmanr(levels, outcome).statistic
        orders = [spearmanr(levels, order).statistic for order in set(itertools.permutations(outcome))]
        if np.mean(np.array(orders) >= observed - 1e-9) <= 0.2:
            expected += np.prod(np.where(outcome, rates[levels], 1 - rates[levels]))
    assert expected > 0.3
    assert trend_power(2, rates, 0.2) == pytest.approx(expected, abs=1e-12)


def test_five_samples_are_few() -> None:
    """Published reckonings for 5 samples at levels of α around 0, for a rise of the rate from 0.3 to 0.7: 4 % for one
    condition, 45 % for the trend.

    The first is Fisher's test at the one-sided level 0.05 of the highest α, at 0.7, against the unsteered rate in the
    middle of the rise, 0.5; Boschloo's test has it at the two-sided level. The second lies between the trend over 7
    and over 8 evenly spaced levels, one-sided at 0.05."""
    fisher = sum(
        binom.pmf(a, 5, 0.7) * binom.pmf(b, 5, 0.5)
        for a, b in itertools.product(range(6), repeat=2)
        if fisher_exact([[a, b], [5 - a, 5 - b]], alternative="greater").pvalue <= 0.05
    )
    assert fisher == pytest.approx(0.04, abs=0.005)
    assert design_power(5, 9, level=0.025).condition_in_trend == pytest.approx(0.04, abs=0.005)
    assert design_power(5, 7).trend < 0.45 < design_power(5, 8).trend


def test_no_single_condition_survives_a_grid_of_many() -> None:
    # the smallest p of 5 against 5 is 0.00098
    assert float(boschloo_p(5).min()) == pytest.approx(0.5**10, rel=1e-3)
    assert design_power(5, 9, 9).condition_corrected == 0.0
    assert design_power(20, 9, 9).condition_corrected > 0.15


def test_a_large_grid_is_computed_with_the_normal_approximation(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = np.linspace(0.4, 0.6, 9)
    exact = trend_power(20, rates, 0.05)
    monkeypatch.setattr(power, "MOST_CELLS", 0)
    # the steps of the rank sum are what the approximation leaves out
    assert trend_power(20, rates, 0.05) == pytest.approx(exact, abs=0.03)
    assert trend_power(20, np.array([0.0, 1.0]), 0.05) == 1.0


def test_more_samples_and_a_larger_rise_are_seen_more_often() -> None:
    assert design_power(3, 5).trend < design_power(6, 5).trend < design_power(12, 5).trend
    assert design_power(6, 5, low=0.4, high=0.6).trend < design_power(6, 5).trend
    assert design_power(6, 5, below_zero=0).condition_in_trend == design_power(6, 5).condition


@pytest.mark.parametrize(
    ("numbers", "changes"), [((0, 5), {}), ((5, 1), {}), ((5, 5), {"low": 0.7, "high": 0.3}), ((5, 5), {"level": 0.0})]
)
def test_what_is_no_design_is_refused(numbers: tuple[int, int], changes: dict[str, float]) -> None:
    with pytest.raises(StudyError, match="allowed"):
        design_power(*numbers, **changes)
