"""The time that a piece of work takes, without its pauses."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.harness.line_process import Pause


class WorkingTime:
    """A stopwatch that starts when it is made.

    Args:
        now: the clock; ``at`` takes its readings.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._laps: list[tuple[float, float]] = []
        self._began = now()

    def stop(self) -> None:
        """Stop counting until ``go_on``."""
        self._laps.append((self._began, self._now()))

    def go_on(self) -> None:
        """Count on."""
        self._began = self._now()

    @property
    def laps(self) -> list[float]:
        """The seconds from each start to the next stop."""
        return [end - began for began, end in self._laps]

    def at(self, moment: float) -> float:
        """The seconds counted up to `moment`; time since the last stop is left out."""
        return sum(min(end, moment) - began for began, end in self._laps if began < moment)


@contextmanager
def pausing(llm: Any, clock: WorkingTime, pause: Pause) -> Iterator[None]:
    """Make an in-process ``vllm.LLM`` pause before every engine step in the block; `clock` stops during pauses."""
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
