from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from batch_jobs.statistics.trend import trend


def test_trend_is_spearmans_over_the_samples() -> None:
    alphas, hits, sizes = [3.0, -20.0, 0.0, 5.0], [4, 0, 3, 5], [5, 5, 15, 6]
    samples = [(a, k < hit) for a, hit, size in zip(alphas, hits, sizes, strict=True) for k in range(size)]
    found = trend(alphas, hits, sizes)
    assert found is not None
    # both are sums of a few float64 terms
    assert found.rho == pytest.approx(spearmanr(*zip(*samples, strict=True)).statistic, rel=1e-12)


def test_trend_p_is_the_share_of_shuffles_that_rise_as_much() -> None:
    # 3 α of 2 samples: 15 ways to place 2 successes; rising as much as (0, 0, 2) is 1 of them, as (0, 1, 1) 1 + 4
    for hits, ways in (([0, 0, 2], 1), ([0, 1, 1], 5), ([2, 0, 0], 15)):
        found = trend([-1.0, 0.0, 1.0], hits, [2, 2, 2])
        assert found is not None
        # five standard errors of a share of 9999 draws; the counts next door differ by at least 1/15
        assert found.p == pytest.approx(ways / 15, abs=5 * np.sqrt(ways / 15 * (1 - ways / 15) / 9999) + 1e-4)


def test_trend_p_is_the_same_in_every_call_and_never_zero() -> None:
    steep = ([-2.0, -1.0, 1.0, 2.0], [0, 0, 50, 50], [50, 50, 50, 50])
    assert trend(*steep) == trend(*steep)
    assert trend(*steep).p == pytest.approx(1e-4)  # type: ignore[union-attr]


def test_the_order_in_which_alphas_come_does_not_matter() -> None:
    assert trend([5.0, 0.0, -5.0], [4, 2, 1], [5, 6, 7]) == trend([-5.0, 0.0, 5.0], [1, 2, 4], [7, 6, 5])


@pytest.mark.parametrize("hits", [[0, 0], [5, 5]])
def test_outcomes_that_are_all_alike_have_no_trend(hits: list[int]) -> None:
    assert trend([0.0, 1.0], hits, [5, 5]) is None


def test_one_alpha_has_no_trend() -> None:
    assert trend([0.0], [2], [5]) is None
