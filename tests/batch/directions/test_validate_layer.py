from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from batch_jobs.directions.readout_file import PairReadouts
from batch_jobs.directions.validate_layer import LayerValidation, ValidationError, validate_layer

DIRECTION = np.array([1.0, 0.0], dtype=np.float32)


def column(*values: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Readouts whose projections on DIRECTION are `values`; the second coordinate must not matter."""
    return np.array([[value, 100.0 * index] for index, value in enumerate(values)], dtype=np.float32)


TRAIN = PairReadouts(column(3), column(-1))


def validated(
    positive: Any, other: Any, direction: Any = DIRECTION, *, train: PairReadouts = TRAIN, layer: int = 0
) -> LayerValidation:
    return validate_layer(layer, direction, train=train, test=PairReadouts(positive, other))


def result(layer: int, *, auroc: float = 1.0, separation: float = 2.0, std: float = 1.0) -> LayerValidation:
    return LayerValidation(
        layer=layer,
        auroc=auroc,
        auroc_low=auroc,
        auroc_high=auroc,
        accuracy=0.9,
        accuracy_low=0.8,
        accuracy_high=0.95,
        threshold=0.0,
        accuracy_train_threshold=0.9,
        accuracy_train_threshold_low=0.8,
        accuracy_train_threshold_high=0.95,
        threshold_train=0.0,
        mean_positive=separation / 2,
        mean_negative=-separation / 2,
        separation=separation,
        std_positive=std,
        std_negative=std,
    )


def test_numbers_agree_with_a_hand_computation() -> None:
    # pairs (positive, other) won: 1 > {0, -2}; 3 > {0, 2, -2}; 5 > all three; 8 of 9
    got = validated(column(1, 3, 5), column(0, 2, -2), layer=7)
    assert got.layer == 7
    assert got.auroc == pytest.approx(8 / 9)
    assert (got.mean_positive, got.mean_negative, got.separation) == (3.0, 0.0, 3.0)
    assert got.threshold == 1.5
    assert got.accuracy == pytest.approx(4 / 6)  # 1 falls below the threshold, 2 above it
    assert got.std_positive == pytest.approx(math.sqrt(8 / 3))  # population: /3, not /2
    assert got.std_negative == pytest.approx(math.sqrt(8 / 3))


def test_the_train_threshold_is_fitted_on_train_texts_and_judged_on_test_texts() -> None:
    # train class means 10 and -4, so 3; of the test texts only 5 and 3 reach it, and the others stay below it
    got = validated(column(1, 3, 5), column(0, 2, -2), train=PairReadouts(column(9, 11), column(-8, 0)))
    assert got.threshold_train == 3.0
    assert got.accuracy_train_threshold == pytest.approx(5 / 6)


def test_the_interval_holds_the_auroc_of_overlapping_classes() -> None:
    got = validated(column(1, 3, 5, 2), column(0, 2, -2, 4))
    assert 0.0 <= got.auroc_low < got.auroc < got.auroc_high <= 1.0


def test_a_direction_pointing_the_wrong_way_scores_below_chance() -> None:
    got = validated(column(-1, -2), column(1, 2))
    assert (got.auroc, got.accuracy, got.separation) == (0.0, 0.0, -3.0)


def test_float16_readouts_do_not_overflow() -> None:
    positive, other = np.full((40, 2), 60000, np.float16), np.full((40, 2), -60000, np.float16)
    assert validated(positive, other).separation == pytest.approx(120000, rel=1e-3)


def test_classes_may_differ_in_size() -> None:
    assert validated(column(5), column(0, 1, 2)).auroc == 1.0


@pytest.mark.parametrize(
    ("positive", "other", "direction", "message"),
    [
        (column(1), column(0), np.array([2.0, 0.0]), "norm 2"),
        (column(1), column(0), np.array([np.nan, 0.0]), "norm nan"),
        (column(1), column(0), np.eye(2), r"shape \(2, 2\)"),
        (np.zeros((0, 2)), column(0), DIRECTION, r"the positive test readouts have shape \(0, 2\)"),
        (column(1), np.zeros((3, 5)), DIRECTION, r"negative test readouts have shape \(3, 5\)"),
        (column(1), np.zeros(2), DIRECTION, r"needs \(N, 2\)"),
        (column(1, math.inf), column(0), DIRECTION, "NaN or infinity"),
    ],
)
def test_unusable_inputs_are_refused_with_what_was_got(positive: Any, other: Any, direction: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        validated(positive, other, direction)


@pytest.mark.parametrize(("right", "low", "high"), [(30, 0.8865, 1.0), (15, 0.3315, 0.6685), (0, 0.0, 0.1135)])
def test_an_accuracy_has_wilsons_interval(right: int, low: float, high: float) -> None:
    # z = 1.96 and n = 30: 30 of 30 leaves 1 - z²/(n + z²), half of them 0.5 ± z·sqrt(n + z²)/(2(n + z²))
    texts = np.linspace(1, 2, 15)
    positive = column(*np.where(np.arange(15) < right, texts, -texts))
    other = column(*np.where(np.arange(15, 30) < right, -texts, texts))
    got = validated(positive, other, train=PairReadouts(column(1), column(-1)))
    assert got.accuracy_train_threshold == pytest.approx(right / 30)
    assert got.accuracy_train_threshold_low == pytest.approx(low, abs=1e-4)
    assert got.accuracy_train_threshold_high == pytest.approx(high, abs=1e-4)


def test_constant_projections_have_no_finite_separation_in_stds() -> None:
    assert result(0, separation=1.0, std=0.0).separation_in_stds == math.inf
    assert result(0, separation=0.0, std=0.0).separation_in_stds == 0.0
