from __future__ import annotations

import io
import time
from dataclasses import dataclass

import pytest
from rich.console import Console

from batch_jobs.engine import progress
from batch_jobs.engine.progress import Counters, SessionLine, Work, engine_progress, tokens_done_and_due


@dataclass
class Count:
    name: str
    value: int


@dataclass
class Histogram:
    name: str
    sum: float


class CountingEngine:
    """The part of an engine that progress reads: its statistics, which count from the start of the process."""

    def __init__(self) -> None:
        self.generated, self.ended = 1000, 10

    def get_metrics(self) -> list[object]:
        return [
            Count("vllm:prompt_tokens", 70),
            Count("vllm:generation_tokens", self.generated),
            Count("vllm:request_success", self.ended - 1),  # one label: stop
            Count("vllm:request_success", 1),  # another: length
            Histogram("vllm:request_generation_tokens", float(self.generated)),
        ]

    def generate(self, prompts: object, sampling_params: object, *, use_tqdm: bool) -> list[object]:
        raise AssertionError("progress only watches")

    def get_tokenizer(self) -> object:
        raise AssertionError("progress only watches")


def test_a_row_that_ends_early_shortens_the_rest() -> None:
    work = Work(rows=4, prompt_tokens=100, max_new_tokens=50)
    assert tokens_done_and_due(Counters(), work) == (0, 200)
    one_ended = Counters(generated_tokens=40, finished_rows=1, finished_tokens=10)
    assert tokens_done_and_due(one_ended, work) == (40, 160)
    all_ended = Counters(generated_tokens=90, finished_rows=4, finished_tokens=90)
    assert tokens_done_and_due(all_ended, work) == (90, 90)


def test_reading_alone_is_measured_in_prompt_tokens() -> None:
    work = Work(rows=2, prompt_tokens=100, max_new_tokens=1)
    assert tokens_done_and_due(Counters(prompt_tokens=60, generated_tokens=1), work) == (60, 100)


def test_progress_counts_this_batch_only_and_says_rows_speed_and_time() -> None:
    engine, out = CountingEngine(), io.StringIO()
    work = Work(rows=2, prompt_tokens=10, max_new_tokens=20)
    with engine_progress(engine, Console(file=out), "Generating", work):
        engine.generated += 30
        engine.ended += 2
    assert out.getvalue().startswith("Generating: 2/2 rows, ")
    assert "tokens/s" in out.getvalue()
    assert "0 s left" in out.getvalue()


def test_a_log_gets_lines_while_the_batch_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.03)
    engine, out = CountingEngine(), io.StringIO()
    with engine_progress(engine, Console(file=out), "Generating", Work(2, 10, 20)):
        engine.generated += 5
        time.sleep(0.3)
    assert out.getvalue().count("Generating: 0/2 rows") >= 3


def test_a_session_s_pace_and_time_left_leave_out_what_was_stored_before(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, lines = [50.0], list[str]()
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    session = SessionLine(lines.append, rows=1000, earlier=9000)
    for at, rows in ((60.0, 50), (100.0, 50), (110.0, 100), (150.0, 300), (200.0, 500)):
        clock[0] = at
        session.stored(rows)
    assert lines == [  # none within 15 s of another, and none when all is done
        "All batches: 100/1000 rows (9000 stored before), 2.0 rows/s, 450 s left",
        "All batches: 500/1000 rows (9000 stored before), 5.0 rows/s, 100 s left",
    ]
    clock[0] = 0.0
    first = SessionLine(lines.append, rows=4, earlier=0)
    clock[0] = 20.0
    first.stored(1)
    assert lines[-1] == "All batches: 1/4 rows, 0.1 rows/s, 60 s left"
