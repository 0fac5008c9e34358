from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batch_jobs.validate import (
    LayerValidation,
    ValidationError,
    best_layer,
    read_validation,
    validate_layer,
    write_validation,
)

DIRECTION = np.array([1.0, 0.0], dtype=np.float32)


def column(*values: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Readouts whose projections on DIRECTION are `values`; the second coordinate must not matter."""
    return np.array([[value, 100.0 * index] for index, value in enumerate(values)], dtype=np.float32)


def result(layer: int, *, auroc: float = 1.0, separation: float = 2.0, std: float = 1.0) -> LayerValidation:
    return LayerValidation(layer, auroc, 0.9, 0.0, separation / 2, -separation / 2, separation, std, std)


def test_numbers_agree_with_a_hand_computation() -> None:
    # pairs (empathic, other) won: 1 > {0, -2}; 3 > {0, 2, -2}; 5 > all three; 8 of 9
    got = validate_layer(7, column(1, 3, 5), column(0, 2, -2), DIRECTION)
    assert got.layer == 7
    assert got.auroc == pytest.approx(8 / 9)
    assert (got.mean_empathic, got.mean_non_empathic, got.separation) == (3.0, 0.0, 3.0)
    assert got.threshold == 1.5
    assert got.accuracy == pytest.approx(4 / 6)  # 1 falls below the threshold, 2 above it
    assert got.std_empathic == pytest.approx(math.sqrt(8 / 3))  # population: /3, not /2
    assert got.std_non_empathic == pytest.approx(math.sqrt(8 / 3))


def test_a_direction_pointing_the_wrong_way_scores_below_chance() -> None:
    got = validate_layer(0, column(-1, -2), column(1, 2), DIRECTION)
    assert (got.auroc, got.accuracy, got.separation) == (0.0, 0.0, -3.0)


def test_ties_count_one_half() -> None:
    assert validate_layer(0, column(1, 1), column(1, 1), DIRECTION).auroc == 0.5


def test_float16_readouts_do_not_overflow() -> None:
    empathic, other = np.full((40, 2), 60000, np.float16), np.full((40, 2), -60000, np.float16)
    assert validate_layer(0, empathic, other, DIRECTION).separation == pytest.approx(120000, rel=1e-3)


def test_classes_may_differ_in_size() -> None:
    assert validate_layer(0, column(5), column(0, 1, 2), DIRECTION).auroc == 1.0


@pytest.mark.parametrize(
    ("empathic", "other", "direction", "message"),
    [
        (column(1), column(0), np.array([2.0, 0.0]), "norm 2"),
        (column(1), column(0), np.array([np.nan, 0.0]), "norm nan"),
        (column(1), column(0), np.eye(2), r"shape \(2, 2\)"),
        (np.zeros((0, 2)), column(0), DIRECTION, r"the empathic readouts have shape \(0, 2\)"),
        (column(1), np.zeros((3, 5)), DIRECTION, r"non-empathic readouts have shape \(3, 5\)"),
        (column(1), np.zeros(2), DIRECTION, r"needs \(N, 2\)"),
        (column(1, math.inf), column(0), DIRECTION, "NaN or infinity"),
    ],
)
def test_unusable_inputs_are_refused_with_what_was_got(empathic: Any, other: Any, direction: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        validate_layer(3, empathic, other, direction)


def test_best_layer_breaks_auroc_ties_by_separation_in_stds_then_by_depth() -> None:
    wide_but_noisy, tight = result(8, separation=9.0, std=9.0), result(12, separation=4.0, std=1.0)
    assert best_layer({8: wide_but_noisy, 12: tight, 16: result(16, auroc=0.99, separation=99)}) == 12
    assert best_layer({20: result(20), 4: result(4)}) == 4
    with pytest.raises(ValidationError, match="at least one layer"):
        best_layer({})


def test_constant_projections_have_no_finite_separation_in_stds() -> None:
    assert result(0, separation=1.0, std=0.0).separation_in_stds == math.inf
    assert result(0, separation=0.0, std=0.0).separation_in_stds == 0.0


def test_file_round_trip_keeps_layers_best_layer_and_extra(tmp_path: Path) -> None:
    path = tmp_path / "new" / "validation.json"
    results = {12: result(12), 8: result(8, auroc=0.8)}
    write_validation(path, results, {"mean_residual_norm": {8: 96.5, 12: 142.0}, "pooling": "mean"})

    document = json.loads(path.read_text())
    assert list(document["layers"]) == ["8", "12"]
    assert {"auroc", "accuracy", "separation", "std_empathic", "std_non_empathic"} <= set(document["layers"]["8"])
    assert document["best_layer"] == 12

    back = read_validation(path)
    assert (back.layers, back.best_layer) == (results, 12)
    assert back.extra == {"mean_residual_norm": {"8": 96.5, "12": 142.0}, "pooling": "mean"}
    assert [file.name for file in path.parent.iterdir()] == ["validation.json"]


def test_a_refused_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "validation.json"
    write_validation(path, {1: result(1)})
    before = path.read_bytes()
    with pytest.raises(ValidationError, match="reserved"):
        write_validation(path, {1: result(1)}, {"best_layer": 3})
    with pytest.raises(ValidationError, match="cannot be written as JSON"):
        write_validation(path, {1: result(1)}, {"norm": math.nan})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["validation.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no validation file"),
        ("{", "is not JSON"),
        ('{"layers": {}}', "best_layer"),
        ('{"layers": {"8": {"auroc": 1}}, "best_layer": 8}', "layer"),
        ('{"layers": {}, "best_layer": 8}', "names layer 8 as best"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "validation.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValidationError, match=message) as caught:
        read_validation(path)
    assert str(path) in str(caught.value)
