"""Draft tokens of speculative decoding: summed separately, and added once the engine continues after them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.plans import in_halves
from vllm_steer.device.buffers import SteerBuffers
from vllm_steer.engine.resolved_spec import ResolvedReadout
from vllm_steer.engine.worker.readout_copies import ReadoutFlow, Summed
from vllm_steer.engine.worker.traces import Trace
from vllm_steer.plan.batch_plan import BatchPlanner, Pooling
from vllm_steer.plan.step_plan import READ, StepPlan

LAYERS, REQUESTS, SIZE, DRAFTS = 2, 2, 4, 3
PROMPT_LEN = 2
READ_ALL = in_halves(PROMPT_LEN, pooling=Pooling((0,), 0, None))
ROWS = np.random.default_rng(0).standard_normal((16, SIZE)).astype(np.float32)  # the stream by position
WRONG = 1e6  # what a draft token that is rejected has in its stream


def make_planner() -> BatchPlanner:
    planner = BatchPlanner(LAYERS, REQUESTS, max_entries=1, trace_columns=0, max_drafts=DRAFTS)
    planner.add("a", READ_ALL)
    return planner


def make_buffers(max_drafts: int = DRAFTS) -> SteerBuffers:
    return SteerBuffers(
        num_layers=LAYERS,
        hidden_size=SIZE,
        max_tokens=16,
        max_requests=REQUESTS,
        max_entries=1,
        max_directions=1,
        trace_columns=0,
        device=torch.device("cpu"),
        max_drafts=max_drafts,
    )


def build(planner: BatchPlanner, computed: int, scheduled: int, drafts: int = 0) -> StepPlan:
    plan = planner.build(["a"], [computed], [scheduled], {"a": [7] * drafts} if drafts else {})
    assert plan is not None
    return plan


def step(planner: BatchPlanner, buffers: SteerBuffers, computed: int, known: int, right: int, wrong: int) -> None:
    """A forward pass over known tokens, then draft tokens: first ``right`` right ones, then ``wrong`` wrong ones."""
    buffers.write(build(planner, computed, known + right + wrong, right + wrong))
    stream = np.concatenate([ROWS[computed : computed + known + right], np.full((wrong, SIZE), WRONG, np.float32)])
    buffers.layer(0)(torch.from_numpy(stream), None)


# The end of the computed tokens, after a step from token 6 with three drafts: two of them were right, and a stop can
# fall between them.
@pytest.mark.parametrize("computed_end", [7, 8, 9])
def test_only_accepted_drafts_are_in_the_mean_and_a_stop_among_them_cuts_it(computed_end: int) -> None:
    planner, buffers = make_planner(), make_buffers()
    step(planner, buffers, 0, known=2, right=0, wrong=0)
    step(planner, buffers, 2, known=1, right=2, wrong=1)
    step(planner, buffers, 5, known=1, right=0, wrong=3)
    step(planner, buffers, 6, known=1, right=2, wrong=1)
    spec = ResolvedReadout([5], [0], first=0, end=None, project=[], vectors=True, trace=[])
    answer = ReadoutFlow(buffers).take([Summed(spec, planner.poolings["a"], None)])[0].answer(computed_end)
    assert answer["num_tokens"] == computed_end
    # float32 sums of numbers around 1; one rejected row alone would err by 1e5
    expected = ROWS[:computed_end].astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(np.frombuffer(answer["pooled"], np.float32), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("computed_end", [5, 10])
def test_an_end_that_no_acceptance_explains_is_an_error(computed_end: int) -> None:
    planner, buffers = make_planner(), make_buffers()
    step(planner, buffers, 0, known=2, right=0, wrong=0)
    step(planner, buffers, 2, known=1, right=3, wrong=0)
    step(planner, buffers, 6, known=1, right=2, wrong=0)
    spec = ResolvedReadout([5], [0], first=0, end=None, project=[], vectors=True, trace=[])
    answer = ReadoutFlow(buffers).take([Summed(spec, planner.poolings["a"], None)])[0].answer(computed_end)
    assert f"up to token 7 but the sample ends at {computed_end}" in answer["error"]


@pytest.mark.parametrize("computed", [2, 6])
def test_a_step_that_no_acceptance_explains_fails_the_readout(computed: int) -> None:
    planner = make_planner()
    build(planner, 0, 2)
    build(planner, 2, 1 + 2, drafts=2)  # token 2 is known, so the next step goes on at 3, 4 or 5
    build(planner, computed, 1)
    assert f"token {computed} where token 3" in (planner.poolings["a"].failure or "")


def test_drafts_wait_for_a_request_that_is_left_out_of_the_next_steps() -> None:
    planner = make_planner()
    build(planner, 0, 2)
    state = planner.poolings["a"]
    filled = build(planner, 2, 1 + 2, drafts=2).segment_A2.tolist()
    first, second = filled.index([1, 1]), filled.index([2, 1])
    for plan in (planner.build(["plain"], [0], [4]), planner.build([], [], [])):
        assert plan is not None
        assert not plan.accepted
        assert plan.keep_A.all()
    assert build(planner, 5, 1).accepted == [(state.accumulator, first), (state.accumulator, second)]
    assert state.num_tokens == 6


def test_a_preempted_request_takes_no_draft_along() -> None:
    planner = make_planner()
    build(planner, 0, 2)
    build(planner, 2, 1 + 2, drafts=2)
    planner.preempt("a")
    plan = build(planner, 0, 5)
    assert not plan.accepted
    assert planner.poolings["a"].num_tokens == 5


def test_a_prompt_s_readout_takes_no_draft() -> None:
    planner = make_planner()
    planner.add("b", in_halves(PROMPT_LEN, pooling=Pooling((0,), 0, PROMPT_LEN)))
    planner.build(["b"], [0], [PROMPT_LEN + DRAFTS], {"b": [7] * DRAFTS})
    plan = planner.build(["b"], [PROMPT_LEN + 1], [1])
    assert plan is not None
    assert not plan.accepted
    assert not plan.flags_L3[:, READ].any()
    state = planner.poolings["b"]
    assert (state.failure, state.num_tokens) == (None, PROMPT_LEN)


def test_without_speculation_there_is_an_accumulator_a_request_and_no_more() -> None:
    assert make_buffers(max_drafts=0).sums_L_AD[0].shape == (REQUESTS, SIZE)


def test_the_value_of_a_draft_token_is_known_once_a_later_one_is() -> None:
    trace = Trace(1)
    trace.reserve(6)
    trace.write(0, np.array([[1, 2]], np.float32))
    trace.write(2, np.array([[3, 4, -1]], np.float32), num_drafts=2)
    assert trace.values(0).tolist() == [[1, 2, 3]]
    assert trace.values(0, 4).tolist() == [[1, 2, 3, 4]], "an end that the request itself has makes it known"
    trace.write(4, np.array([[5]], np.float32))
    assert trace.values(0).tolist() == [[1, 2, 3, 4, 5]]
