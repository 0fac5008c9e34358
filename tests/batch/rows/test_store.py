from __future__ import annotations

from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import polars
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from batch_jobs.config.study import StudyError
from batch_jobs.rows.row_ids import RowIds
from batch_jobs.rows.store import (
    SCHEMA,
    Generation,
    count_unfinished_thoughts,
    drop_failed_rows,
    has_rows,
    model_slug,
    read_index,
    read_rows,
    write_rows,
)

ROW = Generation(
    row_id="r0",
    model="owner/model",
    model_revision=None,
    direction="empathy",
    direction_hash="ab",
    layer=16,
    op="add",
    span="all",
    alpha=2.5,
    alpha_residual_norm=0.1,
    scenario="the_duel",
    sample=0,
    seed=2**31 - 1,
    prompt="What do you do?",
    completion="I wait.\n…",
    finish_reason="stop",
    prompt_tokens=5,
    completion_tokens=4,
    projection_prompt=-1.5,
    projection_generated=None,
    projection_unsteered=0.25,
    log_likelihood=-1.25,
    attempts=1,
    started_at=datetime(2025, 1, 2, 3, 4, 5, 678901, tzinfo=UTC),
    seconds=0.25,
    error=None,
)
FAILED = replace(ROW, row_id="r1", sample=1, completion=None, completion_tokens=None, error="engine: gone")


def test_rows_come_back_as_they_went(tmp_path: Path) -> None:
    rows = [ROW, FAILED, replace(ROW, row_id="r2", layer=8), replace(ROW, row_id="r3", model="other")]
    parts = write_rows(tmp_path, rows, {"config_hash": "c0ffee"})
    assert len(parts) == 3  # one for each (model, layer)
    table = read_rows(tmp_path)
    assert table.schema.equals(SCHEMA)
    found = {row["row_id"]: Generation(**row) for row in table.to_pylist()}
    assert found == {row.row_id: row for row in rows}


def test_files_carry_their_provenance(tmp_path: Path) -> None:
    (part,) = write_rows(tmp_path, [ROW], {"config_hash": "c0ffee", "git_commit": ""})
    assert pq.read_schema(part).metadata[b"config_hash"] == b"c0ffee"


def test_readers_that_infer_partitions_get_the_columns_right_types(tmp_path: Path) -> None:
    write_rows(tmp_path, [ROW, replace(ROW, row_id="r2", layer=8)], {})
    frame = pd.read_parquet(tmp_path)
    assert frame["layer"].dtype == "int32"
    assert set(frame["model"]) == {"owner/model"}
    for table in (pq.read_table(tmp_path), ds.dataset(tmp_path, partitioning="hive").to_table()):
        for field in SCHEMA:
            assert table.schema.field(field.name).type == field.type
        assert {"model_key", "layer_key"} <= set(table.column_names)


def test_writing_the_same_rows_again_does_not_double_them(tmp_path: Path) -> None:
    write_rows(tmp_path, [ROW, FAILED], {})
    write_rows(tmp_path, [FAILED, replace(ROW, completion="again")], {})
    assert read_rows(tmp_path)["completion"].to_pylist() == ["again", None]


def test_a_crash_while_writing_leaves_no_readable_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path, [ROW], {})

    def die_half_way(table: pa.Table, file: Any, **_: Any) -> None:
        file.write(b"PAR1 half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", die_half_way)
    with pytest.raises(OSError, match="No space left"):
        write_rows(tmp_path, [replace(ROW, row_id="r9")], {})
    with pytest.raises(OSError, match="No space left"):
        write_rows(tmp_path, [replace(ROW, completion="overwritten")], {})
    assert [path.name for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".parquet"] == []
    assert read_rows(tmp_path)["completion"].to_pylist() == [ROW.completion]


def test_a_half_written_file_of_a_killed_process_is_not_a_part(tmp_path: Path) -> None:
    (part,) = write_rows(tmp_path, [ROW], {})
    part.with_name(".part-dead.123.tmp").write_bytes(b"PAR1")
    assert read_rows(tmp_path).num_rows == 1
    assert pq.read_table(tmp_path).num_rows == 1


def test_parts_of_an_earlier_version_have_no_thoughts(tmp_path: Path) -> None:
    thinking = replace(ROW, row_id="r8", layer=8, thought="Hm.", completion="I stay.")
    write_rows(tmp_path, [ROW, FAILED, thinking], {"config_hash": "c0ffee"})
    (old,) = (tmp_path / f"model_key={model_slug(ROW.model)}" / "layer_key=16").glob("*.parquet")
    pq.write_table(pq.read_table(old, partitioning=None).drop_columns(["thought"]), old)
    table = read_rows(tmp_path)
    assert table.schema.equals(SCHEMA)
    assert {row["row_id"]: row["thought"] for row in table.to_pylist()} == {"r0": None, "r1": None, "r8": "Hm."}
    assert read_index(tmp_path).done == RowIds({"r0", "r8"})
    assert drop_failed_rows(tmp_path) == 1
    assert read_rows(tmp_path)["completion"].to_pylist() == ["I stay.", ROW.completion]


