"""A row that breaks its engine is found and recorded, and no other row is lost. The engine answers from a formula;
`test_study_faults.py` does the same with a real one."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from batch_jobs.config.study import Study
from batch_jobs.directions.directions_and_norms import make_controls
from batch_jobs.generate.shard_runner import ShardJob, ShardOutcome, ShardRunner
from batch_jobs.rows.grid import StudyRows
from batch_jobs.rows.row_ids import RowIds
from batch_jobs.rows.shards import Shard
from batch_jobs.rows.store import read_index, read_rows
from tests.support.formula_engine import LOG_LIKELIHOOD, FormulaEngine, install, small_job


class Killed(BaseException):
    """Stands in for kill -9: nothing after it runs. The real one is in test_study_faults.py."""


class Silent:
    """A progress that keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def watch(self, engine: Any, title: str, work: Any) -> Any:
        return nullcontext()

    def warn(self, message: str) -> None:
        self.warnings.append(message)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FormulaEngine:
    return install(monkeypatch)


@pytest.fixture
def job(tmp_path: Path) -> ShardJob:
    return small_job(tmp_path)


def whole_grid(job: ShardJob) -> Shard:
    return Shard(tuple(StudyRows(job.study, job.probes.mean_residual_norms)))


def runner(engine: FormulaEngine, job: ShardJob) -> ShardRunner:
    return ShardRunner(engine, job, model_revision="r1", progress=Silent())


def poison(engine: FormulaEngine, seed: int, alpha: float, error: BaseException, times: int = 10**9) -> None:
    """Make every batch with the row of this seed and α end in `error`."""
    original, left = engine.answer, times

    def answer(prompt: Any, wanted: Any) -> Any:
        nonlocal left
        if wanted.fields.get("seed") == seed and sum(e.alpha for e in wanted.steering) == alpha and left > 0:
            left -= 1
            raise error
        return original(prompt, wanted)

    engine.answer = answer  # type: ignore[method-assign]


def test_a_shard_is_one_batch_and_every_column_is_filled(engine: FormulaEngine, job: ShardJob) -> None:
    shard = whole_grid(job)
    outcome = runner(engine, job).run(shard)
    assert (outcome.rows, outcome.failed, outcome.tokens) == (12, 0, 12 * 40)
    assert [len(batch) for batch in engine.generated] == [12]
    table = read_rows(job.run.generations)
    assert set(table["row_id"].to_pylist()) == {row.row_id for row in shard.rows}
    assert set(table["log_likelihood"].to_pylist()) == {LOG_LIKELIHOOD}
    assert set(table["projection_unsteered"].to_pylist()) == {1.0}
    assert set(table["attempts"].to_pylist()) == {1}
    assert not list(job.run.attempts.iterdir())


def test_every_batch_of_rows_begins_with_an_empty_cache_and_shares_prompts(
    engine: FormulaEngine, job: ShardJob
) -> None:
    first, second = whole_grid(job).halves()
    running = runner(engine, job)
    running.run(first)
    running.run(second)
    rows = [place for place, batch in enumerate(engine.batches) if batch[0].fields["max_tokens"] > 1]
    assert engine.emptied == rows
    assert len(rows) == 2
    assert not any(request.fields.get("skip_reading_prefix_cache") for batch in engine.batches for request in batch)


def test_a_row_that_raises_is_recorded_after_its_attempts_and_costs_no_other_row(
    engine: FormulaEngine, job: ShardJob
) -> None:
    shard = whole_grid(job)
    bad = shard.rows[9]
    poison(engine, bad.seed, bad.condition.alpha, RuntimeError("the kernel does not like it"))
    outcome = runner(engine, job).run(shard)
    assert (outcome.rows, outcome.failed) == (12, 1)
    index = read_index(job.run.generations)
    assert index.failed == RowIds({bad.row_id})
    assert len(index.done) == 11
    (record,) = [row for row in read_rows(job.run.generations).to_pylist() if row["error"]]
    assert record["error"] == "RuntimeError: the kernel does not like it"
    assert record["attempts"] >= job.study.max_attempts
    assert record["completion"] is None
    assert engine.unfinished == 0


def test_an_error_that_passes_leaves_a_completion(engine: FormulaEngine, job: ShardJob) -> None:
    shard = whole_grid(job)
    once = shard.rows[2]
    poison(engine, once.seed, once.condition.alpha, ValueError("busy"), times=1)
    assert runner(engine, job).run(shard).failed == 0
    attempts = {row["row_id"]: row["attempts"] for row in read_rows(job.run.generations).to_pylist()}
    assert len(attempts) == 12
    assert attempts[once.row_id] == 2


