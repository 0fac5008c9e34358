"""The hook point and its buffers: inside compiled code, between steps, and in passes without a request."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tests.support.plans import in_halves
from vllm_steer.device.buffers import SteerBuffers
from vllm_steer.plan.batch_plan import BatchPlanner, Entry, Pooling

DIMENSION, SLOTS, REQUESTS = 24, 5, 4


class Block(nn.Module):
    """A small decoder layer: a matrix, the hook, and a part after it that reads the steered stream."""

    def __init__(self, hook: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(DIMENSION, DIMENSION)
        self.outer = nn.Linear(DIMENSION, DIMENSION)
        self.hook = hook

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        hidden = self.inner(x)
        self.hook(hidden, residual)
        return self.outer(hidden + residual)


def make_buffers() -> SteerBuffers:
    buffers = SteerBuffers(
        num_layers=2,
        hidden_size=DIMENSION,
        max_tokens=16,
        max_requests=REQUESTS,
        max_entries=2,
        max_directions=SLOTS,
        trace_columns=2,
        device=torch.device("cpu"),
        has_rows=True,
    )
    rng = np.random.default_rng(0)
    buffers.write_directions(range(SLOTS), rng.standard_normal((SLOTS, DIMENSION)).astype(np.float32))
    return buffers


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_code_keeps_the_hook_and_sees_tables_written_later(backend: str) -> None:
    torch._dynamo.reset()
    buffers = make_buffers()
    plain, steered = Block(nn.Identity()), Block(buffers.layer(1))
    plain.hook.forward = lambda *_: None  # type: ignore[method-assign]
    compiled = torch.compile(steered, fullgraph=True, backend=backend)
    x, residual = torch.randn(6, DIMENSION), torch.randn(6, DIMENSION)
    planner = BatchPlanner(num_layers=2, max_requests=REQUESTS, max_entries=2, trace_columns=2)

    def step(num_computed: int) -> tuple[torch.Tensor, torch.Tensor]:
        plan = planner.build(["a"], [num_computed], [6])
        assert plan is not None
        buffers.write(plan)
        buffers.trace_TK.zero_()
        sums = buffers.sums_L_AD[1].clone()
        eager = steered(x, residual)
        eager_sums = buffers.sums_L_AD[1].clone()
        buffers.sums_L_AD[1].copy_(sums)
        eager_trace = buffers.trace_TK.clone()
        buffers.trace_TK.zero_()
        result = compiled(x, residual)
        # The compiled graph runs the same op on the same float32 numbers; only matrix products may be summed otherwise.
        torch.testing.assert_close(result, eager, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(buffers.sums_L_AD[1], eager_sums, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(buffers.trace_TK, eager_trace, rtol=1e-5, atol=1e-5)
        return result, eager_sums

    with torch.no_grad():
        untouched = plain(x, residual)
        buffers.rows_L_TD[1].zero_()
        torch.testing.assert_close(compiled(x, residual), untouched, rtol=1e-5, atol=1e-5)  # compiled while silent

        pooling = Pooling((1,), 0, 6, trace=((1, 3), (1, 0)))
        planner.add("a", in_halves(6, prompt=(Entry(1, 2, 4.0, 0.0),), pooling=pooling))
        first, sums = step(0)
        assert buffers.trace_TK[:6].all(), "the trace was not written"
        assert (first - untouched).abs().max() > 0.1, "the hook was removed, or its tables were frozen at compilation"
        assert sums.any(), "the sums were not written"

        planner.remove("a")
        planner.add("a", in_halves(6, prompt=(Entry(1, 3, -4.0, 0.0),)))
        second, _ = step(0)
        assert (second - first).abs().max() > 0.1, "tables of the step before were used"

        assert not buffers.rows_L_TD[1].any(), "rows were stored that nobody asked for"
        planner.remove("a")
        planner.add("a", in_halves(6, pooling=Pooling((1,), 0, 6, stores_rows=True)))
        step(0)
        stored = buffers.rows_L_TD[1].clone()
        buffers.rows_L_TD[1].zero_()
        steered(x, residual)
        torch.testing.assert_close(buffers.rows_L_TD[1], stored, rtol=1e-5, atol=1e-5)
        assert stored[:6].all(), "the rows were not stored"
        assert not stored[6:].any()

        planner.remove("a")
        silent = planner.build(["a"], [0], [6])
        assert silent is not None
        buffers.write(silent)
        torch.testing.assert_close(compiled(x, residual), untouched, rtol=1e-5, atol=1e-5)


def test_a_shorter_step_leaves_no_row_behind_for_padding_tokens() -> None:
    buffers = make_buffers()
    planner = BatchPlanner(num_layers=2, max_requests=REQUESTS, max_entries=2, trace_columns=2)
    planner.add("a", in_halves(6, prompt=(Entry(0, 0, 1.0, 0.0),), pooling=Pooling((0,), 0, None)))
    for computed, scheduled in ((0, 6), (6, 1)):
        plan = planner.build(["a"], [computed], [scheduled])
        assert plan is not None
        buffers.write(plan)
    assert buffers.row_of_token[1:].eq(-1).all()
    assert buffers.segment_A2.sum(dim=0).tolist() == [0, 1]


def test_silence_marks_every_token_untouched() -> None:
    buffers = make_buffers()
    planner = BatchPlanner(num_layers=2, max_requests=REQUESTS, max_entries=2, trace_columns=2)
    planner.add("a", in_halves(6, prompt=(Entry(0, 0, 1.0, 0.0),), pooling=Pooling((0,), 0, None)))
    plan = planner.build(["a"], [0], [6])
    assert plan is not None
    buffers.write(plan)
    buffers.silence()
    hidden = torch.randn(16, DIMENSION)
    before, sums = hidden.clone(), buffers.sums_L_AD[0].clone()
    buffers.layer(0)(hidden, None)
    assert torch.equal(hidden, before)
    assert torch.equal(buffers.sums_L_AD[0], sums)
