from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from batch_jobs.scoring.behaviour import BehaviourPoints
from batch_jobs.scoring.correlation import CorrelationError
from batch_jobs.scoring.direction_behaviour import MAX_POINTS, direction_behaviours, read_behaviour, write_behaviour


def points(
    projection: list[float],
    grade: list[int],
    *,
    alpha: list[float] | None = None,
    layer: list[int] | None = None,
    direction: list[str] | None = None,
    scenario: list[str] | None = None,
    judged: list[bool] | None = None,
    seed: list[float] | None = None,
) -> BehaviourPoints:
    count = len(projection)

    def words(values: list[str]) -> np.ndarray:
        return np.array(values, dtype=object)

    return BehaviourPoints(
        model=words(["tiny"] * count),
        layer=np.array(layer or [8] * count, dtype=np.int32),
        scenario=words(scenario or ["the_maze"] * count),
        direction=words(direction or ["kind"] * count),
        op=words(["add"] * count),
        span=words(["all"] * count),
        seed=np.array(seed or range(count), dtype=np.float64),
        alpha=np.array(alpha or [0.0] * count),
        projection_unsteered=np.array(projection),
        projection_generated=np.full(count, 1e6),  # would dominate every number that used it
        grade=np.array(grade, dtype=np.int8),
        judged=np.array(judged or [False] * count),
    )


def test_layers_and_directions_are_kept_apart() -> None:
    rising, falling = [1.0, 2.0, 3.0], [3.0, 2.0, 1.0]
    got = direction_behaviours(
        points(
            rising + falling + rising,
            [0, 1, 2] * 3,
            layer=[16] * 3 + [8] * 6,
            direction=["kind"] * 6 + ["kind-pca"] * 3,
        )
    )
    assert [(row.layer, row.direction) for row in got] == [(8, "kind"), (8, "kind-pca"), (16, "kind")]
    assert [round(row.samples.correlation.pearson_r or 0.0) for row in got] == [-1, 1, 1]


def test_completions_without_a_projection_are_left_out_and_counted() -> None:
    (got,) = direction_behaviours(points([1.0, math.nan, 2.0, 3.0, math.nan], [0, 2, 1, 2, 0]))
    assert got.left_out == 2
    assert got.samples.correlation.n == len(got.points) == 3
    assert got.samples.correlation.pearson_r == pytest.approx(1.0)


def test_a_run_that_read_no_completion_again_says_so_in_place_of_numbers() -> None:
    (got,) = direction_behaviours(points([math.nan] * 4, [0, 1, 2, 2]))
    assert (got.left_out, got.points) == (4, ())
    assert got.samples.correlation.undefined is not None
    assert "0 points" in got.samples.correlation.undefined


def test_unsteered_rows_are_also_looked_at_alone() -> None:
    # α drives projection and grade together; without it they run against each other
    (got,) = direction_behaviours(
        points([1.0, 2.0, 3.0, 10.0, 11.0, 12.0], [2, 1, 0, 2, 2, 2], alpha=[0.0, 0.0, 0.0, 5.0, 5.0, 5.0])
    )
    assert got.unsteered_samples.correlation.n == 3
    assert got.unsteered_samples.correlation.pearson_r == pytest.approx(-1.0)
    assert (got.samples.correlation.pearson_r or 0.0) > 0.0


def test_within_conditions_alpha_explains_nothing() -> None:
    # by hand: the cell means are (1, 0.5), (11, 1.5); what is left is (-1, -.5), (1, .5) and (-1, .5), (1, -.5)
    (got,) = direction_behaviours(
        points([0.0, 2.0, 10.0, 12.0], [0, 1, 2, 1], alpha=[0.0, 0.0, 5.0, 5.0], seed=[1.0, 2.0, 1.0, 2.0])
    )
    assert got.within_conditions.r == pytest.approx(0.0, abs=1e-12)
    assert (got.samples.correlation.pearson_r or 0.0) > 0.6
    (got,) = direction_behaviours(points([0.0, 2.0, 10.0, 12.0], [0, 1, 1, 2], alpha=[0.0, 0.0, 5.0, 5.0]))
    assert got.within_conditions.r == pytest.approx(1.0)


def test_samples_of_one_seed_are_one_cluster_and_samples_without_a_seed_are_many() -> None:
    rng = np.random.default_rng(0)
    projections, grades = rng.normal(size=40).tolist(), rng.integers(0, 3, size=40).tolist()
    alphas = [0.0] * 10 + [1.0] * 10 + [2.0] * 10 + [3.0] * 10

    def low(seed: list[float]) -> float | None:
        (got,) = direction_behaviours(points(projections, grades, alpha=alphas, seed=seed))
        return got.within_conditions.low

    two, own, none = low([1.0, 2.0] * 20), low([float(k) for k in range(40)]), low([math.nan] * 40)
    assert two is None  # an interval needs three clusters
    assert own == none
    assert own is not None
    assert low([float(k % 10) for k in range(40)]) != own


def test_a_condition_is_a_scenario_and_an_alpha() -> None:
    (got,) = direction_behaviours(
        points(
            [0, 2, 2, 4, 4, 6, 8, 6],
            [0, 0, 1, 1, 1, 1, 2, 2],
            scenario=["maze", "maze", "duel", "duel"] * 2,
            alpha=[0.0] * 4 + [5.0] * 4,
        )
    )
    assert got.conditions.n == 4
    # means by hand: (1, 0), (3, 1), (5, 1), (7, 2)
    assert got.conditions.pearson_r == pytest.approx(np.corrcoef([1, 3, 5, 7], [0, 1, 1, 2])[0, 1])


@pytest.mark.parametrize(
    ("judged", "said"),
    [([True] * 3, "judge"), ([False] * 3, "keywords"), ([True, False, True], "both")],
)
def test_who_graded_is_told(judged: list[bool], said: str) -> None:
    (got,) = direction_behaviours(points([1.0, 2.0, 3.0], [0, 1, 2], judged=judged))
    assert got.graded_by == said


def test_the_scatter_plot_gets_a_bounded_sample_and_the_coefficients_all_points() -> None:
    rng = np.random.default_rng(0)
    many = points(rng.normal(size=1000).tolist(), rng.integers(0, 3, size=1000).tolist())
    (got,), (again,) = direction_behaviours(many), direction_behaviours(many)
    assert got.samples.correlation.n == 1000
    assert len(got.points) == MAX_POINTS
    assert got.points == again.points
    stored = set(zip(many.projection_unsteered.tolist(), many.grade.tolist(), strict=True))
    assert {(point.projection, point.grade) for point in got.points} <= stored
    assert len(set(got.points)) == MAX_POINTS


def test_the_file_gives_back_what_was_written(tmp_path: Path) -> None:
    behaviours = direction_behaviours(
        points([1.0, 2.5, 3.0, math.nan], [0, 1, 2, 2], layer=[8, 8, 8, 12], judged=[True, False, True, True])
    )
    path = tmp_path / "run" / "behaviour.json"
    write_behaviour(path, behaviours)
    assert read_behaviour(path) == behaviours
    assert json.loads(path.read_text(encoding="utf-8"))["directions"][0]["samples"]["correlation"]["n"] == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no behaviour file"),
        ("{", "not JSON"),
        ("[]", "lacks the list"),
        ('{"directions": [{"layer": 8}]}', r"field directions\.0\.direction"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "behaviour.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(CorrelationError, match=said) as caught:
        read_behaviour(path)
    assert str(path) in str(caught.value)
