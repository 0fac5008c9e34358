from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from batch_jobs.directions.auroc import AurocEstimate
from batch_jobs.directions.baselines import SeparationBaseline, summarise_random_aurocs
from batch_jobs.directions.layer_choice import LayerChoice
from batch_jobs.directions.left_out import LeftOutGroup
from batch_jobs.directions.validate_layer import LayerValidation, ValidationError
from batch_jobs.directions.validation_file import (
    AblatedLayer,
    LexicalAblation,
    MethodValidation,
    OutdatedValidation,
    PoolingValidation,
    Validation,
    read_validation,
    write_validation,
)
from batch_jobs.directions.word_baselines import BeyondWords, WordBaselines

ESTIMATE = AurocEstimate(0.9, 0.7, 0.97)
WORDS = WordBaselines(ESTIMATE, AurocEstimate(0.4, 0.2, 0.6))


def layer_validation(layer: int, *, auroc: float = 1.0) -> LayerValidation:
    return LayerValidation(layer, auroc, 0.7, 1.0, 0.9, 0.8, 0.95, 0.1, 0.8, 0.7, 0.85, 0.2, 1.0, -1.0, 2.0, 0.5, 0.6)


def validation(**changes: Any) -> Validation:
    layers = {12: layer_validation(12), 8: layer_validation(8, auroc=0.8)}
    pooling = PoolingValidation(0, {**layers, 7: layer_validation(7)}, {7: 90.0, 8: 96.5, 12: 142.0})
    method = MethodValidation(1.0, 0.9, 1.0, 0.9, 0.8, 0.7)
    return replace(
        Validation(
            layers=layers,
            best_layer=12,
            layer_choice=LayerChoice("scenario", 5, {8: ESTIMATE, 12: ESTIMATE}, {8: 1.5, 12: None}, ESTIMATE),
            words=WORDS,
            beyond_words={12: BeyondWords(ESTIMATE, ESTIMATE, 0.0, -0.1, 0.1, "undecided", at_ceiling=False)},
            left_out_scenarios={"maze": LeftOutGroup(4, {8: ESTIMATE, 12: ESTIMATE}, WORDS)},
            left_out_writers={},
            mean_residual_norms={8: 96.5, 12: 142.0},
            skip_first=0,
            methods={12: {"mean_difference": method, "pca": method}, 8: {"logistic_regression": method}},
            pooling={0: pooling, 1: replace(pooling, skip_first=1)},
            random_baseline={
                12: summarise_random_aurocs([0.25, 0.75], 1.0, separation=SeparationBaseline(9.0, 3.0, 4.0, 0.01)),
                8: summarise_random_aurocs([0.5] * 2, 1.0),
            },
            ablation=LexicalAblation(41, (3, 0, 7), {12: AblatedLayer(layers[12], layers[8])}, WORDS),
            extra={"train_pairs": 35, "extract_offset": -1},
        ),
        **changes,
    )


@pytest.mark.parametrize("changes", [{}, {"ablation": None}])
def test_file_round_trip_keeps_everything(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "new" / "validation.json"
    written = validation(**changes)
    write_validation(path, written)
    assert read_validation(path) == written
    assert [file.name for file in path.parent.iterdir()] == ["validation.json"]

    document = json.loads(path.read_text())
    assert document["best_layer"] == 12
    assert {"auroc", "accuracy", "separation", "std_positive", "std_negative"} <= set(document["layers"]["8"])
    assert document["extract_offset"] == -1


def test_the_sweep_is_every_block_read_under_the_studys_own_pooling() -> None:
    one = validation()
    own = replace(one.pooling[1], blocks={block: layer_validation(block, auroc=0.6) for block in (7, 8, 12)})
    assert validation(skip_first=1, pooling={0: one.pooling[0], 1: own}).sweep == own.blocks


@pytest.mark.parametrize(
    ("skip_first", "label"),
    [(0, "all tokens"), (1, "without the first token"), (4, "without the first 4 tokens")],
)
def test_a_pooling_says_what_it_leaves_out(skip_first: int, label: str) -> None:
    assert PoolingValidation(skip_first, {}, {}).label == label


def test_a_refused_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "validation.json"
    write_validation(path, validation())
    before = path.read_bytes()
    with pytest.raises(ValidationError, match="reserved"):
        write_validation(path, validation(extra={"best_layer": 3}))
    with pytest.raises(ValidationError, match="reserved"):
        write_validation(path, validation(extra={"format": 3}))
    with pytest.raises(ValidationError, match="cannot be written as JSON"):
        write_validation(path, validation(mean_residual_norms={8: math.nan}))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["validation.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no validation file"),
        ("{", "not JSON"),
        ("[]", "got list"),
        ('{"format": 2, "layers": {}}', r"lacks best_layer, .*delete it and run the study again"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "validation.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValidationError, match=message) as caught:
        read_validation(path)
    assert str(path) in str(caught.value)


# the first as an earlier version wrote it
@pytest.mark.parametrize("text", ['{"layers": {}, "best_layer": 8, "mean_residual_norms": {}}', '{"format": 3}'])
def test_a_file_of_another_version_is_told_from_a_broken_one(tmp_path: Path, text: str) -> None:
    path = tmp_path / "validation.json"
    path.write_text(text)
    with pytest.raises(OutdatedValidation, match=r"has format [13], this version writes 2; run the study again"):
        read_validation(path)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("layers", "8", "auroc"), "high", r"field layers\.8\.auroc: .*number"),
        (("methods", "12"), {"guess": {}}, r"field methods\.12\.guess"),
        (("best_layer",), 3, r"best_layer 3 but has results for \[8, 12\]"),
        (("skip_first",), 2, r"skip_first 2 but has results for \[0, 1\]"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, place: tuple[str, ...], value: Any, message: str) -> None:
    path = tmp_path / "validation.json"
    write_validation(path, validation())
    document = inner = json.loads(path.read_text())
    for part in place[:-1]:
        inner = inner[part]
    inner[place[-1]] = value
    path.write_text(json.dumps(document))
    with pytest.raises(ValidationError, match=message):
        read_validation(path)
