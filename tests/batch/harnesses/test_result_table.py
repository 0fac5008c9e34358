"""The Parquet file of an evaluation."""

from __future__ import annotations

import io
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import polars
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from batch_jobs.errors import StudyError
from batch_jobs.harnesses.result_table import KEY, SCHEMA, Result, print_results, read_results, write_results

PLAIN = Result(
    cell="c0",
    task="choice",
    metric="acc",
    filter="none",
    value=0.5,
    stderr=0.08,
    higher_is_better=True,
    documents=40,
    steered="unsteered",
    direction=None,
    control=None,
    direction_hash=None,
    layer=None,
    op=None,
    span=None,
    alpha=0.0,
    model="demo-model",
    model_revision=None,
    seconds=1.5,
    finished_at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
)
STEERED = replace(
    PLAIN, cell="c1", value=0.75, steered="direction", direction="kind", layer=3, op="add", span="all", alpha=2.0
)
CONTROLS = [replace(STEERED, cell=f"k{n}", steered="control", control=n, value=0.25 + n / 2) for n in range(2)]
METADATA = {KEY: "abc", "config": '{"model": "demo-model", "alphas": [2]}'}


def test_what_is_written_comes_back_and_other_readers_see_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "e.parquet"
    assert read_results(path, "abc") == []
    write_results(path, [PLAIN, STEERED, *CONTROLS], METADATA)
    assert read_results(path, "abc") == [PLAIN, STEERED, *CONTROLS]
    frame = polars.read_parquet(path)
    assert frame.filter(polars.col("steered") == "control")["control"].to_list() == [0, 1]
    assert pq.read_schema(path).metadata[b"config"] == METADATA["config"].encode()
    assert pq.read_schema(path).remove_metadata() == SCHEMA
    assert [one.name for one in path.parent.iterdir()] == ["e.parquet"]


def test_another_evaluations_file_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "e.parquet"
    write_results(path, [PLAIN], METADATA)
    with pytest.raises(StudyError, match=r"results of another evaluation \(model demo-model, alphas \[2\]\)"):
        read_results(path, "def")
    path.write_bytes(b"no parquet")
    with pytest.raises(StudyError, match="not a readable Parquet file"):
        read_results(path, "abc")


def test_the_table_has_the_unsteered_value_beside_the_others() -> None:
    shown = io.StringIO()
    print_results([PLAIN, STEERED, *CONTROLS], Console(file=shown, width=120))
    lines = [line.replace("│", " ").split() for line in shown.getvalue().splitlines()]
    assert ["choice", "acc", "kind@3", "0.5", "0.75"] in lines
    assert ["choice", "acc", "random,", "for", "kind@3", "0.5", "0.5"] in lines  # the mean of 0.25 and 0.75
