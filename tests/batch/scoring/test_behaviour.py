from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batch_jobs.scoring.behaviour import behaviour_points
from batch_jobs.scoring.scores_csv import ScoreError

KIND, COLD = "I am sorry and I want to help you.", "The objective comes first, so proceed."


def row(row_id: str, completion: str | None, **changes: Any) -> dict[str, Any]:
    return {
        "row_id": row_id,
        "model": "m",
        "layer": 8,
        "scenario": "s",
        "direction": "kind",
        "op": "add",
        "span": "all",
        "alpha": 1.0,
        "alpha_residual_norm": 0.1,
        "completion": completion,
        "completion_tokens": 20,
        "projection_generated": 3.0,
        "projection_unsteered": 0.5,
        "error": None,
    } | changes


def store(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), folder / f"part-{name}.parquet")


def test_each_completion_is_a_point_in_the_order_of_the_parts(tmp_path: Path) -> None:
    store(tmp_path, "b", [row("c", COLD, layer=9, alpha=-2.0, projection_unsteered=None)])
    store(tmp_path, "a", [row("a", KIND), row("b", None, error="engine died"), row("d", "", projection_generated=None)])
    points = behaviour_points(tmp_path)
    assert points.layer.tolist() == [8, 8, 9]
    assert points.alpha.tolist() == [1.0, 1.0, -2.0]
    assert points.grade.tolist() == [2, 1, 0]  # empathy words, neither kind, task words
    assert not points.judged.any()
    np.testing.assert_array_equal(points.projection_unsteered, [0.5, 0.5, np.nan])
    np.testing.assert_array_equal(points.projection_generated, [3.0, np.nan, 3.0])
    assert points.direction.tolist() == ["kind"] * 3


def test_the_judge_overrules_the_keywords(tmp_path: Path) -> None:
    store(tmp_path, "a", [row("a", KIND), row("b", KIND)])
    points = behaviour_points(tmp_path, {"b": 0, "elsewhere": 1})
    assert points.grade.tolist() == [2, 0]
    assert points.judged.tolist() == [False, True]


def test_tables_without_an_unsteered_projection_give_nan(tmp_path: Path) -> None:
    pq.write_table(
        pa.Table.from_pylist([row("a", KIND)]).drop_columns(["projection_unsteered"]), tmp_path / "part-a.parquet"
    )
    assert np.isnan(behaviour_points(tmp_path).projection_unsteered).all()


def test_no_generations_are_no_points_and_a_bad_part_is_named(tmp_path: Path) -> None:
    assert len(behaviour_points(tmp_path).grade) == 0
    (tmp_path / "part-x.parquet").write_bytes(b"no parquet")
    with pytest.raises(ScoreError, match=r"part-x\.parquet"):
        behaviour_points(tmp_path)
