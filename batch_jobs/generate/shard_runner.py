"""Runs shards in one engine, stores the results, and isolates rows that break the engine.

A row can break the engine in two ways. A step that *raises* leaves a usable engine: the shard is halved until the row
stands alone, and that row's error is stored after `max_attempts` tries. A row that *kills the process* is found
the same way, but across processes: the attempt log counts how often a shard was begun and never ended.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from batch_jobs.config.study import Study
from batch_jobs.directions.directions_and_norms import Probes, steering_keys
from batch_jobs.engine.progress import Progress
from batch_jobs.engine.start_engine import Engine
from batch_jobs.generate.generate_batch import (
    Origin,
    SteeringPrompts,
    failed_generation,
    generate_rows,
    prepare_prompts,
)
from batch_jobs.rows.grid import Condition, StudyRows, conditions
from batch_jobs.rows.shards import Shard
from batch_jobs.rows.store import Generation, has_rows, write_rows
from batch_jobs.run.attempts import AttemptLog
from batch_jobs.run.run_directory import RunDirectory
from batch_jobs.texts.contrastive import Scenario
from vllm_steer.errors import SteerError

ROW_ERRORS = (SteerError, RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AssertionError)
"""Errors that vLLM and torch raise for work they cannot do. A dead engine, a full disk, an interrupt or exhausted host
memory is not the fault of a row: it ends the worker, and the shard is run again."""


@dataclass(frozen=True)
class ShardOutcome:
    """Counts and time of a shard that was run; outcomes can be added."""

    rows: int
    failed: int
    tokens: int
    """Generated tokens."""
    seconds: float
    """Wall-clock time of generation."""

    def __add__(self, other: ShardOutcome) -> ShardOutcome:
        return ShardOutcome(
            self.rows + other.rows,
            self.failed + other.failed,
            self.tokens + other.tokens,
            self.seconds + other.seconds,
        )


@dataclass(frozen=True)
class ShardJob:
    """Everything a worker needs besides its engine; can be sent to another process."""

    study: Study
    scenarios: Mapping[str, Scenario]
    probes: Probes
    run: RunDirectory
    file_metadata: Mapping[str, str]

    @property
    def conditions(self) -> Iterator[Condition]:
        """The cells of the grid, without the rows and their ids."""
        return conditions(self.study, self.probes.mean_residual_norms, self.probes.separations)

    @property
    def rows(self) -> StudyRows:
        """The whole grid of the study."""
        return StudyRows(self.study, self.probes.mean_residual_norms, self.probes.separations)


def register_steering(engine: Engine, job: ShardJob) -> None:
    """Register the directions that steer, and their controls.

    Raises:
        SteerError: the engine refuses a direction.
    """
    from vllm_steer import register_directions

    register_directions(
        engine, [*(job.probes.directions[key] for key in steering_keys(job.study)), *job.probes.controls.values()]
    )


class ShardRunner:
    """Runs shards of a study in one engine."""

    def __init__(self, engine: Engine, job: ShardJob, *, model_revision: str | None, progress: Progress) -> None:
        """Register the directions that steer, and their controls, and read every scenario's prompt once.

        Raises:
            SteerError: the engine refuses a direction.
            StudyError: a prompt cannot be prepared; see `prepare_prompts`.
        """
        study = job.study
        register_steering(engine, job)
        self._engine = engine
        self._job = job
        self._progress = progress
        self._origin = Origin(model_revision, job.probes.hashes)
        self._attempts = AttemptLog(job.run.stored(job.run.attempts))
        self._generations = job.run.stored(job.run.generations)
        self._prompts: SteeringPrompts = prepare_prompts(engine, study, job.scenarios, progress=progress)

    def run(self, shard: Shard) -> ShardOutcome:
        """Generate and store a shard. Rows that get no completion are stored with their error."""
        return self._run(shard, crashes_allowed=self._job.study.max_attempts, tried=0)

    def _run(self, shard: Shard, *, crashes_allowed: int, tried: int) -> ShardOutcome:
        rows = [(row.condition.model, row.condition.layer, row.row_id) for row in shard.rows]
        if has_rows(self._generations, rows):
            # an earlier worker stored it and died before it could report
            return ShardOutcome(len(shard.rows), 0, 0, 0.0)
        crashes = self._attempts.begin(shard.key)
        if crashes >= crashes_allowed:
            reason = f"its engine's process ended {tried + crashes} times while it ran"
            outcome = self._isolate(shard, tried=tried + crashes, reason=reason)
        else:
            outcome = self._try(shard, tried=tried + crashes)
        self._attempts.end(shard.key)
        return outcome

    def _try(self, shard: Shard, *, tried: int) -> ShardOutcome:
        began = time.monotonic()
        try:
            generations = self._generate(shard, tried + 1)
        except ROW_ERRORS as error:
            reason = f"{type(error).__name__}: {error}"
            if len(shard.rows) == 1 and tried + 1 < self._job.study.max_attempts:
                return self._try(shard, tried=tried + 1)
            return self._isolate(shard, tried=tried + 1, reason=reason)
        return self._store(generations, time.monotonic() - began)

    def _isolate(self, shard: Shard, *, tried: int, reason: str) -> ShardOutcome:
        """Run the halves of a failing shard apart; for a single row, store `reason` as its error."""
        if len(shard.rows) == 1:
            row = shard.rows[0]
            return self._store([failed_generation(row, self._prompts, self._origin, tried, reason)], 0.0)
        self._progress.warn(f"A batch of {len(shard.rows)} rows failed ({reason}); running its halves apart.")
        first, second = shard.halves()
        return self._run(first, crashes_allowed=1, tried=tried) + self._run(second, crashes_allowed=1, tried=tried)

    def _generate(self, shard: Shard, attempt: int) -> list[Generation]:
        """Run one batch, then retry the rows that the engine failed on, without the others."""
        generations = self._batch(shard, attempt)
        while attempt < self._job.study.max_attempts:
            again = [index for index, generation in enumerate(generations) if generation.error is not None]
            if not again:
                break
            attempt += 1
            retried = self._batch(Shard(tuple(shard.rows[index] for index in again)), attempt)
            for index, generation in zip(again, retried, strict=True):
                generations[index] = generation
        return generations

    def _batch(self, shard: Shard, attempt: int) -> list[Generation]:
        return generate_rows(
            self._engine,
            self._job.study,
            shard.rows,
            self._prompts,
            origin=self._origin,
            attempts=attempt,
            progress=self._progress,
        )

    def _store(self, generations: list[Generation], seconds: float) -> ShardOutcome:
        write_rows(self._generations, generations, self._job.file_metadata)
        return ShardOutcome(
            rows=len(generations),
            failed=sum(generation.error is not None for generation in generations),
            tokens=sum(generation.completion_tokens or 0 for generation in generations),
            seconds=seconds,
        )