def test_rows_the_engine_gave_up_on_are_tried_again_by_themselves(engine: FormulaEngine, job: ShardJob) -> None:
    original, aborted = engine.answer, []

    def answer(prompt: Any, wanted: Any) -> Any:
        output = original(prompt, wanted)
        if wanted.fields["max_tokens"] > 1 and len(aborted) < 2:
            aborted.append(wanted)
            output.outputs[0].finish_reason = "abort"
        return output

    engine.answer = answer  # type: ignore[method-assign]
    assert runner(engine, job).run(whole_grid(job)).failed == 0
    assert [len(batch) for batch in engine.generated] == [12, 2]


def test_a_row_that_kills_its_process_is_cornered_and_recorded(engine: FormulaEngine, job: ShardJob) -> None:
    shard = whole_grid(job)
    bad = shard.rows[5]
    poison(engine, bad.seed, bad.condition.alpha, Killed())
    deaths = 0
    while True:
        try:
            # each turn of the loop stands for a new process with the same shard
            outcome = runner(engine, job).run(shard)
            break
        except Killed:
            deaths += 1
            engine.unfinished = 0
    # three times the whole, then once at each level of halving: 6, 3, 2 or 1, 1 rows
    assert job.study.max_attempts < deaths <= job.study.max_attempts + 4
    assert outcome.rows == 12
    index = read_index(job.run.generations)
    assert (len(index.done), index.failed) == (11, RowIds({bad.row_id}))
    (record,) = [row for row in read_rows(job.run.generations).to_pylist() if row["error"]]
    assert "process ended" in record["error"]


def test_a_shard_stored_before_its_worker_died_is_not_run_again(engine: FormulaEngine, job: ShardJob) -> None:
    shard = whole_grid(job)
    runner(engine, job).run(shard)
    batches = len(engine.generated)
    assert runner(engine, job).run(shard) == ShardOutcome(12, 0, 0, 0.0)
    assert len(engine.generated) == batches


def test_a_fault_that_is_no_rows_ends_the_worker(engine: FormulaEngine, job: ShardJob) -> None:
    shard = whole_grid(job)
    poison(engine, shard.rows[0].seed, shard.rows[0].condition.alpha, OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="No space"):
        runner(engine, job).run(shard)
    assert engine.unfinished == 0
    assert not job.run.generations.exists()


def test_controls_are_steered_with_and_read_along_the_direction_they_control(
    engine: FormulaEngine, job: ShardJob
) -> None:
    steer = {**job.study.steer.model_dump(), "controls": {"random": 2}}
    study = Study.model_validate({**job.study.model_dump(), "steer": steer})
    probes = replace(
        job.probes,
        controls={(one.name, one.layer): one for one in make_controls(study, job.probes.directions)},
        separations={("empathy", 3): 2.0},
    )
    controlled = replace(job, study=study, probes=probes)
    shard = Shard(tuple(controlled.rows))
    assert len(shard.rows) == 4 * (1 + 2 * 3)
    assert runner(engine, controlled).run(shard).failed == 0
    (batch,) = engine.generated
    by_name: dict[str, int] = {}
    for wanted in batch:
        assert wanted.readout.project == ("empathy",)
        for entry in wanted.steering:
            by_name[entry.direction] = by_name.get(entry.direction, 0) + 1
    assert by_name == {"empathy": 8, "empathy.control0": 8, "empathy.control1": 8}
    stored = read_rows(job.run.generations).to_pylist()
    controls = [row for row in stored if row["direction"].startswith("empathy.control")]
    assert len(controls) == 16
    assert {row["direction_hash"] for row in controls} == {one.content_hash for one in probes.controls.values()}
    # neither is read again unless the study asks for it
    assert {(row["log_likelihood"], row["projection_unsteered"]) for row in controls} == {(None, None)}
    assert {row["log_likelihood"] for row in stored if row not in controls} == {LOG_LIKELIHOOD}
    assert {row["alpha_separation"] for row in controls} == {-0.5, 0.5}


def test_controls_are_read_again_where_the_study_asks_for_it(engine: FormulaEngine, job: ShardJob) -> None:
    steer = {**job.study.steer.model_dump(), "controls": {"random": 1, "likelihood": True}}
    study = Study.model_validate({**job.study.model_dump(), "steer": steer})
    controls = {(one.name, one.layer): one for one in make_controls(study, job.probes.directions)}
    controlled = replace(job, study=study, probes=replace(job.probes, controls=controls))
    runner(engine, controlled).run(Shard(tuple(controlled.rows)))
    assert set(read_rows(job.run.generations)["log_likelihood"].to_pylist()) == {LOG_LIKELIHOOD}
    assert {wanted.readout.project for batch in engine.batches for wanted in batch} == {("empathy",)}
