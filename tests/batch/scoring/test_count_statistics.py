from __future__ import annotations

import itertools
from math import comb

import numpy as np
import pytest
from scipy.stats import spearmanr

from batch_jobs.scoring.count_statistics import balance, directional_p, trend, wilson_interval


def one_p(*cell: int) -> float:
    (p,) = directional_p(*np.array(cell).reshape(5, 1))
    return float(p)


def tail_by_counting(sign: int, hits: int, tries: int, base_hits: int, base_tries: int) -> float:
    """Share of the placements of all successes among all samples with as many, or as few, in the condition."""
    total = hits + base_hits
    ways = [
        comb(tries, k) * comb(base_tries, total - k) if 0 <= total - k <= base_tries else 0 for k in range(tries + 1)
    ]
    return sum(ways[hits:] if sign > 0 else ways[: hits + 1]) / sum(ways)


def test_wilson_interval_matches_published_values() -> None:
    assert wilson_interval(0, 5) == pytest.approx((0.0, 0.4345), abs=1e-4)
    assert wilson_interval(5, 5) == pytest.approx((0.5655, 1.0), abs=1e-4)
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
    with pytest.raises(ValueError, match="not a share"):
        wilson_interval(0, 0)


def test_the_p_of_an_effect_is_the_tail_of_all_placements() -> None:
    cells = [
        (sign, hits, tries, base_hits, base_tries)
        for sign, tries, base_tries in itertools.product((1, -1), (1, 4), (5, 15))
        for hits, base_hits in itertools.product(range(tries + 1), range(base_tries + 1))
    ]
    found = directional_p(*np.array(cells).T)
    # scipy sums float64 probabilities; a wrong tail is off by whole probabilities
    assert found == pytest.approx([tail_by_counting(*cell) for cell in cells], rel=1e-9)


def test_the_lady_tasting_tea() -> None:
    assert one_p(1, 3, 4, 1, 4) == pytest.approx(17 / 70)  # Fisher 1935: 3 of 4 cups right
    assert one_p(1, 4, 4, 0, 4) == pytest.approx(1 / 70)


def test_an_effect_against_the_sign_of_alpha_has_a_large_p() -> None:
    assert one_p(1, 0, 5, 5, 5) == 1.0
    assert one_p(-1, 5, 5, 0, 5) == 1.0
    assert one_p(-1, 0, 5, 5, 5) == pytest.approx(1 / 252)


def test_no_conditions_have_no_p() -> None:
    assert len(directional_p(*np.empty((5, 0), dtype=int))) == 0


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


@pytest.mark.parametrize(
    ("rates", "baseline", "gain", "loss", "index"),
    [
        ({5.0: 1.0, -5.0: 0.2}, 0.6, 0.4, 0.4, 0.0),
        ({5.0: 1.0, -5.0: 0.6}, 0.6, 0.4, 0.0, 1.0),
        ({5.0: 0.6, -5.0: 0.2}, 0.6, 0.0, 0.4, -1.0),
        ({5.0: 0.8, -5.0: 0.8}, 0.4, 0.4, -0.4, 1.0),  # both signs raise
        ({5.0: 0.7, -5.0: 0.2, 9.0: 1.0}, 0.4, 0.3, 0.2, 0.2),  # 9 has no opposite and is left out
        ({5.0: 0.5, -5.0: 0.5}, 0.5, 0.0, 0.0, None),
        ({5.0: 1.0, -5.0: 0.5}, 1.0, 0.0, 0.5, None),  # nothing could rise
        ({5.0: 0.5, -5.0: 0.0}, 0.0, 0.5, 0.0, None),  # nothing could fall
    ],
)
def test_balance_by_hand(
    rates: dict[float, float], baseline: float, gain: float, loss: float, index: float | None
) -> None:
    found = balance(rates, baseline)
    assert found is not None
    assert (found.gain, found.loss) == pytest.approx((gain, loss))
    assert found.index == (None if index is None else pytest.approx(index))


def test_alphas_of_one_sign_have_no_balance() -> None:
    assert balance({5.0: 1.0, -3.0: 0.0}, 0.5) is None
