"""How a step's tables reach a device: no copy of what it already has, else one copy, from free host memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import numpy as np
import pytest
import torch

from tests.support.plans import in_halves
from vllm_steer.device import buffers as buffers_module
from vllm_steer.device.buffers import SteerBuffers
from vllm_steer.device.staging import RING_LENGTH, StagingRing
from vllm_steer.plan.batch_plan import BatchPlanner, Pooling
from vllm_steer.plan.entry_rows import Entry
from vllm_steer.plan.step_plan import VERSION

LAYERS, REQUESTS, ENTRIES = 2, 3, 2
BOTH = (Entry(0, 1, 2.0, 0.0), Entry(1, 0, 1.0, -1.0))


class FakeEvent:
    """A copy that is under way from ``record`` until the test ends it."""

    waited_for: ClassVar[list[FakeEvent]] = []

    def __init__(self) -> None:
        self.is_under_way = False

    def record(self) -> None:
        assert not self.is_under_way, "a buffer was written while it was still being copied"
        self.is_under_way = True

    def synchronize(self) -> None:
        if self.is_under_way:
            FakeEvent.waited_for.append(self)
        self.is_under_way = False


class CountingRing(StagingRing):
    """The real ring, with host memory in place of the device's."""

    sizes: ClassVar[list[int]] = []

    def send(self, values: np.ndarray, target: torch.Tensor) -> None:
        self.sizes.append(len(values))
        super().send(values, target)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of elements of each copy made so far."""
    sizes: list[int] = []
    monkeypatch.setattr(CountingRing, "sizes", sizes)
    monkeypatch.setattr(
        buffers_module, "ring_for", lambda device, size: CountingRing(size, FakeEvent, pin_memory=False)
    )
    monkeypatch.setattr(FakeEvent, "waited_for", [])
    return sizes


def make_buffers(max_drafts: int = 0) -> SteerBuffers:
    buffers = SteerBuffers(
        num_layers=LAYERS,
        hidden_size=4,
        max_tokens=16,
        max_requests=REQUESTS,
        max_entries=ENTRIES,
        max_directions=2,
        trace_columns=2,
        device=torch.device("cpu"),
        max_drafts=max_drafts,
    )
    buffers._image = buffers._image.copy()  # separate memory for the device, so data arrive only by a copy
    return buffers


def make_planner(*names: str) -> BatchPlanner:
    planner = BatchPlanner(LAYERS, REQUESTS, ENTRIES, trace_columns=2)
    for name in names:
        planner.add(name, in_halves(4, BOTH, BOTH, Pooling((0,), 0, None, trace=((0, 1),))))
    return planner


@pytest.fixture
def step() -> Callable[..., None]:
    def take(planner: BatchPlanner, buffers: SteerBuffers, *parts: tuple[str, int, int]) -> None:
        plan = planner.build(*([part[i] for part in parts] for i in range(3)))
        assert plan is not None
        buffers.write(plan)

    return take


def test_a_steady_decode_copies_nothing(copies: list[int], step: Callable[..., None]) -> None:
    planner, buffers = make_planner("a", "b"), make_buffers()
    step(planner, buffers, ("a", 0, 4), ("b", 0, 4))
    assert len(copies) == 1, "one copy brings all tables of a step"
    for position in range(4, 9):
        step(planner, buffers, ("a", position, 1), ("b", position, 1))
    assert len(copies) == 2, "the first decode step has other tables than the prompt, and the others have the same"
    step(planner, buffers, ("b", 9, 1), ("a", 9, 1))
    assert len(copies) == 3
    assert copies[2] < copies[0], "entries that had not changed were copied"


def test_the_device_gets_what_the_plan_says(copies: list[int], step: Callable[..., None]) -> None:
    planner, buffers = make_planner("a"), make_buffers()
    step(planner, buffers, ("plain", 0, 2), ("a", 0, 6))
    row = int(buffers.row_of_token[2])
    assert buffers.row_of_token.tolist() == [-1] * 2 + [row] * 4 + [row + 1] * 2 + [-1] * 8
    assert buffers.segment_A2[0].tolist() == [2, 6]
    assert buffers.keep_A.tolist() == [0, 1, 1]
    assert buffers.flags_L4[:, :VERSION].tolist() == [[1, 3, 1], [1, 0, 0]]
    assert buffers.trace_slot_LK.tolist() == [[1, -1], [-1, -1]]
    assert buffers.entry_slot_LRE[:, row].tolist() == [[1, -1], [0, -1]]
    assert buffers.entry_ab_LRE2[:, row, 0].tolist() == [[2.0, 0.0], [1.0, -1.0]]


def test_the_version_of_the_tables_is_another_one_whenever_any_of_them_changes(
    copies: list[int], step: Callable[..., None]
) -> None:
    planner, buffers = make_planner("a", "b"), make_buffers()
    seen: list[int] = []

    def version() -> int:
        assert len(set(buffers.flags_L4[:, VERSION].tolist())) == 1, "all layers have one version"
        return int(buffers.flags_L4[0, VERSION])

    def is_new() -> bool:
        seen.append(version())
        return seen[-1] not in seen[:-1]

    assert version() == 0, "nothing has been written yet"
    step(planner, buffers, ("a", 0, 4))
    assert is_new()
    assert version() != 0
    step(planner, buffers, ("a", 4, 1))
    assert is_new(), "the prompt's rows, segment and reset are gone"
    for position in (5, 6):
        step(planner, buffers, ("a", position, 1))
        assert version() == seen[-1], "a steady decode"
    step(planner, buffers, ("a", 7, 1), ("b", 0, 4))
    assert is_new(), "entries came"
    buffers.silence()
    assert is_new()
    other = make_buffers()
    step(make_planner("a"), other, ("a", 0, 4))
    assert int(other.flags_L4[0, VERSION]) not in seen, "the version of another engine's tables"


def test_rows_of_a_larger_step_are_blanked_behind_a_smaller_one(copies: list[int], step: Callable[..., None]) -> None:
    planner, buffers = make_planner("a"), make_buffers()
    step(planner, buffers, ("a", 0, 6))
    step(planner, buffers, ("a", 6, 1))
    assert buffers.row_of_token[1:].eq(-1).all()
    assert len(copies) == 2


def test_silence_is_copied_once_and_the_step_behind_it_again(copies: list[int], step: Callable[..., None]) -> None:
    planner, buffers = make_planner("a"), make_buffers()
    for position in (4, 5):
        step(planner, buffers, ("a", position, 1))
    before = len(copies)
    buffers.silence()
    buffers.silence()
    assert len(copies) == before + 1
    assert buffers.row_of_token.eq(-1).all()
    assert not buffers.flags_L4[:, :VERSION].any()
    step(planner, buffers, ("a", 6, 1))
    assert len(copies) == before + 2
    assert buffers.row_of_token[0] >= 0


def test_a_buffer_is_waited_for_only_when_all_are_under_way() -> None:
    FakeEvent.waited_for = []
    ring, target = StagingRing(3, FakeEvent, pin_memory=False), torch.zeros(3, dtype=torch.int32)
    for number in range(RING_LENGTH):
        ring.send(np.full(2, number, np.int32), target)
    assert not FakeEvent.waited_for
    for number in range(3):
        ring.send(np.full(3, number, np.int32), target)
        assert FakeEvent.waited_for == ring._events[: number + 1]
        assert target.tolist() == [number] * 3
    ring._events[3].is_under_way = False  # that copy is over by now
    ring.send(np.zeros(1, np.int32), target)
    assert len(FakeEvent.waited_for) == 3
