from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from batch_jobs.statistics import against_controls as module
from batch_jobs.statistics.against_controls import against_controls
from batch_jobs.statistics.blocks import Outcomes


def outcomes(deltas: list[int]) -> Outcomes:
    """One block for each Δ of -1, 0 or 1."""
    return {("s", seed): {-1.0: (int(d < 0), 1), 0.0: (1, 1), 1.0: (int(d > 0), 1)} for seed, d in enumerate(deltas)}


REAL, FIRST, SECOND = [1, 1, 0, 1], [0, -1, 0, 0], [0, 0, 1, 0]


def test_the_difference_is_over_blocks() -> None:
    found = against_controls(outcomes(REAL), [outcomes(FIRST), outcomes(SECOND)])
    assert found is not None
    assert (found.blocks, found.delta, found.control_deltas, found.control_mean) == (4, 0.75, (-0.25, 0.25), 0.0)
    by_block = np.array(REAL) - np.mean([FIRST, SECOND], axis=0)
    assert found.difference == pytest.approx(by_block.mean())
    assert (found.difference_low, found.difference_high) == pytest.approx(
        stats.t.interval(0.95, 3, loc=by_block.mean(), scale=stats.sem(by_block))
    )


def test_the_p_is_the_share_of_all_choices_of_the_real_direction_in_each_block() -> None:
    values = np.array([REAL, FIRST, SECOND], dtype=float)
    totals = []
    for choice in itertools.product(range(3), repeat=4):
        totals.append(sum(values[d, b] - np.delete(values[:, b], d).mean() for b, d in enumerate(choice)))
    exact = float((np.abs(totals) >= totals[0] - 1e-9).mean())  # the first choice is the true one
    found = against_controls(outcomes(REAL), [outcomes(FIRST), outcomes(SECOND)])
    assert found is not None
    # five standard errors of a share of 9999 draws
    assert found.p == pytest.approx(exact, abs=5 * np.sqrt(exact * (1 - exact) / 9999) + 1e-4)


def test_the_normal_p_of_many_blocks_agrees_with_permutations(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(1)
    real, one, two = ([int(d) for d in random.integers(-1, 2, 1001)] for _ in range(3))
    by_normal = against_controls(outcomes(real), [outcomes(one), outcomes(two)])
    monkeypatch.setattr(module, "MOST_SHUFFLED_BLOCKS", 2000)
    by_permutation = against_controls(outcomes(real), [outcomes(one), outcomes(two)])
    assert by_normal is not None
    assert by_permutation is not None
    assert 0.01 < by_permutation.p < 0.99
    assert by_normal.p == pytest.approx(by_permutation.p, abs=0.025)


def test_the_rank_p_has_its_floor_and_counts_ties_against_the_direction() -> None:
    controls = [outcomes([0, 0, 0, 0]), outcomes(REAL), outcomes([1, 1, 1, 1])]
    found = against_controls(outcomes(REAL), controls)
    assert found is not None
    assert (found.rank_p, found.rank_p_floor) == (3 / 4, 1 / 4)
    best = against_controls(outcomes([1, 1, 1, 1]), controls[:2])
    assert best is not None
    assert best.rank_p == best.rank_p_floor == pytest.approx(1 / 3)


def test_only_blocks_that_all_directions_have_count() -> None:
    lacking = {block: cells for block, cells in outcomes(FIRST).items() if block != ("s", 1)}
    found = against_controls(outcomes(REAL), [lacking])
    assert found is not None
    assert (found.blocks, found.delta) == (3, pytest.approx(2 / 3))
    one_sign = {("s", 0): {1.0: (1, 1)}}
    assert against_controls(outcomes(REAL), [one_sign]) is None
    assert against_controls(outcomes(REAL), []) is None
