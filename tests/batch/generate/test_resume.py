"""A grid of which a part is stored is resumed with the rest alone. The engine answers from a formula;
`test_study_faults.py` does the same with a real one."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from batch_jobs.engine import progress
from batch_jobs.engine.progress import ConsoleProgress
from batch_jobs.generate.local_executor import LocalExecutor
from batch_jobs.generate.shard_runner import ShardJob, ShardRunner
from batch_jobs.pipeline import RunOptions, generate_missing
from batch_jobs.rows.row_ids import RowIds
from batch_jobs.rows.shards import make_shards
from batch_jobs.rows.store import read_index, read_rows
from tests.support.formula_engine import FormulaEngine, install, small_job


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FormulaEngine:
    return install(monkeypatch)


@pytest.fixture
def job(tmp_path: Path) -> ShardJob:
    """A grid of 12 rows in parts of four."""
    return small_job(tmp_path, rows_per_part=4)


def executor(engine: FormulaEngine, *, quiet: bool = False) -> tuple[LocalExecutor, io.StringIO]:
    out = io.StringIO()
    started = SimpleNamespace(engine=engine, revision="r1")
    console = Console(file=out, width=200)
    return LocalExecutor(started, ConsoleProgress(console, quiet=quiet)), out  # type: ignore[arg-type]


def store_first_part(engine: FormulaEngine, job: ShardJob) -> set[str]:
    shard = next(iter(make_shards(job.rows, RowIds(), rows_per_part=4, workers=1)))
    ShardRunner(engine, job, model_revision="r1", progress=ConsoleProgress(Console(file=io.StringIO()))).run(shard)
    return {row.row_id for row in shard.rows}


@pytest.mark.parametrize("quiet", [False, True])
def test_only_what_is_missing_is_generated_and_the_progress_says_so(
    engine: FormulaEngine, job: ShardJob, monkeypatch: pytest.MonkeyPatch, quiet: bool
) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    stored = store_first_part(engine, job)
    local, out = executor(engine, quiet=quiet)
    done, reused = generate_missing(job, lambda: local, RunOptions())
    assert (done.rows, done.failed, reused) == (8, 0, 4)
    ids = read_rows(job.run.generations)["row_id"].to_pylist()
    assert sorted(ids) == sorted(row.row_id for row in job.rows)
    assert stored < set(ids)
    lines = [line for line in out.getvalue().splitlines() if line.startswith("All batches: ")]
    assert [line.split(", ")[0] for line in lines] == (
        [] if quiet else ["All batches: 4/8 rows (4 stored before)"]
    )  # none after the last batch


def test_nothing_is_started_where_nothing_is_missing(engine: FormulaEngine, job: ShardJob) -> None:
    local, _ = executor(engine)
    generate_missing(job, lambda: local, RunOptions())
    done, reused = generate_missing(job, lambda: pytest.fail("an engine was started"), RunOptions())
    assert (done.rows, reused) == (0, 12)


def test_rows_of_an_unfinished_part_are_generated_without_the_finished_ones(
    engine: FormulaEngine, job: ShardJob
) -> None:
    """A part with a row less, as `--retry-failed` leaves it, gives a shard of that row."""
    local, _ = executor(engine)
    generate_missing(job, lambda: local, RunOptions())
    part = next(job.run.generations.rglob("part-*.parquet"))
    part.unlink()
    few = replace(job, study=job.study.model_copy(update={"rows_per_part": 12}))
    done, reused = generate_missing(few, lambda: local, RunOptions())
    assert (done.rows, reused) == (4, 8)
    assert len(read_index(job.run.generations).done) == 12
