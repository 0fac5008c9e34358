"""Score generations of one's own, a Parquet or CSV file with a row for each completion."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from batch_jobs.rows.generation_parts import COLUMN_TYPES, ScoreError
from batch_jobs.scoring.compute_scores import decide, score_decided
from batch_jobs.scoring.measures import measure_table
from batch_jobs.scoring.published_generations import write_rates

NEEDED: Final = ("alpha", "completion")
STAND_INS: Final[Mapping[str, str | int]] = {
    "model": "model",
    "layer": 0,
    "scenario": "all",
    "direction": "direction",
    "op": "add",
    "span": "all",
}
"""The value of each optional column that a table lacks, the same in all rows."""
OUTCOME, GRADE = "outcome", "grade"
GRADE_OF_OUTCOME: Final = 2
"""The grade that counts as the outcome, out of 0, 1 and 2."""
ENDINGS: Final = (".parquet", ".csv")


def score_own_table(source: Path, out: Path) -> Path:
    """Score a table and write one row per (model, layer, scenario, direction, op, span) to `out`; return `out`.

    Columns are those of `published_generations.score_raw`, and `direction`, `op` and `span` behind them.

    Raises:
        ScoreError: as for `read_own_table`, or a (model, layer, scenario) has no row at α = 0; the message names the
            file.
    """
    table, outcome = read_own_table(source)
    try:
        measures = measure_table(table, {})
        if outcome is not None:
            place = measures.column_names.index("empathetic")
            measured = pc.if_else(pc.is_valid(measures["empathetic"]), outcome, pa.scalar(None, pa.bool_()))
            measures = measures.set_column(place, "empathetic", measured)
            # no keywords decided, so it cannot matter where in a word they are found
            place = measures.column_names.index("empathetic_word_start")
            measures = measures.set_column(place, "empathetic_word_start", pa.nulls(len(measures), pa.bool_()))
        scores = score_decided(decide(measures))
    except ScoreError as error:
        raise ScoreError(f"{source}: {error}") from error
    if not scores.success:
        raise ScoreError(f"{source}: every alpha is 0 or every op another one than add; give rows steered with add.")
    return write_rates(Path(out), scores, scores.success, ("direction", "op", "span"))


def read_own_table(source: Path) -> tuple[pa.Table, pa.ChunkedArray | None]:
    """Read a table as rows for scoring.

    Columns: `alpha` and `completion`, in which an empty cell is an empty completion; `model`, `layer`, `scenario`,
    `direction`, `op` and `span`, each one constant where it is left out; `outcome` (true, false, 1 or 0) or `grade`
    (0, 1 or 2, of which 2 counts), in place of the keywords. Other columns of a study's rows are taken too, except
    `error`; any further column is passed over.

    Returns:
        The rows with the columns of COLUMN_TYPES, and the outcome of each as a Boolean; None where keywords decide.

    Raises:
        ScoreError: the file is neither Parquet nor CSV, lacks a column, is empty, or has a cell of the wrong type.
    """
    given = _read(Path(source))
    if missing := [name for name in NEEDED if name not in given.column_names]:
        raise ScoreError(
            f"{source}: lacks the columns {', '.join(missing)}; it has {', '.join(given.column_names)}. Rename or add "
            "them."
        )
    if given.num_rows == 0:
        raise ScoreError(f"{source}: holds no rows; give a row for each completion.")
    columns = {}
    for name, kind in COLUMN_TYPES.items():
        if name == "error" or name not in given.column_names:
            stand_in = STAND_INS.get(name)
            columns[name] = pa.nulls(given.num_rows, kind) if stand_in is None else _repeated(stand_in, given, kind)
        else:
            columns[name] = _cast(source, given, name, kind)
    columns["completion"] = pc.fill_null(columns["completion"], "")
    return pa.table(columns), _outcome(source, given)


def _read(source: Path) -> pa.Table:
    try:
        if source.suffix == ".parquet":
            return pq.read_table(source, partitioning=None)
        if source.suffix == ".csv":
            # completions hold line ends, inside quotes
            return pa_csv.read_csv(source, parse_options=pa_csv.ParseOptions(newlines_in_values=True))
    except (pa.ArrowException, OSError) as error:
        raise ScoreError(f"{source}: cannot be read ({' '.join(str(error).split())}); give a table.") from error
    raise ScoreError(f"{source}: ends in {source.suffix!r}; allowed: {' or '.join(ENDINGS)}. Convert it.")


def _outcome(source: Path, given: pa.Table) -> pa.ChunkedArray | None:
    present = [name for name in (OUTCOME, GRADE) if name in given.column_names]
    if not present:
        return None
    if len(present) == 2:
        raise ScoreError(f"{source}: has both columns {OUTCOME} and {GRADE}; keep the one that decides.")
    name = present[0]
    numbers = _cast(source, given, name, pa.float64())
    allowed = (0, 1) if name == OUTCOME else (0, 1, 2)
    if strange := sorted({repr(one) for one in pc.unique(numbers).to_pylist() if one not in allowed}):
        raise ScoreError(
            f"{source}: the column {name} holds {', '.join(strange[:5])}; allowed: {', '.join(map(str, allowed))}."
        )
    return pc.equal(numbers, float(allowed[-1]))


def _cast(source: Path, given: pa.Table, name: str, kind: pa.DataType) -> pa.ChunkedArray:
    column = given[name]
    try:
        if pa.types.is_boolean(column.type) and pa.types.is_floating(kind):
            column = column.cast(pa.int8())
        return column.cast(kind)
    except pa.ArrowException as error:
        reason = " ".join(str(error).split())
        raise ScoreError(f"{source}: the column {name} is not {kind} ({reason}); correct its cells.") from error


def _repeated(value: str | int, given: pa.Table, kind: pa.DataType) -> pa.Array:
    return pa.array([value] * given.num_rows, kind)
