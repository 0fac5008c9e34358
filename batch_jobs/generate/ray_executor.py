"""Runs a study's shards on a pool of engines with Ray: one actor per engine, each with its own GPUs or CPU cores.

Ray Data starts the actors, hands out the shards, restarts a dead actor, on another node if its own is gone, and gives
it its shard again. Actors get what they need through Ray and write their parts themselves, and only counts travel to
the driver. So all nodes must see the run directory, which is checked before work starts. All see an object store.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ray
import ray.data
from ray.exceptions import RayError
from rich.console import Console

from batch_jobs.config.study import Study, StudyError
from batch_jobs.cost.cost_curve import CostPoint
from batch_jobs.cost.materials import CostMaterials
from batch_jobs.directions.directions_and_norms import read_texts
from batch_jobs.engine.cpu_set import claim_cores
from batch_jobs.engine.start_engine import decoder_blocks, model_revision, start_engine
from batch_jobs.generate.cost_run import run_cost
from batch_jobs.generate.progress_board import BoardProgress, PoolView, ProgressBoard, Snapshot
from batch_jobs.generate.ray_nodes import blindness, refuse_blind_nodes
from batch_jobs.generate.ray_options import Pool
from batch_jobs.generate.shard_runner import ShardJob, ShardOutcome, ShardRunner
from batch_jobs.rows.shards import Cut, Shards
from batch_jobs.run.run_directory import RunDirectory
from batch_jobs.run.working_copy import WorkingCopy
from batch_jobs.texts.contrastive import Split
from vllm_steer.errors import SteerError

OBJECT_STORE_BYTES = 200 * 2**20
"""Size of the object store of a Ray started here. Only places in the grid and counts pass through it."""
READ_BOARD_SECONDS = 5.0
MAX_REASON_CHARACTERS = 600


class ShardWorker:
    """One engine in a Ray actor; Ray Data calls it with one shard at a time."""

    _fault: str | None = None

    def __init__(self, job: ShardJob, location: str, cores: int | None, board: Any) -> None:
        self._fault = blindness(job.run)
        if self._fault is not None:
            return  # of an error raised here, Ray hands the driver only the text
        progress = _on_own_cores(cores, board)
        engine = start_engine(job.study, location)
        self._grid = job.rows
        self._runner = ShardRunner(engine, job, model_revision=model_revision(location, engine), progress=progress)

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[float]]:
        """Run one shard and return the fields of its ShardOutcome, each in a list of one.

        `batch`: the fields of its Cut, each in a list of one.

        Raises:
            StudyError: this node does not see the run directory, or its store refuses.
        """
        if self._fault is not None:
            raise StudyError(self._fault)
        cut = Cut(int(batch["first"][0]), int(batch["length"][0]), str(batch["missing"][0]))
        outcome = self._runner.run(cut.shard(self._grid))
        return {
            "rows": [outcome.rows],
            "failed": [outcome.failed],
            "tokens": [outcome.tokens],
            "seconds": [outcome.seconds],
        }


class RayExecutor:
    """A session on a Ray cluster. Use as `with ray_session(...) as executor`."""

    def __init__(self, pool: Pool, study: Study, location: str, console: Console, *, quiet: bool) -> None:
        self._pool = pool
        self._location = location
        self._console = console
        self._quiet = quiet
        self._resources = resources_of(pool, study.engine.tensor_parallel_size)
        # engines on GPUs are not bound to cores: their host threads do little
        self._cores = None if self._resources["num_gpus"] else int(self._resources["num_cpus"])
        self._nodes_are_checked = False
        self._board = ray.remote(num_cpus=0)(ProgressBoard).remote()

    def read_texts(self, study: Study, split: Split, run: RunDirectory) -> None:
        """Read the contrastive texts in a separate process, which then ends and frees its memory.

        Raises:
            StudyError: the extraction fails, a node does not see the run directory, or Ray itself fails.
        """
        self._check_nodes(run)
        task = ray.remote(max_calls=1, **self._resources)(_read_texts)
        if not self._quiet:
            self._console.print("Reading the texts on a Ray worker", highlight=False)
        with ray_errors("The extraction"):
            ray.get(task.remote(study, split, run.absolute(), self._location, self._cores, self._board))
        run.fetch()

    def run(self, job: ShardJob, shards: Shards) -> ShardOutcome:
        """Run all shards; returns the sum of their outcomes.

        Raises:
            StudyError: a worker cannot start, a node does not see the run directory, another driver has taken the run,
                or Ray itself fails. Stored rows stay.
        """
        self._check_nodes(job.run)
        job = replace(job, run=job.run.absolute())
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # no plan and bars: PoolView shows progress
        items = [asdict(cut) for cut in shards.cuts]
        workers = min(self._pool.workers, len(items))
        dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            ShardWorker,
            fn_constructor_args=(job, self._location, self._cores, self._board),
            # one shard per actor: a second one would wait for a slow actor while another actor is free
            compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
            batch_size=1,
            **self._resources,
        )
        total = ShardOutcome(0, 0, 0, 0.0)
        view = PoolView(self._read_board, self._console, shards.num_rows, shards.num_done, quiet=self._quiet)
        with ray_errors("Generation"), view:
            for record in dataset.iter_rows():
                outcome = ShardOutcome(
                    int(record["rows"]), int(record["failed"]), int(record["tokens"]), float(record["seconds"])
                )
                view.stored(outcome)
                total += outcome
                job.run.check_held()
        return total

    def measure_cost(self, job: ShardJob, materials: CostMaterials) -> tuple[CostPoint, ...]:
        """Measure the cost of every steering in a separate process, which then ends and frees its memory.

        Raises:
            StudyError: the measurement fails, or Ray itself does.
        """
        self._check_nodes(job.run)
        task = ray.remote(max_calls=1, **self._resources)(_measure_cost)
        if not self._quiet:
            self._console.print("Measuring the cost on a Ray worker", highlight=False)
        job = replace(job, run=job.run.absolute())
        with ray_errors("Measuring the cost"):
            points: tuple[CostPoint, ...] = ray.get(
                task.remote(job, materials, self._location, self._cores, self._board)
            )
        return points

    def _check_nodes(self, run: RunDirectory) -> None:
        # a Ray that was started here has this machine alone, which has just written the run directory
        if self._pool.address is not None and not self._nodes_are_checked:
            run.publish()  # the nodes compare what they read with what is here
            with ray_errors("The check of the nodes"):
                refuse_blind_nodes(run.absolute(), self._resources)
            self._nodes_are_checked = True

    def _read_board(self) -> Snapshot | None:
        try:
            snapshot: Snapshot = ray.get(self._board.read.remote(), timeout=READ_BOARD_SECONDS)
        except RayError:
            return None  # not worth stopping for; if Ray is gone, the loop over the rows raises
        return snapshot


def resources_of(pool: Pool, tensor_parallel_size: int) -> dict[str, float]:
    """What each worker of a pool takes of the connected cluster, as options of `ray.remote`.

    Raises:
        StudyError: the cluster is too small for the pool.
    """
    there = ray.cluster_resources()
    gpus = pool.gpus_per_worker
    if gpus is None:
        gpus = tensor_parallel_size if there.get("GPU", 0) else 0
    cpus = pool.cpus_per_worker or (1 if pool.address else cores_each(pool.workers))
    for resource, wanted in (("CPU", cpus * pool.workers), ("GPU", gpus * pool.workers)):
        if wanted > there.get(resource, 0):
            raise StudyError(
                f"{pool.workers} workers need {wanted:g} {resource} in all and the Ray cluster has "
                f"{there.get(resource, 0):g}; lower --workers or the resources of each."
            )
    return {"num_cpus": cpus, "num_gpus": gpus}


@contextmanager
def ray_session(pool: Pool, study: Study, location: str, console: Console, *, quiet: bool) -> Iterator[RayExecutor]:
    """`ray_connection`, with an executor for a study.

    Raises:
        StudyError: Ray cannot be used, or the cluster is too small for the pool.
    """
    with ray_connection(pool):
        yield RayExecutor(pool, study, location, console, quiet=quiet)


@contextmanager
def ray_connection(pool: Pool) -> Iterator[None]:
    """Connect to the pool's cluster, or start Ray on this machine and stop it afterwards.

    Raises:
        StudyError: Ray cannot be used.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's core prints warnings about Ray Data's own actors; errors that matter to the user are raised
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if pool.address is None:
        cpus = (pool.cpus_per_worker or cores_each(pool.workers)) * pool.workers
        options |= {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    else:
        options["address"] = pool.address
    try:
        ray.init(**options)
    except (RayError, ConnectionError, RuntimeError, ValueError) as error:
        raise StudyError(f"Ray at {pool.address or 'this machine'} cannot be used: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _read_texts(study: Study, split: Split, run: RunDirectory, location: str, cores: int | None, board: Any) -> None:
    progress = _on_own_cores(cores, board)
    engine = start_engine(study, location)
    blocks = decoder_blocks(location, trust_remote_code=study.engine.trust_remote_code)
    if run.copy is None:
        read_texts(engine, study, split, run, num_layers=blocks, progress=progress)
        return
    with tempfile.TemporaryDirectory(prefix="vllm-steer-run-") as folder:
        # this node may share no disk with the driver, which fetches the files from the store
        here = WorkingCopy(Path(folder), run.copy.store)
        read_texts(engine, study, split, RunDirectory(here.folder, here), num_layers=blocks, progress=progress)
        here.publish()


def _measure_cost(
    job: ShardJob, materials: CostMaterials, location: str, cores: int | None, board: Any
) -> tuple[CostPoint, ...]:
    progress = _on_own_cores(cores, board)
    return run_cost(start_engine(job.study, location), job, materials, progress=progress)


def _on_own_cores(cores: int | None, board: Any) -> BoardProgress:
    progress = BoardProgress(board)
    if cores is not None and not claim_cores(cores):
        progress.warn(f"fewer than {cores} cores are free of other engines on this machine; sharing them")
    return progress


def cores_each(workers: int) -> int:
    """An even share of this machine's cores."""
    return max(1, len(os.sched_getaffinity(0)) // workers)


@contextmanager
def ray_errors(what: str) -> Iterator[None]:
    """Turn a RayError into a StudyError, with the message of the worker's own SteerError or with advice."""
    try:
        yield
    except RayError as error:
        if own := _own_error(error):
            raise StudyError(str(own)) from error
        reason = " ".join(str(error).split())[:MAX_REASON_CHARACTERS]
        raise StudyError(
            f"{what} on Ray stopped ({type(error).__name__}: {reason}); what is stored stays, so run the same command "
            "again."
        ) from error


def _own_error(error: BaseException | None) -> SteerError | None:
    """The SteerError that Ray and Ray Data wrapped, each in its own way; None if there is none."""
    while error is not None:
        if isinstance(error, SteerError):
            return error
        error = getattr(error, "cause", None) or error.__cause__
    return None
