from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from batch_jobs.config.study import Study
from batch_jobs.rows.grid import Condition, conditions, row_id, rows, sample_seed

CONDITION = Condition(
    model="demo-model",
    layer=16,
    direction="empathy",
    alpha=28.8,
    alpha_residual_norm=0.2,
    alpha_unit="residual_norm",
    scenario_id="food_delivery",
    op="add",
    span="all",
)


def make_study(**steer: Any) -> Study:
    grid = {"layers": [16], "alphas": [-2.0, 0.0, 2.0], "scenarios": ["s", "t"], "samples": 2}
    return Study.model_validate(
        {"name": "x", "model": "m", "extract": {"layers": [12, 16]}, "steer": {**grid, **steer}}
    )


def test_a_row_id_is_what_it_was_in_earlier_versions() -> None:
    # A literal on purpose: if it changes, no stored study can be resumed.
    assert row_id(CONDITION, 3) == "ae6cd12e5b55b2c6"


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"layer": 12},
        {"direction": "care"},
        {"alpha_residual_norm": 0.4},
        {"alpha_unit": "raw"},
        {"scenario_id": "the_maze"},
        {"op": "set"},
        {"span": "generated"},
    ],
)
def test_a_row_id_depends_on_every_part_of_the_condition(change: dict[str, Any]) -> None:
    assert row_id(replace(CONDITION, **change), 3) != row_id(CONDITION, 3)


def test_a_row_id_ignores_the_derived_alpha() -> None:
    assert row_id(replace(CONDITION, alpha=28.800001), 3) == row_id(CONDITION, 3)
    raw = replace(CONDITION, alpha_unit="raw")
    assert row_id(replace(raw, alpha_residual_norm=0.2000001), 3) == row_id(raw, 3)


def test_growing_the_grid_keeps_the_ids_of_the_rows_that_were_there() -> None:
    norms = {12: 5.0, 16: 10.0}
    small = make_study()
    large = make_study(layers=[12, 16], alphas=[3.0, 0.0, -2.0, 2.0], scenarios=["u", "t", "s"], samples=4)
    small_rows = list(rows(small, conditions(small, norms)))
    large_rows = {row.row_id: row for row in rows(large, conditions(large, norms))}
    assert len(small_rows) == 3 * 2 * 2
    assert len(large_rows) == 2 * 4 * 3 * 4  # all distinct
    assert all(large_rows[row.row_id] == row for row in small_rows)


def test_alpha_is_written_in_both_units() -> None:
    by_norm = make_study(alpha_unit="residual_norm")
    cells = list(conditions(by_norm, {16: 10.0}))
    assert [(cell.alpha, cell.alpha_residual_norm) for cell in cells[:3]] == [(-20, -2), (0, 0), (20, 2)]
    cells = list(conditions(make_study(), {16: 10.0}))
    assert [(cell.alpha, cell.alpha_residual_norm) for cell in cells[:3]] == [(-2, -0.2), (0, 0), (2, 0.2)]


def test_each_layer_and_scenario_has_one_unsteered_baseline() -> None:
    study = make_study(layers=[12, 16])
    baselines = [cell for cell in conditions(study, {12: 1.0, 16: 1.0}) if not cell.steered]
    assert sorted((cell.layer, cell.scenario_id) for cell in baselines) == [(12, "s"), (12, "t"), (16, "s"), (16, "t")]


def test_controls_go_through_the_same_grid_and_leave_the_other_rows_as_they_were() -> None:
    norms = {12: 5.0, 16: 10.0}
    plain = make_study(layers=[12, 16])
    controlled = make_study(layers=[12, 16], controls={"random": 2})
    without = list(rows(plain, conditions(plain, norms)))
    found = list(rows(controlled, conditions(controlled, norms)))
    assert [row for row in found if not row.condition.is_control] == without
    for name in ("empathy.control0", "empathy.control1"):
        twins = [row for row in found if row.condition.direction == name]
        steered = [row for row in without if row.condition.steered]
        assert [(replace(row.condition, direction="empathy"), row.sample, row.seed) for row in twins] == [
            (row.condition, row.sample, row.seed) for row in steered
        ]
    assert len({row.row_id for row in found}) == len(found)


