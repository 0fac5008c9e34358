from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from batch_jobs.endpoint.parallel_calls import parallel_calls


def test_every_item_comes_back_with_its_own_result() -> None:
    assert dict(parallel_calls(lambda number: number**2, range(50), workers=4)) == {n: n**2 for n in range(50)}


def test_no_more_calls_run_at_a_time_than_workers_and_items_are_taken_as_needed() -> None:
    running: list[int] = []
    most = 0
    taken = 0
    lock = threading.Lock()

    def call(number: int) -> None:
        nonlocal most
        with lock:
            running.append(number)
            most = max(most, len(running))
        time.sleep(0.002)
        with lock:
            running.remove(number)

    def items() -> Iterator[int]:
        nonlocal taken
        while taken < 40:
            taken += 1
            yield taken

    for done, _ in enumerate(parallel_calls(call, items(), workers=3)):
        assert taken <= done + 3
    assert taken == 40
    assert 2 <= most <= 3


def test_what_was_under_way_is_handed_out_before_a_failure_is_raised() -> None:
    both_begun = threading.Barrier(2)
    begun: list[str] = []

    def call(name: str) -> str:
        begun.append(name)
        both_begun.wait(timeout=10)
        if name == "bad":
            raise ValueError("broken")
        time.sleep(0.05)
        return name.upper()

    results = parallel_calls(call, ["bad", "slow", "never"], workers=2)
    assert next(results) == ("slow", "SLOW")
    with pytest.raises(ValueError, match="broken"):
        next(results)
    assert "never" not in begun
