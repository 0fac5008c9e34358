"""Conditions over the prompt: sums over its parts, in time for the tokens that they gate, and kept over preemptions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from vllm_steer.device.buffers import SteerBuffers
from vllm_steer.errors import UnsupportedFeature
from vllm_steer.plan.batch_plan import BatchPlanner, RequestPlan
from vllm_steer.plan.entry_rows import ABOVE, BELOW, PROBE, PROMPT, Entry
from vllm_steer.plan.step_plan import StepPlan

LAYERS, REQUESTS, SIZE, PROMPT_LEN = 2, 2, 4, 5
STEP = 5.0  # what a gated entry adds along the first axis
ROWS = np.random.default_rng(3).standard_normal((64, SIZE)).astype(np.float32)  # streams by (request, position)


def row(request_id: str, position: int) -> np.ndarray:
    """The stream of a token; its second element is what the probes see."""
    return ROWS[("abcd".index(request_id) * 16 + position) % 64]


def total(request_id: str) -> float:
    """The sum over the request's prompt."""
    return float(sum(row(request_id, position)[1].astype(np.float64) for position in range(PROMPT_LEN)))


def gated(first: int, bound: float, mode: int = ABOVE, layer: int = 1) -> RequestPlan:
    """An entry at ``layer`` on the tokens from ``first`` on, if the sum at layer 0 is beyond ``bound``."""
    probe = Entry(0, 1, 0.0, 0.0, PROBE, gate=2)
    entry = Entry(layer, 0, STEP, 0.0, PROMPT | mode, gate=2, threshold=bound)
    behind = (probe, entry) if first < PROMPT_LEN else (entry,)
    return RequestPlan(((0, (probe,)), (first, behind)), summed_prompt=PROMPT_LEN)


class Worker:
    """Planner, buffers and hook points, without an engine."""

    def __init__(self) -> None:
        self.planner = BatchPlanner(LAYERS, REQUESTS, max_entries=2, trace_columns=0)
        self.buffers = SteerBuffers(
            num_layers=LAYERS,
            hidden_size=SIZE,
            max_tokens=16,
            max_requests=REQUESTS,
            max_entries=2,
            max_directions=2,
            trace_columns=0,
            device=torch.device("cpu"),
        )
        self.buffers.bank_SD[:] = torch.eye(SIZE)[:2]
        self.plans: list[StepPlan] = []

    def step(self, *batch: tuple[str, int, int]) -> list[list[int]]:
        """A step of (request, computed, scheduled); the positions of each request on which its entry has acted."""
        ids, computed, scheduled = (list(values) for values in zip(*batch, strict=True))
        plan = self.planner.build(ids, computed, scheduled)
        assert plan is not None
        self.plans.append(plan)
        self.buffers.write(plan)
        places = [(one, first + i) for one, first, count in batch for i in range(count)]
        before = np.stack([row(*place) for place in places])
        stream = torch.from_numpy(before.copy())
        for layer in range(LAYERS):
            self.buffers.layer(layer)(stream, None)
        moved = (stream.numpy() - before)[:, 0]
        assert ((abs(moved) < 1e-5) | (abs(moved - STEP) < 1e-5)).all()  # float32 rounding of numbers around 1
        return [
            [position for (one, position), by in zip(places, moved, strict=True) if one == request and by > 1]
            for request, _, _ in batch
        ]


