"""Runs a study's shards in this process, in one engine."""

from __future__ import annotations

from batch_jobs.config.study import Study
from batch_jobs.cost.cost_curve import CostPoint
from batch_jobs.cost.materials import CostMaterials
from batch_jobs.directions.directions_and_norms import read_texts
from batch_jobs.engine.progress import ConsoleProgress, SessionLine
from batch_jobs.engine.start_engine import LazyEngine, decoder_blocks
from batch_jobs.generate.cost_run import run_cost
from batch_jobs.generate.shard_runner import ShardJob, ShardOutcome, ShardRunner
from batch_jobs.rows.shards import Shards
from batch_jobs.run.run_directory import RunDirectory
from batch_jobs.texts.contrastive import Split


class LocalExecutor:
    """One engine for extraction and generation, started when first needed."""

    def __init__(self, engine: LazyEngine, progress: ConsoleProgress) -> None:
        self._engine = engine
        self._progress = progress

    def read_texts(self, study: Study, split: Split, run: RunDirectory) -> None:
        """Read the contrastive texts; see `directions_and_norms.read_texts`."""
        blocks = decoder_blocks(self._engine.location, trust_remote_code=study.engine.trust_remote_code)
        read_texts(self._engine.engine, study, split, run, num_layers=blocks, progress=self._progress)

    def run(self, job: ShardJob, shards: Shards) -> ShardOutcome:
        """Run all shards, one after another; returns the sum of their outcomes.

        Raises:
            StudyError: the run directory's store refuses, or another driver has taken the run.
        """
        engine = self._engine.engine
        runner = ShardRunner(engine, job, model_revision=self._engine.revision, progress=self._progress)
        total = ShardOutcome(0, 0, 0, 0.0)
        session = SessionLine(self._progress.tell, shards.num_rows, shards.num_done)
        for shard in shards:
            job.run.check_held()
            outcome = runner.run(shard)
            session.stored(outcome.rows)
            total += outcome
        return total

    def measure_cost(self, job: ShardJob, materials: CostMaterials) -> tuple[CostPoint, ...]:
        """Measure the cost of every steering; see `cost_run.run_cost`."""
        return run_cost(self._engine.engine, job, materials, progress=self._progress)
