"""Gives each engine on a machine its own set of CPU cores, so that engines do not compete for the same cores."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from pathlib import Path


def default_folder() -> Path:
    """Folder of the core locks of this user's engines on this machine."""
    return Path(tempfile.gettempdir()) / f"vllm-steer-cores-{os.getuid()}"


PATIENCE_SECONDS = 30.0
RETRY_SECONDS = 0.5


def claim_cores(count: int, folder: Path | None = None, *, patience: float = PATIENCE_SECONDS) -> frozenset[int]:
    """Bind this process to `count` cores that no other live process has claimed, and return them.

    Returns an empty set and binds nothing if fewer cores become free within `patience` seconds (an engine that is being
    replaced needs time to exit). A claim is a lock on a file named after the core. The kernel releases it when the
    process ends, even after a kill -9. Sets OMP_NUM_THREADS to `count`. Threads started later inherit the binding, so
    call this before torch is imported.
    """
    folder = folder or default_folder()
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + patience
    while not (held := _lock(count, folder)):
        if time.monotonic() >= deadline:
            return frozenset()
        time.sleep(RETRY_SECONDS)
    os.sched_setaffinity(0, held)
    os.environ["OMP_NUM_THREADS"] = str(count)
    return frozenset(held)


def _lock(count: int, folder: Path) -> dict[int, int]:
    """Core -> descriptor of its locked file, for `count` cores; empty, with nothing locked, if fewer are free."""
    held: dict[int, int] = {}
    for core in sorted(os.sched_getaffinity(0)):
        if len(held) == count:
            break
        handle = os.open(folder / str(core), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            continue
        held[core] = handle
    if len(held) == count:
        return held
    for handle in held.values():
        os.close(handle)
    return {}
