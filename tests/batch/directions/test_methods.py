from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from batch_jobs.config.study import Study, StudyError
from batch_jobs.directions.methods import (
    METHODS,
    logistic_regression,
    make_directions,
    mean_difference,
    mean_residual_norm,
    pca,
)
from batch_jobs.directions.readout_file import PairReadouts, ReadoutKey, ReadText, StudyReadouts


def pairs(positive: Any, negative: Any) -> PairReadouts:
    return PairReadouts(np.array(positive, dtype=np.float32), np.array(negative, dtype=np.float32))


def noisy_pairs(step: Any, *, count: int = 40, noise: float = 0.1, offset: float = 0.0) -> PairReadouts:
    """Pairs that share a large random midpoint and differ by `step`, give or take the noise."""
    draw = np.random.default_rng(1)
    step = np.array(step, dtype=np.float64)
    midpoint = offset + draw.normal(0, 5, (count, len(step)))
    sides = [midpoint + side * step / 2 + draw.normal(0, noise, midpoint.shape) for side in (1, -1)]
    return PairReadouts(*sides)


def test_a_direction_is_the_unit_difference_of_the_class_means() -> None:
    direction = mean_difference(pairs([[4, 0, 1], [2, 8, 1]], [[0, 0, 1]]))
    assert direction.dtype == np.float32
    # (3, 4, 0) / 5; float32 holds these to 1e-7
    np.testing.assert_allclose(direction, [0.6, 0.8, 0.0], atol=1e-6)


def test_a_small_difference_of_large_means_survives() -> None:
    base = np.full((1000, 4), 1e4, dtype=np.float32)
    shifted = base.copy()
    shifted[:, 1] += 0.01
    np.testing.assert_allclose(mean_difference(PairReadouts(shifted, base)), [0, 1, 0, 0], atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_finds_a_planted_direction_and_points_it_to_the_positive_side(method: Any) -> None:
    planted = np.array([3.0, -4.0, 0.0, 0.0])
    direction = METHODS[method](noisy_pairs(planted))
    assert direction.dtype == np.float32
    assert np.linalg.norm(direction) == pytest.approx(1.0, abs=1e-6)
    # 40 pairs with noise of 0.1 on a step of 5; the regression leans towards the separation of single texts
    assert float(direction @ planted) / 5 > 0.9
    backwards = METHODS[method](noisy_pairs(-planted))
    assert float(backwards @ planted) / 5 < -0.9


def test_logistic_regression_gives_the_boundary_in_the_units_of_the_stream() -> None:
    draw = np.random.default_rng(0)
    # One coordinate carries the class at scale 0.01, the other is noise at scale 1000: unless the scaling is undone
    # correctly, the noise has the larger weight.
    positive = np.column_stack([draw.normal(0.02, 0.01, 60), draw.normal(0, 1000, 60)])
    other = np.column_stack([draw.normal(-0.02, 0.01, 60), draw.normal(0, 1000, 60)])
    direction = logistic_regression(PairReadouts(positive, other))
    assert direction[0] > 0.999
    assert (positive @ direction).min() > (other @ direction).max() - 0.05


def test_logistic_regression_takes_coordinates_that_never_vary() -> None:
    direction = logistic_regression(pairs([[2, 7], [3, 7]], [[0, 7], [1, 7]]))
    np.testing.assert_allclose(direction, [1, 0], atol=1e-6)


def test_pca_reads_the_differences_within_pairs_and_not_those_between_them() -> None:
    # Pairs lie far apart along y and are 1 apart along x. The classes as wholes vary most along y.
    y = np.array([-100.0, 0.0, 100.0, 200.0])
    train = PairReadouts(np.column_stack([y * 0 + 1, y]), np.column_stack([y * 0, y]))
    np.testing.assert_allclose(pca(train), [1, 0], atol=1e-6)


def test_pca_refuses_sides_that_are_no_pairs() -> None:
    with pytest.raises(StudyError, match="2 positive and 1 negative"):
        pca(pairs([[1, 0], [2, 0]], [[0, 0]]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("positive", "negative", "said"),
    [
        (np.ones((2, 3)), np.ones((2, 3)), "same mean readout"),
        (np.ones((2, 3)), np.ones((2, 4)), r"shapes \(2, 3\) and \(2, 4\)"),
        (np.ones(3), np.ones(3), r"allowed: \(N, D\)"),
        (np.ones((0, 3)), np.ones((2, 3)), "no readouts"),
        (np.full((2, 3), np.nan), np.ones((2, 3)), "NaN or infinity"),
    ],
)
def test_readouts_without_a_direction_are_refused(
    method: Any, positive: np.ndarray, negative: np.ndarray, said: str
) -> None:
    with pytest.raises(StudyError, match=said):
        METHODS[method](PairReadouts(positive, negative))


def test_a_layers_directions_come_from_the_block_and_the_pooling_that_the_study_pairs_it_with() -> None:
    study = Study.model_validate(
        {
            "name": "s",
            "model": "m",
            "skip_first": 2,
            "extract": {"layers": [4], "extract_offset": -1},
            "steer": {"layers": [4], "alphas": [0], "scenarios": ["s"]},
        }
    )
    texts: Any = {name: (ReadText("p", "00", 9),) * 2 for name in ("train_positive", "train_negative")}
    arrays = {}
    for skip_first in (0, 2):
        for block in (3, 4):
            # only block 3 without the first 2 tokens differs along the first axis
            axis = 0 if (skip_first, block) == (2, 3) else 1
            arrays[ReadoutKey("train_positive", skip_first, block)] = np.eye(2, dtype=np.float32)[[axis, axis]]
            arrays[ReadoutKey("train_negative", skip_first, block)] = np.zeros((2, 2), np.float32)
    directions = make_directions(study, StudyReadouts(texts, arrays))
    assert {(one.name, one.layer) for one in directions.values()} == {
        ("empathy", 4),
        ("empathy-logistic-regression", 4),
        ("empathy-pca", 4),
    }
    for direction in directions.values():
        np.testing.assert_allclose(direction.vector, [1, 0], atol=1e-6)


def test_the_mean_residual_norm_is_the_mean_of_the_norms_not_the_norm_of_the_mean() -> None:
    assert mean_residual_norm(pairs([[3.0, 4.0]], [[-9.0, -12.0]])) == 10.0


@pytest.mark.parametrize("value", [0.0, np.inf])
def test_a_useless_norm_is_refused(value: float) -> None:
    with pytest.raises(StudyError, match="mean residual norm"):
        mean_residual_norm(PairReadouts(np.full((2, 3), value), np.full((2, 3), value)))
