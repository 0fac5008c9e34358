from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from batch_jobs.directions.baselines import random_baseline, summarise_random_aurocs
from batch_jobs.directions.readout_file import PairReadouts
from batch_jobs.directions.validate_layer import ValidationError


def test_the_published_summary_follows_from_the_published_aurocs(paper_data: Path) -> None:
    published = json.loads((paper_data / "phi3_random_baseline.json").read_text(encoding="utf-8"))
    random_aurocs = published["random_baseline"]
    got = summarise_random_aurocs(random_aurocs["all_aurocs"], published["empathy_probe"]["auroc"])
    # the same formulas in the same precision: only the order of additions may differ
    assert got.mean == pytest.approx(random_aurocs["mean_auroc"], abs=1e-12)
    assert got.std == pytest.approx(random_aurocs["std_auroc"], abs=1e-12)
    assert got.percentile_95 == pytest.approx(random_aurocs["95th_percentile"], abs=1e-12)
    # theirs is smaller by a relative 4e-10, since it adds 1e-10 to the std against a division by zero
    assert got.z == pytest.approx(published["comparison"]["z_score"], abs=1e-8)
    # 0.022 and 0.969 are as far from 0.5 as probes that are read as good, but none reaches 1.0
    assert got.two_sided_p == pytest.approx(1 / 101)
    assert got.two_sided_percentile_95 + 0.5 > got.percentile_95


def test_a_random_direction_that_points_backwards_counts_in_the_two_sided_numbers() -> None:
    got = summarise_random_aurocs([0.1, 0.5, 0.5, 0.5], 0.9)
    assert got.percentile_95 == 0.5
    assert got.two_sided_p == pytest.approx(2 / 5)
    # 95th percentile of 0, 0, 0, 0.4, by linear interpolation at rank 2.85 of 0..3
    assert got.two_sided_percentile_95 == pytest.approx(0.34)


def test_equal_random_aurocs_have_no_z() -> None:
    assert summarise_random_aurocs([0.5, 0.5], 1.0).z is None
    with pytest.raises(ValidationError, match="at least 2"):
        summarise_random_aurocs([0.5], 1.0)


def test_random_directions_find_a_class_difference_spread_over_every_coordinate_as_often_forwards_as_backwards() -> (
    None
):
    draw = np.random.default_rng(0)
    test = PairReadouts(draw.normal(1.0, 1.0, (15, 16)), draw.normal(-1.0, 1.0, (15, 16)))
    got = random_baseline(test, 1.0, 9.0, directions=400, seed=2)
    assert len(got.aurocs) == 400
    # Symmetric about 0.5: a standard error of 0.33 / sqrt(400) is 0.017, so 0.07 is four of them.
    assert got.mean == pytest.approx(0.5, abs=0.07)
    assert got.std > 0.2  # strong ones in both directions; classes without a difference give about 0.1
    assert random_baseline(test, 1.0, 9.0, directions=400, seed=2) == got
    assert random_baseline(test, 1.0, 9.0, directions=400, seed=3).aurocs != got.aurocs


def test_a_coordinate_of_huge_scale_does_not_hide_that_vectors_are_drawn_in_all_of_them() -> None:
    # in one dimension the only unit vectors are +1 and -1, so the AUROCs are a and 1 - a
    test = PairReadouts(np.array([[1.0], [3.0]]), np.array([[2.0], [0.0]]))
    assert set(random_baseline(test, 0.75, 1.0, directions=50, seed=0).aurocs) == {0.25, 0.75}


def test_the_largest_z_is_that_of_a_perfect_auroc() -> None:
    got = summarise_random_aurocs([0.2, 0.4, 0.6, 0.8], 0.9)
    # mean 0.5, population std sqrt(0.05)
    assert got.z == pytest.approx(0.4 / 0.05**0.5)
    assert got.z_max == pytest.approx(0.5 / 0.05**0.5)
    assert summarise_random_aurocs([0.2, 0.4, 0.6, 0.8], 1.0).z == pytest.approx(got.z_max)
    assert summarise_random_aurocs([0.5, 0.5], 1.0).z_max is None


def test_separation_tells_a_direction_from_random_ones_of_the_same_auroc() -> None:
    # the classes lie at ±3 in every coordinate and the noise is 0.1, so most random directions separate them perfectly
    draw = np.random.default_rng(4)
    test = PairReadouts(draw.normal(3.0, 0.1, (15, 8)), draw.normal(-3.0, 0.1, (15, 8)))
    along = np.full(8, 8**-0.5)
    positive, negative = test.positive_ND @ along, test.negative_ND @ along
    own = (positive.mean() - negative.mean()) / np.sqrt((positive.var() + negative.var()) / 2)
    got = random_baseline(test, 1.0, float(own), directions=200, seed=0)
    assert max(got.aurocs) == 1.0
    assert got.separation is not None
    assert got.separation.direction == own
    assert got.separation.random_percentile_95 <= got.separation.random_best
    # the share of the class difference that a random unit vector in 8 dimensions holds reaches 0.9 in one of 200
    assert got.separation.random_best < own
    assert got.separation.p == pytest.approx(1 / 201)
    # a direction that separates by the 10th largest amount of the random ones
    sizes = sorted((abs(separation(test, vector)) for vector in vectors(200, 8, seed=0)), reverse=True)
    tenth = random_baseline(test, 1.0, sizes[9] * (1 - 1e-9), directions=200, seed=0).separation
    assert tenth is not None
    assert tenth.p == pytest.approx(11 / 201)
    assert tenth.random_best == pytest.approx(sizes[0])


def vectors(count: int, size: int, *, seed: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).standard_normal((count, size))
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def separation(test: PairReadouts, vector: np.ndarray) -> float:
    positive, negative = test.positive_ND @ vector, test.negative_ND @ vector
    return float((positive.mean() - negative.mean()) / np.sqrt((positive.var() + negative.var()) / 2))


def test_one_text_a_side_has_no_separation_in_stds() -> None:
    one = PairReadouts(np.ones((1, 4)), np.zeros((1, 4)))
    assert random_baseline(one, 1.0, float("inf"), directions=10, seed=0).separation is None
