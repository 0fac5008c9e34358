"""Scoring a table of one's own."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from batch_jobs.rows.generation_parts import ScoreError
from batch_jobs.scoring.own_table import score_own_table
from batch_jobs.scoring.published_generations import PUBLISHED_COLUMNS

KIND = "I am sorry, I listen and I care.\nI want to help."
COLD = "I win the task, on the optimal path."
COLUMNS = {"alpha": [-1, -1, 0, 0, 1, 1], "completion": [COLD, COLD, KIND, COLD, KIND, KIND]}


def written(folder: Path, ending: str, **columns: list[Any]) -> Path:
    path = folder / f"mine{ending}"
    table = pa.table({**COLUMNS, **columns})
    if ending == ".csv":
        pa_csv.write_csv(table, path)
    else:
        pq.write_table(table, path)
    return path


def scored(path: Path) -> list[dict[str, str]]:
    with score_own_table(path, path.with_name("scores.csv")).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_two_columns_are_enough_in_either_format(tmp_path: Path, ending: str) -> None:
    (row,) = scored(written(tmp_path, ending))
    assert tuple(row)[:6] == PUBLISHED_COLUMNS
    assert tuple(row)[-3:] == ("direction", "op", "span")
    assert (row["scenario"], row["layer"], row["direction"]) == ("all", "0", "direction")
    assert (row["baseline_empathy_rate"], row["steering_success_rate"], row["num_alphas"]) == ("0.5", "1.0", "2")


def test_a_columns_own_outcome_takes_the_place_of_the_keywords(tmp_path: Path) -> None:
    # the texts say the opposite of these outcomes
    for name, values in (("outcome", [1, 1, 1, 0, 0, 0]), ("grade", [2, 2, 2, 1, 0, 1])):
        (row,) = scored(written(tmp_path, ".csv", **{name: values}))
        assert (row["baseline_empathy_rate"], row["steering_success_rate"]) == ("0.5", "0.0")
    (row,) = scored(written(tmp_path, ".parquet", outcome=[False, False, False, True, True, True]))
    assert (row["baseline_empathy_rate"], row["steering_success_rate"]) == ("0.5", "1.0")


def test_directions_and_scenarios_are_told_apart(tmp_path: Path) -> None:
    path = written(tmp_path, ".csv", direction=["a", "b", "a", "b", "a", "b"], scenario=["s"] * 6)
    rows = scored(path)
    assert [(row["scenario"], row["direction"], row["num_alphas"]) for row in rows] == [
        ("s", "a", "2"),
        ("s", "b", "2"),
    ]


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"text": ["x"], "alpha": [1]}, "lacks the columns completion; it has text, alpha"),
        ({"completion": ["x"]}, "lacks the columns alpha; it has completion"),
        ({**COLUMNS, "outcome": [0, 1, 0, 1, 0, 2]}, "column outcome holds 2.0; allowed: 0, 1"),
        ({**COLUMNS, "outcome": [0] * 6, "grade": [0] * 6}, "both columns outcome and grade"),
        ({**COLUMNS, "alpha": ["a"] * 6}, "column alpha is not double"),
        ({**COLUMNS, "alpha": [1, 1, 2, 2, 3, 3]}, "no usable row at α = 0"),
        ({**COLUMNS, "alpha": [0] * 6}, "every alpha is 0"),
    ],
)
def test_a_table_that_cannot_be_scored_is_refused_in_one_line(
    tmp_path: Path, table: dict[str, list[Any]], said: str
) -> None:
    path = tmp_path / "mine.csv"
    pa_csv.write_csv(pa.table(table), path)
    with pytest.raises(ScoreError) as caught:
        score_own_table(path, tmp_path / "scores.csv")
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_table_is_refused(tmp_path: Path) -> None:
    for name, content, said in (
        ("a.json", b"[]", "'.json'"),
        ("a.parquet", b"x", "cannot be read"),
        ("b.csv", b"", "b.csv"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ScoreError, match=said):
            score_own_table(tmp_path / name, tmp_path / "scores.csv")
