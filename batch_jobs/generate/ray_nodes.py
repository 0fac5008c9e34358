"""Checks that every node of a Ray cluster sees the run directory, before an engine starts on one that does not."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from batch_jobs.config.study import StudyError
from batch_jobs.run.run_directory import RunDirectory
from vllm_steer.errors import SteerError

_NOT_SEEN = (
    "does not see the run directory {}; give --out a folder that all nodes share, or an address in an object store, "
    "e.g. s3://bucket/runs/demo"
)
PATIENCE_SECONDS = 120.0
"""A node starts a process for the check, which imports this package."""


def refuse_blind_nodes(run: RunDirectory, resources: Mapping[str, float]) -> None:
    """Check on every node that has room for a worker that it reads the driver's `provenance.json`.

    Args:
        run: an absolute path, or a run in an object store; its provenance is written.
        resources: what a worker takes of a node, as options of `ray.remote`.

    Raises:
        StudyError: a node finds no run directory or another one, its store refuses, or it does not answer; the message
            names the node.
        RayError: a node cannot run the check, e.g. for want of this package.
    """
    digest = hashlib.sha256(run.provenance.read_bytes()).hexdigest()
    look = ray.remote(num_cpus=0)(_fault)
    answers: list[tuple[str, Any]] = []  # two nodes may share a machine
    for node in ray.nodes():
        if node["Alive"] and _has_room(node["Resources"], resources):
            there = look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
            name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}, {node['NodeID'][:8]})"
            answers.append((name, there.remote(run, digest)))
    for name, answer in answers:
        try:
            fault = ray.get(answer, timeout=PATIENCE_SECONDS)
        except GetTimeoutError:
            fault = f"does not answer within {PATIENCE_SECONDS:.0f} s; restart it, or take it out of the cluster"
        if fault is not None:
            raise StudyError(f"The Ray node {name} {fault}.")


def blindness(run: RunDirectory) -> str | None:
    """Why a worker on this node, which may have joined after the check of all, must not start; None if it may."""
    if run.copy is None and not run.path.is_dir():
        return f"The Ray node {socket.gethostname()} {_NOT_SEEN.format(run.path)}."
    return None


def _has_room(there: Mapping[str, float], wanted: Mapping[str, float]) -> bool:
    return all(there.get(name, 0) >= wanted[f"num_{name.lower()}s"] for name in ("CPU", "GPU"))


def _fault(run: RunDirectory, digest: str) -> str | None:
    """What keeps this node from the run directory; None if nothing does."""
    try:
        found = hashlib.sha256(run.stored(run.provenance).read_bytes()).hexdigest()
    except SteerError as error:
        return f"cannot use the run directory: {error}"
    except OSError:
        found = None
    if found == digest:
        return None
    if run.copy is not None:
        return f"finds another run at {run.shown(run.path)} than the driver; let both reach the same server"
    return _NOT_SEEN.format(run.path)
