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
from batch_jobs.scoring.block_outcomes import block_outcomes
from batch_jobs.scoring.compute_scores import decide, score_decided, score_table
from batch_jobs.scoring.measures import measure_table
from batch_jobs.scoring.scores_csv import ScoreError, Scores
from batch_jobs.scoring.sign_and_layer_findings import Findings, make_findings, read_findings, write_findings

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
    assert (found.gain, found.loss, found.gain_minus_loss) == (0.0, 0.5, -0.5)
    assert found.gain_minus_loss_low < -0.5 < 0.0 < found.gain_minus_loss_high  # of six samples
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
    assert [(merit.layer, merit.delta, merit.auroc) for merit in found.layers] == [(8, 0.5, 1.0), (12, 1.0, 0.9)]


def test_equal_effects_go_to_the_steeper_dose_response_and_then_to_the_lower_layer() -> None:
    cells = {-5.0: [COLD, COLD], 0.0: [KIND, KIND], 5.0: [KIND, KIND]}  # ρ .87
    flat = {-5.0: [COLD, COLD], 0.0: [KIND, COLD], 5.0: [KIND, KIND]}  # ρ .82
    (found,) = make_findings(both(scored(flat), scored(cells, layer=12))).layers
    assert found.best_steering_layer == 12
    (found,) = make_findings(both(scored(cells, layer=12), scored(cells))).layers
    assert found.best_steering_layer == 8
    assert found.best_detection_layer is None


def test_layers_without_both_signs_are_not_ranked() -> None:
    (found,) = make_findings(scored({0.0: [KIND], 5.0: [KIND]})).layers
    assert found.best_steering_layer is None
    assert found.layers[0].delta is None
    assert found.layers[0].auroc is None


def grid_rows(direction: str, hits: dict[float, int], *, layer: int = 8) -> list[dict[str, Any]]:
    """Five seeds in each of two scenarios; the first `hits` seeds of an α are kind."""
    return [
        row(alpha, KIND if seed < count else COLD, direction=direction, layer=layer, scenario=scenario, seed=seed)
        for scenario in ("s", "t")
        for alpha, count in hits.items()
        for seed in range(5)
    ]


def found_in(rows: list[dict[str, Any]]) -> Findings:
    measures = decide(measure_table(pa.Table.from_pylist(rows), {}))
    return make_findings(score_decided(measures), None, block_outcomes(measures))


STEERED = [
    *grid_rows("kind", {-5.0: 1, 0.0: 2, 5.0: 4}),
    *grid_rows("kind.control0", {-5.0: 2, 5.0: 2}),
    *grid_rows("kind.control1", {-5.0: 3, 5.0: 2}),
]


def test_the_whole_grid_has_one_effect_with_an_interval_and_a_p() -> None:
    (found,) = found_in(STEERED).grid
    assert (found.direction, found.layer, found.span, found.slope.blocks) == ("kind", 8, "all", 10)
    # least squares of 0/1 on three places 0, .5, 1 is the outcome at 1 minus that at 0: 0, 1, 1, 1, 0 by seed
    assert found.slope.value == pytest.approx(0.6)
    assert found.slope.low is not None
    assert 0.0 < found.slope.low < 0.6
    assert 0.001 < found.slope.p < 0.05


def test_a_direction_stands_against_its_controls_over_all_scenarios_and_in_each() -> None:
    found = found_in(STEERED).controls
    assert [(one.scenario, one.comparison.blocks) for one in found] == [(None, 10), ("s", 5), ("t", 5)]
    for one in found:
        assert one.controls == ("kind.control0", "kind.control1")
        assert one.comparison.delta == pytest.approx(0.6)
        assert one.comparison.control_deltas == pytest.approx((0.0, -0.2))
        assert one.comparison.difference == pytest.approx(0.7)
        assert one.comparison.rank_p == one.comparison.rank_p_floor == pytest.approx(1 / 3)
    assert found[0].comparison.p < found[1].comparison.p  # ten blocks say more than five


def test_controls_have_failure_signatures_and_no_findings_of_their_own() -> None:
    found = found_in(STEERED)
    assert {one.direction for one in found.failures} == {"kind", "kind.control0", "kind.control1"}
    for own in (found.asymmetries, found.layers, found.grid):
        assert {one.direction for one in own} == {"kind"}


def test_rows_without_seeds_go_by_their_sample_number_and_rows_with_neither_have_no_blocks() -> None:
    numbered = [{**one, "sample": one["seed"], "seed": None} for one in STEERED]
    assert found_in(numbered) == found_in(STEERED)
    bare = [{name: value for name, value in one.items() if name != "seed"} for one in STEERED]
    assert (found_in(bare).grid, found_in(bare).controls) == ((), ())


def test_findings_come_back_from_their_file_unchanged(tmp_path: Path) -> None:
    findings = replace(found_in(STEERED), layers=make_findings(scored(LOPSIDED), validation({8: 0.75})).layers)
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
