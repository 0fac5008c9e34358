"""Cores are claimed by processes, so these tests start some."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CLAIM = """
import os, sys, time
from pathlib import Path
from batch_jobs.engine.cpu_set import claim_cores
cores = claim_cores(int(sys.argv[1]), Path(sys.argv[2]), patience=float(sys.argv[3]))
print(*sorted(cores), "|", *sorted(os.sched_getaffinity(0)), "|", os.environ.get("OMP_NUM_THREADS"), flush=True)
time.sleep(120)
"""
ALL = sorted(os.sched_getaffinity(0))


@contextmanager
def claimant(count: int, folder: Path, patience: float = 0) -> Iterator[tuple[subprocess.Popen[str], list[list[str]]]]:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-c", CLAIM, str(count), str(folder), str(patience)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            yield process, [field.split() for field in process.stdout.readline().split("|")]
        finally:
            process.kill()


def test_claims_do_not_overlap_and_bind_their_process(tmp_path: Path) -> None:
    half = len(ALL) // 2
    with claimant(half, tmp_path) as (_, first), claimant(len(ALL) - half, tmp_path) as (_, second):
        assert sorted(map(int, first[0] + second[0])) == ALL
        assert first[0] == first[1]
        assert second[0] == second[1]
        assert first[2] == [str(half)]


def test_too_few_free_cores_bind_nothing(tmp_path: Path) -> None:
    with claimant(1, tmp_path), claimant(len(ALL), tmp_path) as (_, refused):
        assert refused == [[], [str(core) for core in ALL], ["None"]]


def test_a_killed_process_gives_its_cores_back(tmp_path: Path) -> None:
    with claimant(len(ALL), tmp_path) as (process, taken):
        assert len(taken[0]) == len(ALL)
        process.send_signal(signal.SIGKILL)
        with claimant(len(ALL), tmp_path, patience=30) as (_, again):
            assert again[0] == taken[0]
