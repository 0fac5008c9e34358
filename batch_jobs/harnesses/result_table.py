"""Results of an evaluation: one Parquet file with a row for each task, metric, direction and α."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from batch_jobs.errors import StudyError
from batch_jobs.files.atomic import atomic_file

KEY = "evaluation_key"
"""Field of the file's metadata: digest of everything that the results depend on."""
Steered = Literal["unsteered", "direction", "control"]


@dataclass(frozen=True, kw_only=True)
class Result:
    """One row; its fields are the columns of SCHEMA, in this order."""

    cell: str
    """Digest of what was evaluated at once: a steering on an entry of the config's tasks."""
    task: str
    """The task, or a group of tasks or one of its tasks."""
    metric: str
    filter: str
    """lm-eval's filter of the answers; `none` for most tasks."""
    value: float
    stderr: float | None
    higher_is_better: bool | None
    documents: int | None
    steered: str
    """`unsteered`, `direction`, or `control` for a random direction."""
    direction: str | None
    """None where the model was not steered. A control has the name of the direction that it controls for."""
    control: int | None
    """Number of the control; None for any other row."""
    direction_hash: str | None
    layer: int | None
    op: str | None
    span: str | None
    alpha: float
    model: str
    model_revision: str | None
    seconds: float
    """Of the whole cell."""
    finished_at: datetime


_ARROW_TYPES = {
    str: pa.string(),
    int: pa.int32(),
    float: pa.float64(),
    bool: pa.bool_(),
    datetime: pa.timestamp("us", tz="UTC"),
}


def _column(name: str, annotation: Any) -> pa.Field:
    types = [one for one in get_args(annotation) if one is not NoneType] or [annotation]
    return pa.field(name, _ARROW_TYPES[types[0]], nullable=NoneType in get_args(annotation))


SCHEMA = pa.schema([_column(*field) for field in get_type_hints(Result).items()])
"""The columns of the file."""


def write_results(path: Path, results: Sequence[Result], metadata: Mapping[str, str]) -> None:
    """Replace the file atomically.

    Raises:
        StudyError: it cannot be written.
    """
    table = pa.Table.from_pylist([asdict(result) for result in results], schema=SCHEMA)
    try:
        with atomic_file(path) as part:
            pq.write_table(table.replace_schema_metadata(dict(metadata)), part, compression="zstd")
    except OSError as error:
        raise StudyError(f"{path} cannot be written: {error.strerror}; give another --out.") from error


def read_results(path: Path, key: str) -> list[Result]:
    """The results of an earlier run of the same evaluation; none if there is no file.

    Raises:
        StudyError: the file is another evaluation's, or no such file.
    """
    if not path.exists():
        return []
    advice = "Give another --out, or --overwrite to replace them"
    try:
        table = pq.read_table(path, partitioning=None)
    except (pa.ArrowInvalid, OSError) as error:
        raise StudyError(f"{path}: not a readable Parquet file ({error}). {advice}.") from error
    told = {name.decode(): value.decode() for name, value in (table.schema.metadata or {}).items()}
    if told.get(KEY) != key or not table.schema.equals(SCHEMA):
        raise StudyError(f"{path} holds results of another evaluation ({_config_of(told)}). {advice}.")
    return [Result(**row) for row in table.to_pylist()]


def print_results(results: Sequence[Result], console: Console) -> None:
    """Print a line for each task, metric and direction, with a column for each α; controls as mean over them."""
    alphas = sorted({result.alpha for result in results})
    if not console.is_terminal:
        console.width = 160  # a log has no width, and rich would take 80
    table = Table("task", "metric", "direction", *(f"α {alpha:g}" for alpha in alphas))
    lines = dict.fromkeys((result.task, result.metric, result.filter) for result in results)
    who = dict.fromkeys(
        (result.steered, result.direction, result.layer) for result in results if result.steered != "unsteered"
    )
    for task, metric, chosen in lines:
        own = [one for one in results if (one.task, one.metric, one.filter) == (task, metric, chosen)]
        for steered, direction, layer in who:
            cells = []
            for alpha in alphas:
                values = [
                    one.value
                    for one in own
                    if one.alpha == alpha
                    and ((one.steered, one.direction, one.layer) == (steered, direction, layer) or alpha == 0.0)
                ]
                cells.append(f"{sum(values) / len(values):.4g}" if values else "")
            name = f"{direction}@{layer}" if steered == "direction" else f"random, for {direction}@{layer}"
            table.add_row(task, metric if chosen == "none" else f"{metric}, {chosen}", name, *cells)
    console.print(table)


def _config_of(metadata: Mapping[str, str]) -> str:
    try:
        config = json.loads(metadata.get("config", "{}"))
    except ValueError:
        config = {}
    return f"model {config.get('model', 'unknown')}, alphas {config.get('alphas', 'unknown')}"