CHUNKS = [[5], [2, 3], [4, 1], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
@pytest.mark.parametrize(("first", "layer"), [(4, 1), (5, 1), (5, 0), (7, 0)])
@pytest.mark.parametrize(("mode", "off", "holds"), [(ABOVE, -1e-3, 1), (ABOVE, 1e-3, 0), (BELOW, 1e-3, 1)])
def test_the_whole_prompt_decides_for_the_tokens_behind_it_in_the_same_pass(
    chunks: Sequence[int], first: int, layer: int, mode: int, off: float, holds: int
) -> None:
    worker = Worker()
    worker.planner.add("a", gated(first, total("a") + off, mode, layer))
    held, computed = [], 0
    for count in [*chunks, 1, 1, 1, 1]:
        held += worker.step(("a", computed, count))[0]
        computed += count
    assert held == (list(range(first, PROMPT_LEN + 4)) if holds else [])


def test_each_request_of_a_step_has_its_own_sum_and_a_later_one_in_its_place_begins_with_nothing() -> None:
    worker = Worker()
    for request, off in (("a", -1e-3), ("b", 1e-3), ("c", -1e-3)):
        worker.planner.add(request, gated(4, total(request) + off))
    assert worker.step(("b", 0, 3), ("a", 0, 5)) == [[], [4]]
    assert worker.step(("a", 5, 1), ("b", 3, 2)) == [[5], []]
    worker.planner.remove("a")
    assert worker.step(("c", 0, 5), ("b", 5, 1)) == [[4], []]
    assert worker.step(("b", 6, 1), ("c", 5, 1)) == [[], [5]]


@pytest.mark.parametrize("layer", [0, 1])
def test_a_request_that_comes_back_knows_its_prompt_before_it_computes_it_again(layer: int) -> None:
    """Prompt and generated tokens come in one pass, at whose first layer nothing of the prompt is known again yet."""
    worker = Worker()
    worker.planner.add("a", gated(5, total("a") - 1e-3, layer=layer))
    worker.step(("a", 0, 5))
    assert worker.step(("a", 5, 1)) == [[5]]
    worker.planner.preempt("a")
    assert worker.step(("a", 0, 8)) == [[5, 6, 7]]
    assert worker.step(("a", 8, 1)) == [[8]]
    assert not worker.plans[2].prompt_parts, "it was summed twice"


def test_a_prompt_that_was_preempted_half_way_is_summed_from_its_beginning() -> None:
    worker = Worker()
    worker.planner.add("a", gated(4, total("a") - 1e-3))
    worker.step(("a", 0, 3))
    worker.planner.preempt("a")
    assert worker.step(("a", 0, 2)) == [[]]
    assert worker.step(("a", 2, 3)) == [[4]]
    assert worker.step(("a", 5, 1)) == [[5]]


def test_sums_of_preempted_requests_make_way_and_come_back() -> None:
    """There are places for two, and three have sums to keep."""
    worker = Worker()
    for request, off in (("a", -1e-3), ("b", 1e-3), ("c", -1e-3)):
        worker.planner.add(request, gated(5, total(request) + off, layer=0))
    worker.step(("a", 0, 5), ("b", 0, 5))
    worker.step(("a", 5, 1), ("b", 5, 1))
    worker.planner.preempt("a")
    worker.step(("b", 6, 1), ("c", 0, 5))
    assert [request for request, _ in worker.plans[-1].parked] == ["a"]
    worker.planner.preempt("b")
    assert worker.step(("c", 5, 1), ("a", 0, 7)) == [[5], [5, 6]]
    assert [request for request, _ in worker.plans[-1].returned] == ["a"]
    assert [request for request, _ in worker.plans[-1].parked] == ["b"]
    worker.planner.remove("c")
    assert worker.step(("a", 7, 1), ("b", 0, 8)) == [[7], []]
    worker.planner.preempt("a")
    worker.planner.add("d", gated(5, total("d") + 1e-3, BELOW, layer=0))
    worker.step(("b", 8, 1), ("d", 0, 5))
    assert [request for request, _ in worker.plans[-1].parked] == ["a"]
    worker.planner.remove("a")
    worker.buffers.forget("a")
    assert worker.step(("b", 9, 1), ("d", 5, 1)) == [[], [5]]
    assert not worker.buffers._parked


def test_steps_behind_the_prompt_share_a_plan_and_sum_nothing() -> None:
    worker = Worker()
    worker.planner.add("a", gated(4, total("a") - 1e-3))
    for computed in range(PROMPT_LEN + 3):
        worker.step(("a", computed, 1))
    first, *rest = worker.plans[PROMPT_LEN + 1 :]
    assert all(plan is first for plan in rest)
    assert not first.prompt_parts
    assert [len(plan.prompt_parts) for plan in worker.plans] == [1] * PROMPT_LEN + [0] * 3


@pytest.mark.parametrize(("computed", "scheduled"), [(2, 3), (4, 1), (0, 6)])
def test_an_engine_that_leaves_out_prompt_tokens_or_runs_ahead_of_them_is_stopped(
    computed: int, scheduled: int
) -> None:
    worker = Worker()
    worker.planner.add("a", gated(4, 0.0))
    if computed == 4:
        worker.step(("a", 0, 2))
    with pytest.raises(UnsupportedFeature, match=f"tokens {computed} to {computed + scheduled - 1} of request 'a'"):
        worker.step(("a", computed, scheduled))
