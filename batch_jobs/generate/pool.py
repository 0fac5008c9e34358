"""How many engines a Ray run uses, and what each gets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pool:
    """How many engines, and what each gets."""

    workers: int = 1
    gpus_per_worker: float | None = None
    """None: as many as tensor_parallel_size where the cluster has GPUs, else none."""
    cpus_per_worker: int | None = None
    """None: on a Ray started here the machine's cores shared out evenly; on a cluster 1."""
    address: str | None = None
    """Of a running cluster, as `ray.init` takes it (`auto`, `ray://host:10001`). None starts Ray on this machine."""