def test_a_direction_file_steers_at_its_own_layer_and_the_baseline_is_still_there() -> None:
    entries = [{"file": "a.npy", "name": "mine", "layer": 16}, "mean_difference"]
    cells = list(conditions(make_study(layers=[12, 16], directions=entries), {12: 1.0, 16: 1.0}))
    assert {cell.direction for cell in cells if cell.layer == 12} == {"empathy"}
    assert {cell.direction for cell in cells if cell.layer == 16} == {"mine", "empathy"}
    baselines = [(cell.layer, cell.scenario_id) for cell in cells if not cell.steered]
    assert sorted(baselines) == [(12, "s"), (12, "t"), (16, "s"), (16, "t")]


def test_alpha_in_separations_is_that_of_each_direction_and_a_controls_that_of_its_own() -> None:
    study = make_study(alpha_unit="separation", directions=["mean_difference", "pca"], controls={"random": 1})
    separations = {("empathy", 16): 4.0, ("empathy-pca", 16): 3.0}
    cells = list(conditions(study, {16: 10.0}, separations))
    top = {cell.direction: cell for cell in cells if cell.scenario_id == "s" and cell.alpha > 0}
    assert {name: cell.alpha for name, cell in top.items()} == {
        "empathy": 8.0, "empathy.control0": 8.0, "empathy-pca": 6.0, "empathy-pca.control0": 6.0,
    }  # fmt: skip
    assert {(cell.alpha_separation, cell.alpha_residual_norm) for cell in top.values()} == {(2.0, 0.8), (2.0, 0.6)}
    again = conditions(study, {16: 10.0}, {key: value * (1 + 1e-9) for key, value in separations.items()})
    assert [row_id(cell, 0) for cell in cells] == [row_id(cell, 0) for cell in again]
    with pytest.raises(ValueError, match="the separation is None"):
        list(conditions(study, {16: 10.0}))


def test_alpha_in_separations_is_told_beside_the_other_units_and_changes_no_id() -> None:
    study = make_study()
    cells = list(conditions(study, {16: 10.0}, {("empathy", 16): 4.0}))
    assert [cell.alpha_separation for cell in cells[:3]] == [-0.5, 0.0, 0.5]
    assert [row_id(cell, 0) for cell in cells] == [row_id(cell, 0) for cell in conditions(study, {16: 10.0})]
    reversed_one = list(conditions(study, {16: 10.0}, {("empathy", 16): -4.0}))
    assert {cell.alpha_separation for cell in reversed_one} == {None}


def test_minus_zero_is_the_baseline_too() -> None:
    study = make_study(alphas=[-0.0, 1.0])
    baseline = next(iter(conditions(study, {16: 1.0})))
    assert str(baseline.alpha) == "0.0"
    assert not baseline.steered


def test_a_sample_meets_the_same_noise_at_every_alpha_and_layer() -> None:
    study = make_study(layers=[12, 16])
    seeds: dict[tuple[str, int], set[int]] = {}
    for row in rows(study, conditions(study, {12: 1.0, 16: 1.0})):
        seeds.setdefault((row.condition.scenario_id, row.sample), set()).add(row.seed)
    assert all(len(found) == 1 for found in seeds.values())
    assert len(set.union(*seeds.values())) == len(seeds) == 4


def test_seeds_are_fixed_by_study_seed_scenario_and_sample() -> None:
    assert sample_seed(0, "s", 1) == sample_seed(0, "s", 1)
    assert len({sample_seed(0, "s", 1), sample_seed(1, "s", 1), sample_seed(0, "t", 1), sample_seed(0, "s", 2)}) == 4
    assert all(0 <= sample_seed(0, "s", sample) < 2**31 for sample in range(50))
