"""Which rows of the success rates the primary hypothesis is about."""

from __future__ import annotations

import pyarrow as pa
import pytest

from batch_jobs.config.primary import Primary
from batch_jobs.rows.generation_parts import ScoreError
from batch_jobs.scoring.compute_scores import score_table
from batch_jobs.scoring.primary_rows import primary_control_rows, primary_rows
from batch_jobs.scoring.scores_csv import SuccessRate

SCENARIOS = ("s", "t")


@pytest.fixture(scope="module")
def rates() -> tuple[SuccessRate, ...]:
    shared = {"model": "m", "op": "add", "span": "all", "completion": "I help.", "completion_tokens": 3}
    unread = {"alpha_residual_norm": 0.0, "projection_generated": 0.0, "error": None}
    rows = [
        {"scenario": scenario, "layer": layer, "direction": direction, "alpha": alpha, **shared, **unread}
        for scenario in SCENARIOS
        for layer in (12, 16)
        for direction in ("empathy", "empathy.control0", "empathy.control1", "other", "other.control0")
        for alpha in (-1.0, 0.0, 1.0)
    ]
    return score_table(pa.Table.from_pylist(rows)).success


def test_the_rows_are_those_of_layer_direction_and_scenarios(rates: tuple[SuccessRate, ...]) -> None:
    found = primary_rows(Primary(direction="empathy", layer=16), rates, SCENARIOS)
    assert [(rate.scenario, rate.layer, rate.direction) for rate in found] == [
        ("s", 16, "empathy"),
        ("t", 16, "empathy"),
    ]
    (one,) = primary_rows(Primary(direction="other", layer=12, scenarios=("t",)), rates, SCENARIOS)
    assert (one.scenario, one.layer, one.direction) == ("t", 12, "other")


def test_the_controls_are_those_of_the_hypothesis_direction(rates: tuple[SuccessRate, ...]) -> None:
    found = primary_control_rows(Primary(direction="empathy", layer=16), rates, SCENARIOS)
    assert {name: [rate.scenario for rate in rows] for name, rows in found.items()} == {
        "empathy.control0": ["s", "t"],
        "empathy.control1": ["s", "t"],
    }
    assert {rate.layer for rows in found.values() for rate in rows} == {16}


def test_a_scenario_without_a_row_is_named(rates: tuple[SuccessRate, ...]) -> None:
    with pytest.raises(ScoreError, match="0 rows for empathy at layer 20 in s"):
        primary_rows(Primary(direction="empathy", layer=20), rates, SCENARIOS)
    with pytest.raises(ScoreError, match="2 rows for empathy at layer 16 in s"):
        primary_rows(Primary(direction="empathy", layer=16), (*rates, *rates), SCENARIOS)
