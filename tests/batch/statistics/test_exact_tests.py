from __future__ import annotations

import itertools
from math import comb

import numpy as np
import pytest

from batch_jobs.statistics.exact_tests import directional_p, false_discovery_q, holm_p


def one_p(*cell: int) -> float:
    (p,) = directional_p(*np.array(cell).reshape(5, 1))
    return float(p)


def fisher(hits: int, tries: int, base_hits: int, base_tries: int) -> float:
    """Share of the placements of all successes with as many, or more, in the condition."""
    total = hits + base_hits
    ways = [comb(tries, k) * comb(base_tries, total - k) if total >= k else 0 for k in range(tries + 1)]
    return sum(ways[hits:]) / sum(ways)


def boschloo_by_enumeration(hits: int, tries: int, base_hits: int, base_tries: int) -> float:
    """The largest chance, over a grid of common rates, of a table with a Fisher p as small."""
    observed = fisher(hits, tries, base_hits, base_tries)
    tables = itertools.product(range(tries + 1), range(base_tries + 1))
    as_small = [(a, b) for a, b in tables if fisher(a, tries, b, base_tries) <= observed * (1 + 1e-9)]
    rates = np.linspace(0.0, 1.0, 2001)
    chance = sum(
        comb(tries, a) * comb(base_tries, b) * rates ** (a + b) * (1 - rates) ** (tries + base_tries - a - b)
        for a, b in as_small
    )
    return float(np.max(chance))


def test_the_p_of_an_effect_is_the_largest_chance_over_all_common_rates() -> None:
    for tries, base_tries in ((4, 5), (5, 5)):
        for hits, base_hits in itertools.product(range(tries + 1), range(base_tries + 1)):
            expected = boschloo_by_enumeration(hits, tries, base_hits, base_tries)
            # a grid of 2001 rates misses the maximum of a smooth curve by less than 1e-5
            assert one_p(1, hits, tries, base_hits, base_tries) == pytest.approx(expected, abs=1e-4)
            mirrored = one_p(-1, tries - hits, tries, base_tries - base_hits, base_tries)
            assert mirrored == one_p(1, hits, tries, base_hits, base_tries)


def test_the_smallest_p_of_five_samples_against_five() -> None:
    assert one_p(1, 5, 5, 0, 5) == pytest.approx(2**-10, rel=1e-6)  # both cells at a common rate of one half
    assert one_p(-1, 0, 5, 5, 5) == pytest.approx(2**-10, rel=1e-6)
    assert fisher(5, 5, 0, 5) == pytest.approx(1 / 252)


def test_an_effect_against_the_sign_of_alpha_has_a_p_of_one() -> None:
    assert one_p(1, 0, 5, 5, 5) == 1.0
    assert one_p(-1, 5, 5, 0, 5) == 1.0


def test_large_samples_have_fishers_p_which_is_never_smaller() -> None:
    assert one_p(1, 40, 51, 20, 51) == pytest.approx(fisher(40, 51, 20, 51), rel=1e-9)
    assert one_p(1, 39, 50, 20, 50) < fisher(39, 50, 20, 50)


def test_no_conditions_have_no_p() -> None:
    assert len(directional_p(*np.empty((5, 0), dtype=int))) == 0


def test_holm_by_hand() -> None:
    # 4 · .01, then the larger of that and 3 · .02, 2 · .03, 1 · .04
    assert holm_p([0.04, None, 0.01, 0.03, 0.02]) == pytest.approx([0.06, None, 0.04, 0.06, 0.06])
    assert holm_p([0.9, 0.8]) == [1.0, 1.0]
    assert holm_p([]) == []


def test_false_discovery_by_hand() -> None:
    # Benjamini and Hochberg 1995: p · m / rank, made monotone from the largest down
    assert false_discovery_q([0.04, None, 0.01, 0.5]) == pytest.approx([0.06, None, 0.03, 0.5])
    assert false_discovery_q([None]) == [None]
