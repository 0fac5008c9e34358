"""Pieces of work that take turns, and the time that one of them takes."""

from __future__ import annotations

from benchmarks.harness.engine_process import Took, Work
from benchmarks.harness.line_process import Turns, side_by_side
from benchmarks.harness.working_time import WorkingTime
from benchmarks.overhead.bench import Pair, Task, throughput, typical


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
        0.0,
        1.0,
        2.0,
        2.0,
        2.0,
        3.5,
        5.0,
        5.0,
    ]
    assert clock.laps == [2.0, 3.0]


def test_a_burst_in_one_step_does_not_count() -> None:
    def took(*laps: float) -> Took:
        return Took(list(laps), first_token=0.1, inter_token=0.1, tokens="", memory_gib={})

    quiet, first_hit, last_hit = took(1.0, 2.0, 3.0), took(9.0, 2.0, 3.5), took(1.0, 2.5, 7.0)
    rounds = [{"idle": Pair(way=way, plain=quiet)} for way in (first_hit, last_hit, quiet)]
    pair = typical(rounds)["idle"]
    assert (pair.way.laps, pair.way.seconds) == ([1.0, 2.0, 3.5], 6.5)
    assert pair.plain.seconds == 6.0
    task = Task("generated", Work("", 2, 4, 3), rounds=3)
    assert throughput([rounds, rounds], task)["idle"]["ratios"] == [6.0 / 6.5] * 2
    assert throughput([rounds], task)["idle"]["ratio"] == 6.0 / 10.5, "of a single start the median of whole calls"
