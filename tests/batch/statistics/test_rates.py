from __future__ import annotations

import math

import pytest
from scipy.stats import binomtest

from batch_jobs.statistics.rates import contrast_interval, wilson_interval


def test_wilson_interval_matches_published_values() -> None:
    assert wilson_interval(0, 5) == pytest.approx((0.0, 0.4345), abs=1e-4)
    assert wilson_interval(5, 5) == pytest.approx((0.5655, 1.0), abs=1e-4)
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
    with pytest.raises(ValueError, match="not a share"):
        wilson_interval(0, 0)


def test_one_cell_against_another_has_newcombes_published_interval() -> None:
    # Newcombe 1998, table II, method 10
    for first, second, low, high in (((56, 70), (48, 80), 0.0524, 0.3339), ((10, 10), (0, 20), 0.6791, 1.0)):
        value = first[0] / first[1] - second[0] / second[1]
        found = contrast_interval([[first], [second]], [1.0, -1.0], value)
        assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)


def test_a_group_of_cells_is_stratified_and_has_a_width_at_rates_of_one() -> None:
    found = contrast_interval([[(5, 5)] * 4], [1.0], 1.0)
    rate = (5 + 0.09375) / (5 + 0.1875)
    half = 1.959964 * math.sqrt(rate * (1 - rate) / 4 / 4)
    assert (found.low, found.high) == (pytest.approx(1.0 - half, rel=1e-6), 1.0)
    # cells far apart say more of their mean than one of the same total
    low, high = binomtest(10, 20).proportion_ci(method="wilson")
    apart = contrast_interval([[(0, 5), (0, 5), (5, 5), (5, 5)]], [1.0], 0.5)
    assert apart.high - apart.low < 0.5 * (high - low)


def test_the_ends_mirror_each_other_and_the_order_of_cells_means_nothing() -> None:
    up, down = [(3, 5), (5, 5)], [(0, 5), (1, 6)]
    value = (0.6 + 1.0) / 2 - (0.0 + 1 / 6) / 2
    found = contrast_interval([up, down], [1.0, -1.0], value)
    turned = contrast_interval([down[::-1], up[::-1]], [1.0, -1.0], -value)
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low))
    misses = [[(n - k, n) for k, n in cells] for cells in (up, down)]
    mirrored = contrast_interval(misses, [1.0, -1.0], -value)
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low))
