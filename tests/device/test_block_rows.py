"""Sums of KV blocks in the rows behind the accumulators: written by segments, loaded into accumulators."""

from __future__ import annotations

import numpy as np
import torch

from vllm_steer.device.buffers import SteerBuffers
from vllm_steer.plan.batch_plan import BatchPlanner, Pooling, RequestPlan
from vllm_steer.plan.block_sums import StepBlocks
from vllm_steer.plan.step_plan import READ

REQUESTS, SIZE, LAYERS = 2, 4, 2
STREAM_TD = torch.from_numpy(np.random.default_rng(0).standard_normal((12, SIZE)).astype(np.float32))


def make(pooling: Pooling) -> tuple[BatchPlanner, SteerBuffers]:
    planner = BatchPlanner(LAYERS, REQUESTS, max_entries=1, trace_columns=0)
    planner.add("r", RequestPlan(pooling=pooling))
    buffers = SteerBuffers(
        num_layers=LAYERS,
        hidden_size=SIZE,
        max_tokens=16,
        max_requests=REQUESTS,
        max_entries=1,
        max_directions=1,
        trace_columns=0,
        device=torch.device("cpu"),
        num_blocks=5,
    )
    return planner, buffers


def step(planner: BatchPlanner, buffers: SteerBuffers, computed: int, count: int, blocks: StepBlocks | None) -> None:
    plan = planner.build(["r"], [computed], [count], blocks=blocks)
    buffers.write(plan)
    for layer in range(LAYERS):
        buffers.layer(layer)((layer + 1) * STREAM_TD[computed : computed + count], None)


def test_blocks_are_written_and_loaded_at_the_layers_that_are_read() -> None:
    planner, buffers = make(Pooling((1,), first=1, end=None))
    before = buffers.sums_L_AD[0].clone().nan_to_num()
    step(planner, buffers, 0, 9, StepBlocks(parts={"r": ((1, 4, 3), (4, 8, 0))}))
    assert buffers.flags_L4[:, READ].tolist() == [0, REQUESTS + 2]
    assert torch.equal(buffers.sums_L_AD[0].nan_to_num(), before)
    for slot, first, end in ((3, 1, 4), (0, 4, 8)):
        torch.testing.assert_close(buffers.sums_L_AD[1][REQUESTS + slot], 2 * STREAM_TD[first:end].sum(dim=0))
        torch.testing.assert_close(buffers.last_L_AD[1][REQUESTS + slot], 2 * STREAM_TD[end - 1])
    step(planner, buffers, 9, 1, None)
    assert buffers.segment_A2[REQUESTS:].eq(0).all(), "segments of an older step"
    assert buffers.keep_A.eq(1).all()
    # It comes back with its first two blocks.
    planner.preempt("r")
    step(planner, buffers, 8, 2, StepBlocks(loads={"r": (3, 0)}))
    state = planner.poolings["r"]
    assert (state.num_tokens, state.next_position, state.failure) == (9, 10, None)
    torch.testing.assert_close(buffers.sums_L_AD[1][state.accumulator], 2 * STREAM_TD[1:10].sum(dim=0))
    torch.testing.assert_close(buffers.last_L_AD[1][state.accumulator], 2 * STREAM_TD[9])
    # The next step has the same requests, and loads nothing.
    step(planner, buffers, 10, 1, None)
    torch.testing.assert_close(buffers.sums_L_AD[1][state.accumulator], 2 * STREAM_TD[1:11].sum(dim=0))
    step(planner, buffers, 11, 1, None)
    torch.testing.assert_close(buffers.sums_L_AD[1][state.accumulator], 2 * STREAM_TD[1:12].sum(dim=0))


def test_a_span_that_ends_in_the_cache_is_all_loaded() -> None:
    planner, buffers = make(Pooling((0, 1), first=0, end=6))
    step(planner, buffers, 0, 9, StepBlocks(parts={"r": ((0, 4, 1), (4, 6, 2))}))
    planner.preempt("r")
    for rows in (buffers.sums_L_AD, buffers.last_L_AD):
        for rows_AD in rows:
            rows_AD[:REQUESTS] = torch.nan
    step(planner, buffers, 8, 1, StepBlocks(loads={"r": (1, 2)}))
    state = planner.poolings["r"]
    assert (state.num_tokens, state.next_position) == (6, 9)
    for layer in range(LAYERS):
        sums, last = buffers.sums_L_AD[layer][state.accumulator], buffers.last_L_AD[layer][state.accumulator]
        torch.testing.assert_close(sums, (layer + 1) * STREAM_TD[:6].sum(dim=0))
        torch.testing.assert_close(last, (layer + 1) * STREAM_TD[5])
