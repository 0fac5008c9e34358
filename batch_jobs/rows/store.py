"""Generations in files: one Parquet row per sample, in parts that appear whole or not at all.

Layout: `<generations>/model_key=<slug>/layer_key=<layer>/part-<digest>.parquet`. The partition keys repeat
the columns `model` and `layer` under other names, for two reasons: a model's name holds slashes, which a
folder name cannot, and a reader that infers partition types (pandas, `pyarrow.parquet.read_table`) makes them
dictionaries, which clash with a column of the same name. Under other names, every column keeps its type in
every reader, and readers can still skip folders.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from batch_jobs.errors import StudyError
from batch_jobs.rows.row_ids import Keys, RowIds, keys_of

if TYPE_CHECKING:
    from batch_jobs.files.object_store import StorePath

_LATER_COLUMNS = ("thought", "alpha_separation")
"""Columns that parts of earlier versions lack."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One row; its fields are the columns of SCHEMA, in this order.

    Either `completion` or `error` is set. Neither is set if the generation ended inside a thought: then `thought` is
    set, and there is no answer to score.
    """

    row_id: str
    model: str
    model_revision: str | None
    direction: str
    """Name of the direction; at α = 0 it is not applied."""
    direction_hash: str
    layer: int
    op: str
    span: str
    alpha: float
    alpha_residual_norm: float
    alpha_separation: float | None = None
    """α in multiples of what separates the two sides of the train texts along the direction, a control's being its
    direction's; None where that is not above 0, and in rows of earlier versions."""
    scenario: str
    sample: int
    seed: Annotated[int, pa.int64()]
    prompt: str
    """The exact text the model read, chat template included."""
    thought: str | None = None
    """The text between `<think>` and `</think>`, stripped; None if there is no thought. Rows of earlier versions have
    none: their completion is the whole text."""
    completion: str | None
    """The answer: the generated text without its thought. An empty text is an answer too; None means no answer."""
    finish_reason: str | None
    """`stop` (the model ended) or `length`."""
    prompt_tokens: int
    completion_tokens: int | None
    """Tokens of the whole generation, thought included."""
    projection_prompt: float | None
    """Projection of the prompt's readout at `layer` in an *unsteered* pass: where the scenario lies before
    steering. The same in all rows of a scenario, layer and direction. This and the other projections of a control's row
    are onto the direction that it controls."""
    projection_generated: float | None
    """Projection of the generated span's readout at `layer`, taken *after* this row's steering at that layer:
    with op add and a steered span that covers it, it contains α itself. The span is the whole generation, thought
    included. None for a completion of one token, which was never fed back."""
    projection_unsteered: float | None
    """Projection of the generated tokens, thought included, when the *unsteered* model reads prompt and generation: it
    measures the text alone, without the α that steering added to the residual stream. None if it was not read."""
    log_likelihood: float | None
    """Mean natural-log probability of a generated token, thought included, under the unsteered model, given the prompt;
    near minus the entropy of its sampling for the model's own text, far below that for text it would not write."""
    attempts: int
    """Number of times the row was tried, this time included."""
    started_at: datetime
    """When the engine received the request, UTC."""
    seconds: float | None
    """From first scheduling to last token. Rows of a batch overlap in time, so their seconds do not add up."""
    error: str | None
    """Why the engine gave no completion; None when it gave one."""


_ARROW_TYPES = {str: pa.string(), int: pa.int32(), float: pa.float64(), datetime: pa.timestamp("us", tz="UTC")}


def _column(name: str, annotation: Any) -> pa.Field:
    """The column of a field of Generation: `X | None` may be null; Annotated names another type than X's own."""
    chosen = next(iter(getattr(annotation, "__metadata__", ())), None)
    types = [one for one in get_args(annotation) if isinstance(one, type)] or [annotation]
    kind = chosen or _ARROW_TYPES[types[0]]
    return pa.field(name, kind, nullable=NoneType in types)


SCHEMA = pa.schema([_column(*field) for field in get_type_hints(Generation, include_extras=True).items()])
"""The columns of a part."""


