"""Reads a capture's shards in a pool of engines with Ray: one actor per engine, each with one shard at a time.

Actors write their files themselves, so all machines must see the folder; only records travel back. Ray starts a dead
actor again and gives it its shard again, a few times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ray
from rich.console import Console

from batch_jobs.capture.run_capture import start_capture_engine
from batch_jobs.capture.settings import CaptureSettings
from batch_jobs.capture.shard_file import capture_shard
from batch_jobs.capture.shards import TextShard
from batch_jobs.engine.cpu_set import claim_cores
from batch_jobs.engine.progress import ConsoleProgress
from batch_jobs.generate.ray_executor import ray_connection, ray_errors, resources_of
from batch_jobs.generate.ray_options import Pool

RESTARTS = 2
"""How often an actor, or a shard whose actor has died, is tried again before the command ends."""


class CaptureWorker:
    """One engine in a Ray actor."""

    def __init__(self, settings: CaptureSettings, out: Path, cores: int | None) -> None:
        if cores is not None:
            claim_cores(cores)  # where too few are free, the engines share them
        self._settings, self._out = settings, out
        self._engine = start_capture_engine(settings)

    def run(self, shard: TextShard) -> dict[str, Any]:
        """Write a shard's file and return its record."""
        progress = ConsoleProgress(Console(stderr=True), quiet=True)
        return capture_shard(self._engine, self._settings, shard, self._out, progress=progress)


def in_ray_pool(
    shards: Iterable[TextShard],
    settings: CaptureSettings,
    out: Path,
    done: Callable[[dict[str, Any]], None],
    pool: Pool,
) -> None:
    """Read all shards; each is made when an actor is free for it, so that few are in memory.

    Args:
        shards: the shards to read.
        settings: the capture's settings.
        out: absolute path of the folder.
        done: is called with the record of each finished shard.
        pool: the engines and the resources of each.

    Raises:
        StudyError: Ray cannot be used, the cluster is too small, or a worker fails for good.
    """
    left = iter(shards)
    shard = next(left, None)
    if shard is None:  # a capture with nothing left to read starts no Ray
        return
    with ray_connection(pool), ray_errors("The capture"):
        resources = resources_of(pool, settings.engine.tensor_parallel_size)
        cores = None if resources["num_gpus"] else int(resources["num_cpus"])
        worker_class = ray.remote(max_restarts=RESTARTS, max_task_retries=RESTARTS, **resources)(CaptureWorker)
        running: dict[Any, Any] = {}  # reference to a record -> the actor that makes it
        free: list[Any] = []
        started = 0
        while shard is not None or running:
            while shard is not None and (free or started < pool.workers):
                if not free:
                    free.append(worker_class.remote(settings, out, cores))
                    started += 1
                actor = free.pop()
                running[actor.run.remote(shard)] = actor
                shard = next(left, None)
            (ready,), _ = ray.wait(list(running), num_returns=1)
            free.append(running.pop(ready))
            done(ray.get(ready))
