from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from batch_jobs.directions.auroc import AurocEstimate
from batch_jobs.directions.layer_choice import LayerChoice
from batch_jobs.directions.validate_layer import LayerValidation
from batch_jobs.directions.validation_file import Validation
from batch_jobs.directions.word_baselines import WordBaselines
from batch_jobs.scoring.compute_scores import score_table
from batch_jobs.scoring.scores_csv import ScoreError, Scores
from batch_jobs.scoring.sign_and_layer_findings import make_findings, read_findings, write_findings

KIND = "I am sorry, I hear you and I want to help; let us stop here and talk this over together."
COLD = "The objective comes first, so proceed along the shortest path and finish before the clock runs out."
LOOP = "move " * 20


def row(alpha: float, completion: str, **changes: Any) -> dict[str, Any]:
    return {
        "model": "m", "layer": 8, "scenario": "s", "direction": "kind", "op": "add", "span": "all",
        "alpha": alpha, "alpha_residual_norm": alpha / 100, "completion": completion, "completion_tokens": 20,
        "projection_generated": None, "log_likelihood": -1.0, "error": None,
    } | changes  # fmt: skip


def scored(cells: dict[float, list[str]], **changes: Any) -> Scores:
    rows = [row(alpha, text, **changes) for alpha, texts in cells.items() for text in texts]
    return score_table(pa.Table.from_pylist(rows))


def both(first: Scores, second: Scores) -> Scores:
    return Scores(first.conditions + second.conditions, first.success + second.success)


def validation(aurocs: dict[int, float]) -> Validation:
    layers = {
        layer: LayerValidation(
            layer=layer, auroc=auroc, auroc_low=auroc, auroc_high=auroc, accuracy=1.0, accuracy_low=0.9,
            accuracy_high=1.0, threshold=0.0, accuracy_train_threshold=1.0, accuracy_train_threshold_low=0.9,
            accuracy_train_threshold_high=1.0, threshold_train=0.0, mean_positive=1.0, mean_negative=-1.0,
            separation=2.0, std_positive=1.0, std_negative=1.0,
        )
        for layer, auroc in aurocs.items()
    }  # fmt: skip
    unknown = AurocEstimate(0.5, 0.0, 1.0)
    return Validation(
        layers=layers, best_layer=max(aurocs, key=lambda layer: aurocs[layer]), mean_residual_norms={}, skip_first=0,
        methods={}, pooling={}, random_baseline={}, ablation=None, extra={},
        layer_choice=LayerChoice("scenario", 0, {}, {}, None), words=WordBaselines(unknown, unknown), beyond_words={},
        left_out_scenarios={}, left_out_writers={},
    )  # fmt: skip


LOPSIDED = {-5.0: [COLD, LOOP], 0.0: [KIND, COLD], 5.0: [KIND, COLD]}


def test_asymmetry_counts_what_each_sign_does_to_rate_and_coherence() -> None:
    (found,) = make_findings(scored(LOPSIDED)).asymmetries
    assert (found.gain, found.loss, found.index) == (0.0, 0.5, -1.0)
    assert (found.coherence_positive, found.coherence_negative, found.coherence_asymmetry) == (1.0, 0.5, 0.5)


def test_alphas_of_one_sign_have_no_asymmetry() -> None:
    assert make_findings(scored({0.0: [KIND], 5.0: [KIND]})).asymmetries == ()


def test_failures_are_told_apart_by_the_sign_of_alpha_and_weighted_by_samples() -> None:
    first = scored({-5.0: [LOOP], -9.0: ["", "", ""], 0.0: [KIND, COLD], 5.0: [KIND]})
    second = scored({-5.0: ["Output: 'open_door'"] * 4, 0.0: [COLD, COLD], 5.0: [COLD]}, scenario="t")
    negative, zero, positive = make_findings(both(first, second)).failures
    assert [entry.sign for entry in (negative, zero, positive)] == ["negative", "zero", "positive"]
    assert [entry.samples for entry in (negative, zero, positive)] == [8, 4, 2]
    assert (negative.loop_rate, negative.empty_rate, negative.code_like_rate) == (1 / 8, 3 / 8, 4 / 8)
    assert (negative.coherence_rate, zero.coherence_rate, positive.loop_rate) == (0.0, 1.0, 0.0)
    assert zero.mean_log_likelihood == -1.0


def test_unsteered_rows_stand_for_every_direction_of_their_layer() -> None:
    scores = scored(LOPSIDED)
    other = [replace(condition, direction="other") for condition in scores.conditions if condition.alpha]
    findings = make_findings(Scores(scores.conditions + tuple(other), scores.success))
    assert [(entry.direction, entry.samples) for entry in findings.failures if entry.sign == "zero"] == [
        ("kind", 2),
        ("other", 2),
    ]


def test_the_best_steering_layer_need_not_be_the_best_detection_layer() -> None:
    weak = scored({-5.0: [KIND, COLD], 0.0: [KIND, COLD], 5.0: [KIND, KIND]})
    strong = scored({-5.0: [COLD, COLD], 0.0: [KIND, COLD], 5.0: [KIND, KIND]}, layer=12)
    (found,) = make_findings(both(weak, strong), validation({8: 1.0, 12: 0.9, 20: 0.95})).layers
    assert (found.best_steering_layer, found.best_detection_layer) == (12, 8)
    assert [(merit.layer, merit.corrected_success_rate, merit.auroc) for merit in found.layers] == [
        (8, 0.5, 1.0),
        (12, 1.0, 0.9),
    ]


def test_equal_success_goes_to_the_steeper_dose_response_and_then_to_the_lower_layer() -> None:
    cells = {-5.0: [COLD, COLD], 0.0: [KIND, COLD], 5.0: [KIND, KIND]}
    flat = {-5.0: [COLD, COLD, KIND], 0.0: [KIND, COLD], 5.0: [KIND, KIND, COLD]}
    (found,) = make_findings(both(scored(flat), scored(cells, layer=12))).layers
    assert found.best_steering_layer == 12
    (found,) = make_findings(both(scored(cells, layer=12), scored(cells))).layers
    assert found.best_steering_layer == 8
    assert found.best_detection_layer is None


def test_layers_where_nothing_is_decidable_are_not_ranked() -> None:
    (found,) = make_findings(scored({0.0: [KIND], 5.0: [KIND]})).layers
    assert found.best_steering_layer is None
    assert found.layers[0].corrected_success_rate is None
    assert found.layers[0].auroc is None


def test_findings_come_back_from_their_file_unchanged(tmp_path: Path) -> None:
    findings = make_findings(scored(LOPSIDED), validation({8: 0.75}))
    write_findings(tmp_path / "findings.json", findings)
    assert read_findings(tmp_path / "findings.json") == findings


@pytest.mark.parametrize("content", ["{", "[]", '{"asymmetries": []}'])
def test_a_wrong_findings_file_is_named_in_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "findings.json"
    with pytest.raises(ScoreError, match="no findings file"):
        read_findings(path)
    path.write_text(content)
    with pytest.raises(ScoreError, match="score the generations again") as caught:
        read_findings(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
