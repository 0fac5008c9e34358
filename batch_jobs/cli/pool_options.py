"""The options of commands that run in one engine or in a Ray pool of them."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from batch_jobs.errors import StudyError
from batch_jobs.generate.ray_options import Pool


class ExecutorName(StrEnum):
    """Where engines run."""

    LOCAL = "local"
    RAY = "ray"


Executor = Annotated[ExecutorName, typer.Option(help="local: one engine in this process. ray: a pool of engines.")]
Workers = Annotated[int, typer.Option(min=1, help="Engines of the Ray pool.")]
GpusPerWorker = Annotated[
    float | None, typer.Option(min=0, help="GPUs of each engine.", show_default="tensor_parallel_size, if any")
]
CpusPerWorker = Annotated[
    int | None, typer.Option(min=1, help="CPU cores of each engine.", show_default="an even share")
]
Address = Annotated[
    str | None, typer.Option(help="Address of a running Ray cluster.", show_default="Ray on this machine")
]


def pool_of(
    executor: ExecutorName,
    workers: int,
    gpus_per_worker: float | None,
    cpus_per_worker: int | None,
    address: str | None,
) -> Pool | None:
    """The pool that these options describe; None for one engine in this process.

    Raises:
        StudyError: an option of the pool is given without it.
    """
    if executor is ExecutorName.RAY:
        return Pool(workers, gpus_per_worker, cpus_per_worker, address)
    if (workers, gpus_per_worker, cpus_per_worker, address) != (1, None, None, None):
        raise StudyError(
            "--workers, --gpus-per-worker, --cpus-per-worker and --address are options of the Ray pool; "
            "add --executor ray, or leave them out."
        )
    return None
