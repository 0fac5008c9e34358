"""A worker's reports and the driver's display of them; the board is called directly instead of through Ray."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from batch_jobs.engine.progress import Work
from batch_jobs.generate import progress_board
from batch_jobs.generate.progress_board import BoardProgress, PoolView, ProgressBoard, WorkerState, pool_line
from batch_jobs.generate.shard_runner import ShardOutcome


class Remote:
    """A board whose methods are called like those of a Ray actor's handle."""

    def __init__(self, board: ProgressBoard) -> None:
        self.report = SimpleNamespace(remote=board.report)
        self.warn = SimpleNamespace(remote=board.warn)


class CountingEngine:
    def __init__(self) -> None:
        self.totals = {"vllm:prompt_tokens": 500, "vllm:generation_tokens": 300, "vllm:request_success": 7}

    def get_metrics(self) -> list[Any]:
        return [SimpleNamespace(name=name, value=value) for name, value in self.totals.items()]

    def work(self, **added: int) -> None:
        for name, count in added.items():
            self.totals[f"vllm:{name}"] += count


def test_a_worker_reports_its_own_batch_and_its_pace_over_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(progress_board.time, "monotonic", lambda: clock[0])
    board, engine = ProgressBoard(), CountingEngine()
    progress = BoardProgress(Remote(board))
    generating = Work(rows=4, prompt_tokens=40, max_new_tokens=50)
    with progress.watch(engine, "Generating", generating):
        engine.work(generation_tokens=200, request_success=3)
        clock[0] += 10
    (state,) = board.read().states
    assert (state.stage, state.rows, state.finished_rows, state.tokens_per_second) == ("Generating", 4, 3, 20.0)
    # reading again generates nothing: the rows stay generated, and the pace is that of generation
    with progress.watch(engine, "Reading", Work(rows=4, prompt_tokens=240, max_new_tokens=1)):
        engine.work(prompt_tokens=240, generation_tokens=4, request_success=4)
        clock[0] += 10
    (state,) = board.read().states
    assert (state.stage, state.finished_rows, state.tokens_per_second) == ("Reading", 4, 20.0)
    with progress.watch(engine, "Generating", generating):
        engine.work(generation_tokens=100)
        clock[0] += 20
    (state,) = board.read().states
    assert (state.finished_rows, state.tokens_per_second) == (0, 10.0)


def test_a_worker_that_went_silent_counts_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress_board.time, "monotonic", lambda: clock[0])
    board = ProgressBoard()
    board.report(WorkerState("a", "Generating", 4, 1, 20.0))
    clock[0] = progress_board.STALE_SECONDS - 1
    board.report(WorkerState("b", "Generating", 4, 2, 30.0))
    assert [state.worker for state in board.read().states] == ["a", "b"]
    clock[0] += 2
    assert [state.worker for state in board.read().states] == ["b"]


def test_warnings_are_handed_out_once() -> None:
    board = ProgressBoard()
    BoardProgress(Remote(board)).warn("careful")
    (warning,) = board.read().warnings
    assert warning.endswith(": careful")
    assert board.read().warnings == ()


def test_the_line_names_rows_pace_by_worker_and_time_left() -> None:
    states = (WorkerState("a:1", "Generating", 8, 2, 150.0), WorkerState("b:2", "Generating", 8, 3, 50.0))
    assert pool_line(states, 15, 100, 40.0) == "20/100 rows, 200 tokens/s (a:1 150, b:2 50), 40 s, 160 s left"
    assert pool_line((), 0, 100, 9.0) == "0/100 rows, 0 tokens/s (engines starting), 9 s, time left unknown"
    # what an earlier session stored is named, and enters neither the pace nor the time left
    assert pool_line(states, 15, 100, 40.0, 900) == (
        "20/100 rows (900 stored before), 200 tokens/s (a:1 150, b:2 50), 40 s, 160 s left"
    )
    # a shard is counted as stored a moment before its worker begins the next
    assert pool_line(states, 98, 100, 40.0).startswith("100/100 rows")


@pytest.mark.parametrize("quiet", [False, True])
def test_the_driver_shows_warnings_always_and_progress_unless_quiet(quiet: bool) -> None:
    board, out = ProgressBoard(), io.StringIO()
    with PoolView(board.read, Console(file=out, width=120), 10, quiet=quiet) as view:
        board.report(WorkerState("a:1", "Generating", 4, 0, 12.0))
        board.warn("a:1: careful")
        view.stored(ShardOutcome(10, 0, 400, 3.0))
    shown = out.getvalue()
    assert "careful" in shown
    assert ("10/10 rows, 12 tokens/s (a:1 12)" in shown) is not quiet
