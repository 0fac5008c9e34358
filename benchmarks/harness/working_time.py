"""The time that a piece of work takes, where it pauses in between."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.harness.line_process import Pause


class WorkingTime:
    """Counts the seconds since it was made, without the pauses.

    Args:
        now: the clock; its readings are the moments that ``at`` takes.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._laps: list[tuple[float, float]] = []
        self._began = now()

    def stop(self) -> None:
        """Count no further until ``go_on``."""
        self._laps.append((self._began, self._now()))

    def go_on(self) -> None:
        """Count again."""
        self._began = self._now()

    @property
    def laps(self) -> list[float]:
        """The seconds from each start to the stop behind it."""
        return [end - began for began, end in self._laps]

    def at(self, moment: float) -> float:
        """What it had counted at a moment, by the time that it stopped for the last time."""
        return sum(min(end, moment) - began for began, end in self._laps if began < moment)


@contextmanager
def pausing(llm: Any, clock: WorkingTime, pause: Pause) -> Iterator[None]:
    """Let what a ``vllm.LLM`` does pause before every step of its engine, which is in this process."""
    engine = llm.llm_engine

    def step() -> Any:
        clock.stop()
        pause()
        clock.go_on()
        return type(engine).step(engine)

    engine.step = step
    try:
        yield
    finally:
        del engine.step
