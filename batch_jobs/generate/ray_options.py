"""The pool of engines that a Ray run uses."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pool:
    """Number of engines, and the resources of each."""

    workers: int = 1
    gpus_per_worker: float | None = None
    """None: tensor_parallel_size if the cluster has GPUs, else 0."""
    cpus_per_worker: int | None = None
    """None: an even share of the machine's cores if Ray is started here; 1 on a running cluster."""
    address: str | None = None
    """A running cluster, as `ray.init` takes it (`auto`, `ray://host:10001`). None starts Ray on this machine."""
