"""Keeps a second driver away from a run directory in an object store.

pyarrow can neither make an object only if it is absent nor lock one. So every driver keeps an object of its own in the
run's folder `drivers/` and renews it every few seconds. A new driver first writes its own and then lists the others:
of two drivers, the later one to write sees the other's. One that is renewed belongs to a driver at work, and the new
driver is refused; one that is not was left by a driver that was killed, and is removed. Two drivers that start in the
same moment may both be refused, never both admitted. A driver that was cut off from the store for so long that
another took its place finds its object gone and stops.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

from batch_jobs.errors import StudyError
from batch_jobs.files.object_store import Stored, StoreError, StorePath

BEAT_SECONDS = 5.0
LEFT_BEHIND_SECONDS = 20.0
"""An object that was not renewed for this long was left by a driver that ended without removing it."""
LOOK_SECONDS = 1.0


class DriverLock:
    """Context manager that holds a run directory for one driver."""

    def __init__(self, run: StorePath, *, on_beat: Callable[[], None] = lambda: None) -> None:
        """`on_beat` is called in a thread after each renewal; it may raise StoreError, which counts for nothing."""
        self._run = run
        self._folder = run / "drivers"
        self._own = self._folder / f"{uuid.uuid4().hex}.json"
        self._on_beat = on_beat
        self._ended = threading.Event()
        self._lost = False
        self._thread = threading.Thread(target=self._keep_beating, name="driver-lock", daemon=True)

    def __enter__(self) -> Self:
        """Take the run directory; waits up to LEFT_BEHIND_SECONDS where a killed driver has left its object.

        Raises:
            StudyError: another driver is at work there.
            StoreError: the store refuses.
        """
        self._write()
        self._thread.start()
        try:
            self._outlast_others()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def check(self) -> None:
        """Check that no other driver has taken the run directory.

        Raises:
            StudyError: one has.
        """
        if self._lost:
            raise StudyError(
                f"{self._run}: another driver has taken this run directory while this one could not reach the store; "
                "what is stored stays, so leave it to the other one, or run the same command again when it has ended."
            )

    def _write(self) -> None:
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "at": datetime.now(UTC).isoformat()}
        self._own.write_bytes(json.dumps(owner).encode())

    def _keep_beating(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with contextlib.suppress(StoreError):  # the next beat may reach the store; the driver's own calls tell
                if not self._own.exists():
                    self._lost = True
                    return
                self._write()
                self._on_beat()

    def _outlast_others(self) -> None:
        others = self._others()
        deadline = time.monotonic() + LEFT_BEHIND_SECONDS
        while others and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)
            now = self._others()
            if renewed := [name for name, state in others.items() if now.get(name, state) != state]:
                raise StudyError(
                    f"{self._run} is in use by {self._owner(renewed[0])}; wait for its end, or give --out another "
                    "place. Two drivers would do the same work twice."
                )
            others = {name: state for name, state in others.items() if name in now}
        for name in others:
            (self._folder / name).unlink(missing_ok=True)

    def _others(self) -> dict[str, Stored]:
        return {name: state for name, state in self._folder.files().items() if name != self._own.name}

    def _owner(self, name: str) -> str:
        try:
            owner = json.loads((self._folder / name).read_bytes())
            return f"another driver (process {owner['pid']} on {owner['host']})"
        except (FileNotFoundError, ValueError, LookupError, TypeError):
            return "another driver"

    def _release(self) -> None:
        self._ended.set()
        self._thread.join()
        if not self._lost:
            with contextlib.suppress(StoreError):  # it is taken for one left behind
                self._own.unlink(missing_ok=True)
