"""A request's slots are in use from admission until the engine is past it, whatever becomes of the request."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest

from vllm_steer.engine.front import slots_in_flight
from vllm_steer.engine.front.slot_use_files import SlotUse
from vllm_steer.engine.front.slots_in_flight import InFlight


class StandInEngine:
    """An engine that is past its requests only when the test says so."""

    def __init__(self) -> None:
        self.asked = 0
        self.may_answer = asyncio.Event()

    async def is_past(self) -> None:
        self.asked += 1
        await self.may_answer.wait()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots_in_flight, "DRAIN_SECONDS", 0.0)


def run(folder: Path, scenario: Callable[[InFlight, StandInEngine, list[int]], Awaitable[None]]) -> None:
    async def main() -> None:
        engine, released = StandInEngine(), []

        def release(slots: Sequence[int]) -> None:
            released.extend(slots)

        use = SlotUse(folder, 8)
        try:
            await scenario(InFlight(use, engine.is_past, release), engine, released)
        finally:
            use.close()

    asyncio.run(main())


async def settle() -> None:
    """Let every task run until it waits for the engine."""
    for _ in range(10):
        await asyncio.sleep(0)


def test_slots_stay_in_use_until_the_engine_is_past_the_request(tmp_path: Path) -> None:
    async def scenario(requests: InFlight, engine: StandInEngine, released: list[int]) -> None:
        with requests.hold("id"):
            requests.acquire("id", [1, 2])
            assert requests.use.busy() == {1, 2}
        await settle()
        assert requests.use.busy() == {1, 2}, "the engine may still run it"
        engine.may_answer.set()
        await settle()
        assert requests.use.busy() == set()
        assert sorted(released) == [1, 2]

    run(tmp_path, scenario)


def test_requests_that_end_together_cost_the_engine_one_question(tmp_path: Path) -> None:
    async def scenario(requests: InFlight, engine: StandInEngine, released: list[int]) -> None:
        for index in range(50):
            with requests.hold(f"id-{index}"):
                requests.acquire(f"id-{index}", [index % 8])
        engine.may_answer.set()
        await settle()
        assert engine.asked == 1
        assert requests.use.busy() == set()

    run(tmp_path, scenario)


def test_a_request_that_ends_while_the_engine_is_asked_waits_for_the_next_question(tmp_path: Path) -> None:
    async def scenario(requests: InFlight, engine: StandInEngine, released: list[int]) -> None:
        with requests.hold("early"):
            requests.acquire("early", [1])
        await settle()
        assert engine.asked == 1
        with requests.hold("late"):  # its abort goes out after the question
            requests.acquire("late", [2])
        await settle()
        engine.may_answer.set()
        await settle()
        assert engine.asked == 2
        assert requests.use.busy() == set()

    run(tmp_path, scenario)


def test_two_requests_of_one_id_each_hold_their_own_slots(tmp_path: Path) -> None:
    async def scenario(requests: InFlight, engine: StandInEngine, released: list[int]) -> None:
        engine.may_answer.set()
        with requests.hold("same"):
            requests.acquire("same", [1])
            with requests.hold("same"):
                requests.acquire("same", [2])
            await settle()
            assert requests.use.busy() == {1}
            with pytest.raises(ValueError, match="refused"), requests.hold("same"):
                raise ValueError("refused at admission")
            await settle()
            assert requests.use.busy() == {1}, "a refused request gave up the slots of another"
        await settle()
        assert requests.use.busy() == set()

    run(tmp_path, scenario)


def test_what_is_withdrawn_before_it_was_sent_is_free_at_once(tmp_path: Path) -> None:
    async def scenario(requests: InFlight, engine: StandInEngine, released: list[int]) -> None:
        engine.may_answer.set()
        with requests.hold("id"):
            requests.acquire("id", [1])
            requests.withdraw("id", [1])
            assert requests.use.busy() == set()
            requests.acquire("id", [2])
            assert requests.use.busy() == {2}
        await settle()
        assert requests.use.busy() == set()

    run(tmp_path, scenario)


def test_a_request_that_nothing_holds_keeps_its_slots(tmp_path: Path) -> None:
    async def scenario(requests: InFlight, engine: StandInEngine, released: list[int]) -> None:
        requests.acquire("id", [4])
        await settle()
        assert requests.use.busy() == {4}

    run(tmp_path, scenario)
