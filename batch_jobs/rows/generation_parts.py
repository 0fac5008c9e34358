"""Reads and checks the columns of stored generations that scoring needs, from a table or from the parts of a folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batch_jobs.rows.store import SCHEMA
from vllm_steer.errors import SteerError

GROUP_COLUMNS: Final = ("model", "layer", "scenario", "direction", "op", "span")

_OPTIONAL_COLUMNS = ("row_id", "sample", "seed", "projection_unsteered", "log_likelihood", "thought", "finish_reason")
_NEEDED_COLUMNS = ("alpha", "alpha_residual_norm", "completion", "completion_tokens", "projection_generated", "error")
COLUMN_TYPES: Mapping[str, pa.DataType] = {
    name: SCHEMA.field(name).type for name in (*GROUP_COLUMNS, *_NEEDED_COLUMNS, *_OPTIONAL_COLUMNS)
}
_BATCH_ROWS = 1024  # about 1 MB of completions


class ScoreError(SteerError):
    """The generations cannot be scored; the message says what is missing or wrong and what to do."""


def part_paths(folder: Path) -> list[Path]:
    """Paths of the parts that `store.write_rows` has written under `folder`, sorted."""
    return sorted(Path(folder).rglob("part-*.parquet"))


def count_rows(part: Path) -> int:
    """Number of rows in a part, from its footer.

    Raises:
        ScoreError: the part cannot be read; the message names it.
    """
    return int(_open(part).metadata.num_rows)


def read_part(part: Path) -> Iterator[pa.Table]:
    """Yield the part in tables of at most 1024 rows, each as `scoring_columns` returns it.

    Raises:
        ScoreError: the part cannot be read, or `scoring_columns` refuses a table; the message names the part.
    """
    file = _open(part)
    present = [name for name in COLUMN_TYPES if name in file.schema_arrow.names]
    try:
        for batch in file.iter_batches(_BATCH_ROWS, columns=present):
            yield scoring_columns(pa.Table.from_batches([batch]))
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(part, error) from error
    except ScoreError as error:
        raise ScoreError(f"{part}: {error}") from error


def split_table(table: pa.Table) -> Iterator[pa.Table]:
    """Yield `scoring_columns` of a table in tables of at most 1024 rows; none for an empty table."""
    for batch in scoring_columns(table).to_batches(_BATCH_ROWS):
        yield pa.Table.from_batches([batch])


def scoring_columns(table: pa.Table) -> pa.Table:
    """The columns of COLUMN_TYPES, in these types: dictionary-encoded ones decoded, -0.0 made 0.0.

    Columns that other tables may lack (`row_id`, `sample`, `seed`, `projection_unsteered`, `log_likelihood`, `thought`,
    `finish_reason`) are null in the result.

    Raises:
        ScoreError: another column is missing, a group column or α holds a null, an α is not finite, or a row has
            neither completion, error nor thought.
    """
    if missing := [name for name in COLUMN_TYPES if name not in {*table.column_names, *_OPTIONAL_COLUMNS}]:
        needed = [*GROUP_COLUMNS, *_NEEDED_COLUMNS]
        raise ScoreError(f"The table lacks the columns {missing}; it must hold {', '.join(needed)}.")
    columns = {
        name: table[name].cast(kind) if name in table.column_names else pa.nulls(table.num_rows, kind)
        for name, kind in COLUMN_TYPES.items()
    }
    # adding 0.0 turns -0.0 into 0.0, so that it is no group of its own
    columns |= {name: pc.add(column, 0.0) for name, column in columns.items() if pa.types.is_floating(column.type)}
    table = pa.table(columns)
    for name in (*GROUP_COLUMNS, "alpha"):
        if nulls := table[name].null_count:
            raise ScoreError(f"The column {name} is null in {nulls} of {table.num_rows} rows; every row must have it.")
    if pc.all(pc.is_finite(table["alpha"])).as_py() is False:
        raise ScoreError("The column alpha holds NaN or infinity; every row needs a finite α.")
    if lost := pc.sum(pc.and_(in_thought(table), pc.is_null(table["thought"]))).as_py():
        raise ScoreError(f"{lost} rows have neither completion nor an error; store one of the two for each.")
    return table


def in_thought(table: pa.Table) -> pa.ChunkedArray:
    """Boolean for each row of `scoring_columns`: it ended inside a thought, with neither a completion nor an error."""
    return pc.and_(pc.is_null(table["completion"]), pc.is_null(table["error"]))


def answered(table: pa.Table) -> pa.Table:
    """The rows of `scoring_columns` that have an answer to score: neither an error nor an unfinished thought."""
    return table.filter(pc.and_(pc.is_valid(table["completion"]), pc.is_null(table["error"])))


def _open(part: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(part)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(part, error) from error


def _unreadable(part: Path, error: Exception) -> ScoreError:
    return ScoreError(f"{part}: not a readable Parquet file ({error}); delete it and run the study again.")