def model_slug(model: str) -> str:
    """Folder name for a model name. Names that differ only in the replaced characters get different slugs."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("-.")[-80:]
    return plain if plain == model else f"{plain}-{hashlib.sha256(model.encode()).hexdigest()[:8]}"


def write_rows(
    folder: Path | StorePath, rows: Sequence[Generation], metadata: Mapping[str, str]
) -> list[Path | StorePath]:
    """Write the rows, one part for each (model, layer) among them, and return the parts' paths.

    `metadata` goes into each file's key-value metadata (versions, config hash, commit ...). A part's name is
    a digest of its row ids: writing the same rows again replaces the part instead of doubling the rows. Each
    part is written to a hidden file in the same folder, synced, and renamed, so a crash leaves no half-written part. In
    an object store it is one object, which appears when all of it is there.

    Raises:
        OSError: a part cannot be written.
        StoreError: the object store refuses a part.
    """
    groups: dict[tuple[str, int], list[Generation]] = {}
    for row in rows:
        groups.setdefault((row.model, row.layer), []).append(row)
    written: list[Path | StorePath] = []
    for (model, layer), members in groups.items():
        part = part_path(folder, model, layer, [row.row_id for row in members])
        _write_part(part, to_table(members).replace_schema_metadata(dict(metadata)))
        written.append(part)
    return written


def rows_digest(row_ids: Iterable[str]) -> str:
    """Digest of a set of row ids in 16 hex digits, independent of their order."""
    return hashlib.sha256("\n".join(sorted(row_ids)).encode()).hexdigest()[:16]


def part_path(folder: Path | StorePath, model: str, layer: int, row_ids: Iterable[str]) -> Path | StorePath:
    """Path of the part that holds exactly these rows of one model and layer."""
    return folder / f"model_key={model_slug(model)}" / f"layer_key={layer}" / f"part-{rows_digest(row_ids)}.parquet"


def has_rows(folder: Path | StorePath, rows: Iterable[tuple[str, int, str]]) -> bool:
    """Whether `write_rows` has stored exactly these rows, each (model, layer, row id), in parts of their own."""
    groups: dict[tuple[str, int], list[str]] = {}
    for model, layer, row_id in rows:
        groups.setdefault((model, layer), []).append(row_id)
    return all(part_path(folder, model, layer, ids).exists() for (model, layer), ids in groups.items())


def to_table(rows: Sequence[Generation]) -> pa.Table:
    """The rows as a table of SCHEMA."""
    names = [field.name for field in fields(Generation)]
    return pa.Table.from_pylist([{name: getattr(row, name) for name in names} for row in rows], schema=SCHEMA)


def read_rows(folder: Path) -> pa.Table:
    """All rows under `folder`, columns and types of SCHEMA, ordered by model, layer, scenario, α, sample.

    No folder or no part gives an empty table. Columns that parts of earlier versions lack are null.

    Raises:
        StudyError: a part is not such a table; the message names the file.
    """
    parts = _parts(folder)
    if not parts:
        return SCHEMA.empty_table()
    for part in parts:
        _check_part(part)
    table = ds.dataset([str(part) for part in parts], schema=SCHEMA, format="parquet").to_table()
    return table.sort_by([(name, "ascending") for name in ("model", "layer", "scenario", "alpha", "sample")])


@dataclass(frozen=True)
class RowIndex:
    """Ids and states of the stored rows."""

    done: RowIds
    """Ids of the rows that the engine completed, including those that ended inside a thought."""
    failed: RowIds
    """Ids of the rows stored with an error instead."""
    direction_hashes: frozenset[str]
    """Distinct content hashes of the rows' directions."""


def read_index(folder: Path) -> RowIndex:
    """Ids and states of all rows under `folder`, from three narrow columns.

    Raises:
        StudyError: a part is not a table of SCHEMA, or a row appears twice; the message names the file.
    """
    done: list[Keys] = []
    failed: list[Keys] = []
    hashes: set[str] = set()
    parts = _parts(folder)
    for part in parts:
        _check_part(part)
        table = pq.read_table(part, columns=["row_id", "error", "direction_hash"], partitioning=None)
        keys, places = np.unique(keys_of(table["row_id"]), return_index=True)
        is_broken = pc.is_valid(table["error"]).to_numpy()[places]
        failed.append(keys[is_broken])
        done.append(keys[~is_broken])
        hashes.update(pc.unique(table["direction_hash"]).to_pylist())
    index = RowIndex(RowIds.of_keys(done), RowIds.of_keys(failed), frozenset(hashes))
    if len(index.done) + len(index.failed) < sum(map(len, done + failed)) or index.done.meets(index.failed):
        _refuse_repeated_rows(parts)
    return index


def _refuse_repeated_rows(parts: Sequence[Path]) -> None:
    """Name the first part with a row that an earlier one holds."""
    seen: set[str] = set()
    for part in parts:
        ids = set(_row_ids(part).to_pylist())
        if repeated := seen & ids:
            raise StudyError(
                f"{part}: {len(repeated)} of its rows ({min(repeated)}, ...) are in another part too; delete this one."
            )
        seen |= ids