def test_what_ended_inside_a_thought_is_done_and_counted(tmp_path: Path) -> None:
    assert count_unfinished_thoughts(tmp_path / "none") == 0
    unfinished = replace(ROW, row_id="r9", sample=2, thought="Hm, so I", completion=None)
    write_rows(tmp_path, [replace(ROW, completion=""), FAILED, unfinished], {})
    assert count_unfinished_thoughts(tmp_path) == 1
    assert read_index(tmp_path).done == RowIds({"r0", "r9"})
    assert drop_failed_rows(tmp_path) == 1
    assert count_unfinished_thoughts(tmp_path) == 1


def test_the_index_tells_done_from_failed(tmp_path: Path) -> None:
    assert read_index(tmp_path / "none").done == RowIds()
    write_rows(tmp_path, [ROW, FAILED], {})
    write_rows(tmp_path, [replace(FAILED, row_id="r4", layer=8, direction_hash="cd")], {})
    index = read_index(tmp_path)
    assert (index.done, index.failed) == (RowIds({"r0"}), RowIds({FAILED.row_id, "r4"}))
    assert index.direction_hashes == {"ab", "cd"}


def test_a_row_that_is_there_twice_is_found(tmp_path: Path) -> None:
    write_rows(tmp_path, [ROW, replace(ROW, row_id="r5")], {})
    write_rows(tmp_path, [ROW], {})
    with pytest.raises(StudyError, match=r"1 of its rows \(r0, \.\.\.\) are in another part"):
        read_index(tmp_path)


def test_whether_rows_are_stored_is_known_from_their_ids(tmp_path: Path) -> None:
    rows = [ROW, replace(ROW, row_id="r6", layer=8)]
    places = [(row.model, row.layer, row.row_id) for row in rows]
    assert not has_rows(tmp_path, places)
    write_rows(tmp_path, rows[:1], {})
    assert has_rows(tmp_path, places[:1])
    assert not has_rows(tmp_path, places)
    write_rows(tmp_path, rows, {})
    assert has_rows(tmp_path, places[::-1])


def test_duckdb_and_polars_read_every_column(tmp_path: Path) -> None:
    write_rows(tmp_path, [ROW, replace(ROW, row_id="r7", layer=8, model="other/model")], {})
    pattern = f"{tmp_path}/**/*.parquet"
    lazily = polars.scan_parquet(pattern, hive_partitioning=True).sort("layer").collect()
    assert lazily.select(SCHEMA.names).row(1, named=True) == asdict(ROW)
    query = (
        f"SELECT layer, alpha, completion FROM read_parquet('{pattern}', hive_partitioning=true) WHERE layer_key = 16"
    )
    assert duckdb.sql(query).fetchall() == [(16, 2.5, ROW.completion)]


def test_failed_rows_can_be_dropped_to_be_run_again(tmp_path: Path) -> None:
    write_rows(tmp_path, [ROW, FAILED], {"config_hash": "c0ffee"})
    write_rows(tmp_path, [replace(FAILED, row_id="r4", layer=8)], {})
    assert drop_failed_rows(tmp_path) == 2
    assert read_rows(tmp_path)["row_id"].to_pylist() == ["r0"]
    (part,) = tmp_path.rglob("*.parquet")  # the part that held failures only is gone
    assert pq.read_schema(part).metadata[b"config_hash"] == b"c0ffee"
    assert drop_failed_rows(tmp_path) == 0


def test_a_foreign_or_broken_part_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"row_id": ["x"], "layer": [16]}), tmp_path / "part-0.parquet")
    with pytest.raises(StudyError, match=r"part-0\.parquet: columns \['model'"):
        read_rows(tmp_path)
    (tmp_path / "part-0.parquet").write_bytes(b"nonsense")
    with pytest.raises(StudyError, match="not a readable Parquet file"):
        read_rows(tmp_path)


@pytest.mark.parametrize("name", ["owner/model", "/home/me/models/x", "../x", "a b", "ü", "x" * 200, "a=b"])
def test_a_slug_is_one_safe_folder_name(name: str) -> None:
    slug = model_slug(name)
    assert not set(slug) & set("/= ")
    assert slug.strip(".")
    assert len(slug) < 100


def test_slugs_of_different_models_differ() -> None:
    assert model_slug("demo-model") == "demo-model"
    assert len({model_slug(name) for name in ("a/b", "a-b", "a b", "a//b")}) == 4
