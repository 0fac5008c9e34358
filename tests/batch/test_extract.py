from __future__ import annotations

import numpy as np
import pytest

from batch_jobs.contrastive import Pair
from batch_jobs.extract import mean_difference, mean_residual_norm, pair_readouts, pair_texts
from batch_jobs.study import StudyError


def test_a_direction_is_the_unit_difference_of_the_class_means() -> None:
    empathic = np.array([[4.0, 0.0, 1.0], [2.0, 8.0, 1.0]])
    non_empathic = np.array([[0.0, 0.0, 1.0]])
    direction = mean_difference(empathic, non_empathic)
    assert direction.dtype == np.float32
    # (3, 4, 0) / 5; float32 holds these to 1e-7
    np.testing.assert_allclose(direction, [0.6, 0.8, 0.0], atol=1e-6)


def test_a_small_difference_of_large_means_survives() -> None:
    base = np.full((1000, 4), 1e4, dtype=np.float32)
    shifted = base.copy()
    shifted[:, 1] += 0.01
    np.testing.assert_allclose(mean_difference(shifted, base), [0, 1, 0, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("empathic", "non_empathic", "said"),
    [
        (np.ones((2, 3)), np.ones((4, 3)), "same mean readout"),
        (np.ones((2, 3)), np.ones((2, 4)), r"shapes \(2, 3\) and \(2, 4\)"),
        (np.ones(3), np.ones(3), "must be"),
        (np.ones((0, 3)), np.ones((2, 3)), "no readouts"),
        (np.full((2, 3), np.nan), np.ones((2, 3)), "NaN or infinity"),
    ],
)
def test_readouts_without_a_direction_are_refused(empathic: np.ndarray, non_empathic: np.ndarray, said: str) -> None:
    with pytest.raises(StudyError, match=said):
        mean_difference(empathic, non_empathic)


def test_the_mean_residual_norm_is_the_mean_of_the_norms_not_the_norm_of_the_mean() -> None:
    assert mean_residual_norm(np.array([[3.0, 4.0], [-3.0, -4.0]])) == 5.0


@pytest.mark.parametrize("readouts", [np.zeros((2, 3)), np.full((2, 3), np.inf)])
def test_a_useless_norm_is_refused(readouts: np.ndarray) -> None:
    with pytest.raises(StudyError, match="mean residual norm"):
        mean_residual_norm(readouts)


def test_readouts_find_back_to_their_sides() -> None:
    texts = pair_texts([Pair("1", "s", "kind 1", "cold 1"), Pair("2", "s", "kind 2", "cold 2")])
    assert texts == ["kind 1", "kind 2", "cold 1", "cold 2"]
    sides = pair_readouts(np.arange(8, dtype=np.float32).reshape(4, 2))
    assert sides.empathic_ND.tolist() == [[0, 1], [2, 3]]
    assert sides.non_empathic_ND.tolist() == [[4, 5], [6, 7]]
    with pytest.raises(StudyError, match="3 readouts"):
        pair_readouts(np.zeros((3, 2), dtype=np.float32))
