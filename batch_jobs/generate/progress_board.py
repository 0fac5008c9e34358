"""Progress of many engines: each worker reports to a board; the driver reads it and shows a line per worker."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from batch_jobs.engine.progress import LOG_SECONDS, Counters, Work, rows_of_session, time_left
from batch_jobs.engine.start_engine import Engine
from batch_jobs.generate.shard_runner import ShardOutcome

REPORT_SECONDS = 1.0
STALE_SECONDS = 30.0
"""A worker that has not reported for this long is dead or restarting, so its state is ignored."""


@dataclass(frozen=True)
class WorkerState:
    """State of one worker."""

    worker: str
    stage: str
    rows: int
    """Rows of the current batch."""
    finished_rows: int
    """Rows of the current batch that are generated but not stored yet."""
    tokens_per_second: float
    """Generation speed over all batches of this worker so far, without the time between them."""


@dataclass(frozen=True)
class Snapshot:
    """The board at one moment."""

    states: tuple[WorkerState, ...]
    """States of the workers that reported recently."""
    warnings: tuple[str, ...]
    """Warnings that no earlier snapshot holds."""


class ProgressBoard:
    """Collects the states and warnings of all workers; runs as its own Ray actor."""

    def __init__(self) -> None:
        self._states: dict[str, tuple[float, WorkerState]] = {}
        self._warnings: list[str] = []

    def report(self, state: WorkerState) -> None:
        """Replace the worker's state."""
        self._states[state.worker] = (time.monotonic(), state)

    def warn(self, message: str) -> None:
        """Keep a message for the driver."""
        self._warnings.append(message)

    def read(self) -> Snapshot:
        """The recent states, and the warnings since the last call."""
        warnings, self._warnings = tuple(self._warnings), []
        now = time.monotonic()
        return Snapshot(tuple(state for at, state in self._states.values() if now - at < STALE_SECONDS), warnings)


class BoardProgress:
    """A worker's `Progress`, which reports to the board. `board` is the Ray actor's handle."""

    def __init__(self, board: Any) -> None:
        self._board = board
        self._worker = f"{socket.gethostname()}:{os.getpid()}"
        self._tokens = 0
        self._seconds = 0.0
        self._generated_rows = 0  # of the batch that is not stored yet

    @contextmanager
    def watch(self, engine: Engine, title: str, work: Work) -> Iterator[None]:
        """See `Progress.watch`."""
        start, began = Counters.of(engine), time.monotonic()
        ended = threading.Event()

        def report() -> tuple[int, float]:
            done = Counters.of(engine).since(start)
            tokens, seconds = (0, 0.0) if work.prefill_only else (done.generated_tokens, time.monotonic() - began)
            speed = (self._tokens + tokens) / max(self._seconds + seconds, 1e-6)
            rows = self._generated_rows if work.prefill_only else done.finished_rows
            self._board.report.remote(WorkerState(self._worker, title, work.rows, rows, speed))
            return tokens, seconds

        def keep_reporting() -> None:
            while not ended.wait(REPORT_SECONDS):
                report()

        report()
        reporter = threading.Thread(target=keep_reporting, name="board-progress", daemon=True)
        reporter.start()
        try:
            yield
        finally:
            ended.set()
            reporter.join()
            tokens, seconds = report()
            self._generated_rows = work.rows
            self._tokens += tokens
            self._seconds += seconds

    def warn(self, message: str) -> None:
        """See `Progress.warn`."""
        self._board.warn.remote(f"{self._worker}: {message}")


class PoolView:
    """The driver's view of a pool of workers: rows done, tokens/s and time left, in total and per worker."""

    def __init__(self, read_board: Any, console: Console, rows: int, earlier: int = 0, *, quiet: bool) -> None:
        """`read_board` returns the board's Snapshot, or None when it cannot be reached. `rows`: of this session;
        `earlier`: rows that were stored before it."""
        self._read_board = read_board
        self._console = console
        self._rows = rows
        self._earlier = earlier
        self._quiet = quiet
        self._stored = ShardOutcome(0, 0, 0, 0.0)
        self._began = time.monotonic()
        self._ended = threading.Event()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            console=console,
            disable=quiet or not console.is_terminal,
        )
        self._total = self._bar.add_task("all workers", total=rows, facts="")
        self._lines: dict[str, TaskID] = {}
        self._thread = threading.Thread(target=self._watch, name="pool-view", daemon=True)

    def __enter__(self) -> Self:
        self._bar.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        if kind is None:
            line = self._show()
            if not self._quiet and not self._console.is_terminal:
                self._console.print(line, highlight=False)
        self._bar.stop()

    def stored(self, outcome: ShardOutcome) -> None:
        """Count a shard that is now on disk."""
        self._stored += outcome

    def _watch(self) -> None:
        next_line = time.monotonic() + LOG_SECONDS
        while not self._ended.wait(REPORT_SECONDS):
            line = self._show()
            if not self._quiet and not self._console.is_terminal and time.monotonic() >= next_line:
                next_line += LOG_SECONDS
                self._console.print(line, highlight=False)

    def _show(self) -> str:
        snapshot: Snapshot = self._read_board() or Snapshot((), ())
        for warning in snapshot.warnings:
            self._console.print(warning, style="yellow", markup=False, highlight=False)
        elapsed = time.monotonic() - self._began
        line = pool_line(snapshot.states, self._stored.rows, self._rows, elapsed, self._earlier)
        self._bar.update(self._total, completed=self._stored.rows, facts=line)
        for state in snapshot.states:
            if state.worker not in self._lines:
                self._lines[state.worker] = self._bar.add_task(state.worker, facts="")
            facts = f"{state.stage}: {state.finished_rows}/{state.rows} rows, {state.tokens_per_second:.0f} tokens/s"
            self._bar.update(self._lines[state.worker], completed=state.finished_rows, total=state.rows, facts=facts)
        return line


def pool_line(states: tuple[WorkerState, ...], stored: int, rows: int, elapsed: float, earlier: int = 0) -> str:
    """The progress of all workers in one line.

    `stored` and `rows` are those of this session; `earlier` rows, stored before it, are named and enter no speed. The
    time left counts rows finished in running batches as done and assumes the average pace so far, engine start-up
    included.
    """
    done = min(stored + sum(state.finished_rows for state in states), rows)
    speed = sum(state.tokens_per_second for state in states)
    each = ", ".join(f"{state.worker} {state.tokens_per_second:.0f}" for state in states)
    counted = f"{rows_of_session(done, rows, earlier)}, {speed:.0f} tokens/s ({each or 'engines starting'})"
    return f"{counted}, {elapsed:.0f} s, {time_left(done, rows, elapsed)}"