def _row_ids(part: Path) -> pa.ChunkedArray:
    return pq.read_table(part, columns=["row_id"], partitioning=None)["row_id"]


def count_unfinished_thoughts(folder: Path) -> int:
    """Number of rows under `folder` that ended inside a thought: they have neither a completion nor an error."""
    parts = _parts(folder)
    if not parts:
        return 0
    dataset = ds.dataset([str(part) for part in parts], schema=SCHEMA, format="parquet")
    return int(dataset.count_rows(filter=pc.is_null(pc.field("completion")) & pc.is_null(pc.field("error"))))


def drop_failed_rows(folder: Path) -> int:
    """Remove the rows with an error from their parts and return their number, so that running them again leaves one
    row per id.

    Each part is replaced atomically and keeps its name, so its name is then the digest of more rows than it holds.

    Raises:
        StudyError: a part is not a table of SCHEMA; the message names the file.
    """
    dropped = 0
    for part in _parts(folder):
        _check_part(part)
        table = pq.read_table(part, schema=SCHEMA, partitioning=None)
        good = table.filter(pc.is_null(table["error"]))
        if good.num_rows == table.num_rows:
            continue
        dropped += table.num_rows - good.num_rows
        _replace_part(part, good)
    return dropped


def drop_repeated_rows(folder: Path) -> int:
    """Remove rows that another part holds too, and return their number. Of a row's copies, one with a completion stays.

    Two copies of a row come from two workers that ran it under different parts: one that a cluster had taken for dead,
    or two drivers on one object store. Parts are replaced as in `drop_failed_rows`.

    Raises:
        StudyError: a part is not a table of SCHEMA; the message names the file.
    """
    parts = _parts(folder)
    for part in parts:
        _check_part(part)
    each = [np.unique(keys_of(_row_ids(part))) for part in parts]
    if len(RowIds.of_keys(each)) == sum(map(len, each)):
        return 0  # as nearly always, at eight bytes a row
    keeper: dict[str, tuple[bool, Path]] = {}  # row id -> (whether it failed, part), the smallest
    repeated: set[Path] = set()
    for part in parts:
        table = pq.read_table(part, columns=["row_id", "error"], partitioning=None)
        failed = pc.is_valid(table["error"]).to_pylist()
        for row_id, copy in zip(table["row_id"].to_pylist(), ((one, part) for one in failed), strict=True):
            first = keeper.setdefault(row_id, copy)
            if first != copy:
                keeper[row_id], loser = sorted((first, copy))
                repeated.add(loser[1])
    dropped = 0
    for part in repeated:
        table = pq.read_table(part, schema=SCHEMA, partitioning=None)
        kept = table.filter(pa.array([keeper[row_id][1] == part for row_id in table["row_id"].to_pylist()]))
        dropped += table.num_rows - kept.num_rows
        _replace_part(part, kept)
    return dropped


def _replace_part(part: Path, table: pa.Table) -> None:
    """Put the table in the place of the part, under the part's metadata; without a row, delete the part."""
    if table.num_rows:
        _write_part(part, table.replace_schema_metadata(pq.read_schema(part).metadata))
    else:
        part.unlink()


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.rglob("part-*.parquet"))


def _check_part(part: Path) -> None:
    try:
        schema = pq.read_schema(part)
    except (pa.ArrowInvalid, OSError) as error:
        raise StudyError(
            f"{part}: not a readable Parquet file ({error}); delete it and run the study again."
        ) from error
    wrong = [
        field.name
        for field in SCHEMA
        if (
            schema.field(field.name).type != field.type
            if field.name in schema.names
            else field.name not in _LATER_COLUMNS
        )
    ]
    if wrong:
        raise StudyError(
            f"{part}: columns {wrong} are missing or of another type than this version writes; "
            "read it with the version that wrote it, or run the study into a new directory."
        )


def _write_part(part: Path | StorePath, table: pa.Table) -> None:
    if not isinstance(part, Path):
        content = pa.BufferOutputStream()
        pq.write_table(table, content, compression="zstd")
        part.write_bytes(content.getvalue().to_pybytes())
        return
    part.parent.mkdir(parents=True, exist_ok=True)
    # Hidden and without the .parquet suffix, so that neither a dataset scan nor a glob takes it for a part. The
    # process id keeps two writers of the same part apart.
    unfinished = part.with_name(f".{part.stem}.{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as file:
            pq.write_table(table, file, compression="zstd")
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(part)
    finally:
        unfinished.unlink(missing_ok=True)
