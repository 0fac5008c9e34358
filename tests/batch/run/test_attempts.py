from __future__ import annotations

from pathlib import Path

from batch_jobs.run.attempts import AttemptLog


def test_beginnings_without_an_end_are_counted_across_processes(tmp_path: Path) -> None:
    assert [AttemptLog(tmp_path / "attempts").begin("a") for _ in range(3)] == [0, 1, 2]
    assert AttemptLog(tmp_path / "attempts").begin("b") == 0


def test_work_that_ended_leaves_nothing_behind(tmp_path: Path) -> None:
    log = AttemptLog(tmp_path / "attempts")
    log.begin("a")
    log.end("a")
    log.end("never begun")
    assert list((tmp_path / "attempts").iterdir()) == []
    assert log.begin("a") == 0
