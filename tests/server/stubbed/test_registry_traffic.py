"""Registering, replacing, deleting and serving in any order: a slot that a request uses is never rewritten."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from tests.support.server.registry_stand_ins import (
    CAPACITY,
    SERVER,
    SIZE,
    StandInWorkers,
    admission_on,
    anything,
    direction,
)
from vllm_steer.engine.front import slots_in_flight
from vllm_steer.errors import BankFull
from vllm_steer.schema.request_spec import RequestSpec
from vllm_steer.schema.steering import Steering
from vllm_steer.server.registry.registry_folder import RegistryDirectory
from vllm_steer.server.registry.shared_registry import SharedRegistry

names = st.sampled_from(["a", "b", "c"])
processes = st.integers(0, 1)


class Traffic(RuleBasedStateMachine):
    """Two processes that register, replace and remove while requests come and go, against a model in plain dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = TemporaryDirectory()
        self.runner = asyncio.Runner()
        self.workers = StandInWorkers()
        self.value = 0.0
        self.model: dict[str, float] = {}
        self.requests: dict[str, tuple[Any, int, float]] = {}
        self.registries: list[SharedRegistry] = []
        for _ in range(2):
            registry = SharedRegistry(
                RegistryDirectory(Path(self.folder.name)), SERVER, CAPACITY, SIZE, self.workers.write
            )
            self.registries.append(registry)
            self.run(registry.start(()))
        self.admissions = [admission_on(registry) for registry in self.registries]

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(work)

    def occupied(self) -> set[int]:
        """Every slot that must not be rewritten: one with a name, or one that a request uses."""
        slots = {self.registries[0].find(name, None, range(99)).slot for name in self.model}
        return slots | {slot for _, slot, _ in self.requests.values()}

    @rule(name=names, process=processes)
    def register_or_replace(self, name: str, process: int) -> None:
        self.value += 1.0
        has_room = len(self.occupied()) < CAPACITY
        try:
            self.run(self.registries[process].put([direction(name, self.value)], anything))
        except BankFull:
            assert not has_room
        else:
            assert has_room
            self.model[name] = self.value

    @precondition(lambda self: self.model)
    @rule(data=st.data(), process=processes)
    def delete(self, data: Any, process: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.model)))
        self.run(self.registries[process].remove(name, None, anything))
        del self.model[name]

    @precondition(lambda self: self.model)
    @rule(data=st.data(), process=processes)
    def begin_request(self, data: Any, process: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.model)))
        admission, request_id = self.admissions[process], f"request-{len(self.requests)}-{self.value}"
        if request_id in self.requests:
            return
        assert admission.in_flight is not None
        hold = admission.in_flight.hold(request_id)
        hold.__enter__()
        resolved = admission.admit(request_id, RequestSpec((Steering(name, 1.0),)), 5)
        ((_, slot, *_),) = resolved.windows[0].entries
        self.requests[request_id] = (hold, slot, self.model[name])

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def end_request(self, data: Any) -> None:
        hold, _, _ = self.requests.pop(data.draw(st.sampled_from(sorted(self.requests))))

        async def leave() -> None:
            hold.__exit__(None, None, None)
            await asyncio.sleep(0.001)  # let the engine answer

        self.run(leave())

    @invariant()
    def every_request_still_reads_what_it_was_admitted_with(self) -> None:
        for _, slot, value in self.requests.values():
            assert self.workers.bank[slot] == value

    @invariant()
    def every_process_knows_every_direction_and_its_slot(self) -> None:
        for registry in self.registries:
            found = {one.name: self.workers.bank[one.slot] for one in registry.all()}
            assert found == self.model

    @invariant()
    def the_bank_is_told_as_it_is(self) -> None:
        occupied = len(self.occupied())
        shown = (len(self.model), occupied - len(self.model), CAPACITY - occupied)
        assert [registry.show_bank() for registry in self.registries] == [shown, shown]

    def teardown(self) -> None:
        async def leave_all() -> None:
            for hold, _, _ in self.requests.values():
                hold.__exit__(None, None, None)

        self.run(leave_all())
        for registry in self.registries:
            registry.close()
        self.runner.close()
        self.folder.cleanup()


def test_a_slot_in_use_is_never_rewritten_whatever_the_traffic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots_in_flight, "DRAIN_SECONDS", 0.0)
    run_state_machine_as_test(Traffic, settings=hypothesis_settings(max_examples=25, stateful_step_count=30))
