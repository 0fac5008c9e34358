"""Pieces of work that take turns, and the time that one of them takes."""

from __future__ import annotations

from benchmarks.line_process import Turns, side_by_side
from benchmarks.working_time import WorkingTime


def test_work_goes_on_in_turn_from_pause_to_pause() -> None:
    done: list[str] = []

    def work(name: str, pauses: int) -> Turns[str]:
        for _ in range(pauses):
            done.append(name)
            yield
        done.append(name.upper())
        return name * 2

    answers = side_by_side({"a": work("a", 3), "b": work("b", 1), "c": work("c", 0)})
    assert "".join(done) == "abCaBaA"
    assert answers == {"a": "aa", "b": "bb", "c": "cc"}


def test_pauses_do_not_count() -> None:
    time = 10.0
    clock = WorkingTime(lambda: time)
    time = 12.0
    clock.stop()
    time = 20.0
    clock.go_on()
    time = 23.0
    clock.stop()
    assert [clock.at(moment) for moment in (9.0, 11.0, 12.0, 15.0, 20.0, 21.5, 23.0, 99.0)] == [
        0.0, 1.0, 2.0, 2.0, 2.0, 3.5, 5.0, 5.0
    ]  # fmt: skip
