"""A step's rows on their way from the buffer to the traces of their requests."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from vllm_steer.engine.worker import traces
from vllm_steer.engine.worker.traces import Trace, TraceFlow, TraceRows


def step(flow: TraceFlow, buffer_TK: torch.Tensor, rows: list[TraceRows], seed: int) -> np.ndarray:
    """A forward pass that fills the whole buffer; returns what it wrote."""
    flow.fetch()
    flow.expect(rows)
    buffer_TK.copy_(torch.from_numpy(np.random.default_rng(seed).standard_normal(buffer_TK.shape)))
    return buffer_TK.numpy().copy()


def test_each_trace_gets_its_own_rows_and_columns_of_every_step() -> None:
    buffer_TK = torch.zeros(8, 3)
    flow = TraceFlow(buffer_TK)
    one, two = Trace(1), Trace(2)
    first = step(flow, buffer_TK, [TraceRows(one, (1,), 1, 2, 0), TraceRows(two, (2, 1), 4, 4, 0)], seed=0)
    second = step(flow, buffer_TK, [TraceRows(two, (2, 1), 0, 1, 4), TraceRows(one, (1,), 3, 1, 2)], seed=1)
    assert one.values(0).tolist() == [first[1:3, 1].tolist()], "rows of a step are there once the next one begins"
    step(flow, buffer_TK, [], seed=2)
    np.testing.assert_array_equal(one.values(0), [[*first[1:3, 1], second[3, 1]]])
    np.testing.assert_array_equal(two.values(0), np.concatenate([first[4:8, [2, 1]], second[:1, [2, 1]]]).T)


def test_a_fetch_brings_the_last_step_s_rows_once() -> None:
    buffer_TK = torch.zeros(4, 1)
    flow, trace = TraceFlow(buffer_TK), Trace(1)
    written = step(flow, buffer_TK, [TraceRows(trace, (0,), 0, 3, 0)], seed=0)
    assert trace.values(0).shape == (1, 0)
    flow.fetch()
    np.testing.assert_array_equal(trace.values(0), written[:3].T)
    buffer_TK.zero_()
    flow.fetch()
    np.testing.assert_array_equal(trace.values(0), written[:3].T)


def test_copies_that_are_under_way_are_sorted_in_once_they_have_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator: steps go on while copies of earlier rows are under way, and nothing waits for them."""
    arrivals: list[bool] = []

    def slow_copy(values_TK: torch.Tensor) -> tuple[torch.Tensor, Callable[[], bool]]:
        number = len(arrivals)
        arrivals.append(False)
        return values_TK.clone(), lambda: arrivals[number]

    monkeypatch.setattr(traces, "start_copy", slow_copy)
    buffer_TK = torch.zeros(4, 1)
    flow, trace = TraceFlow(buffer_TK), Trace(1)
    written = [step(flow, buffer_TK, [TraceRows(trace, (0,), 1, 1, start)], seed=start) for start in range(3)]
    flow.fetch()
    assert trace.values(0).shape == (1, 0)
    arrivals[0] = True
    flow.fetch()
    assert trace.values(0).tolist() == [[written[0][1, 0]]]
    arrivals[1:] = [True, True]
    flow.fetch()
    assert trace.values(0).tolist() == [[after[1, 0] for after in written]]
    assert len(arrivals) == 3, "rows were fetched twice"


def test_tokens_computed_again_after_a_preemption_hide_nothing_that_was_known() -> None:
    trace = Trace(1)
    trace.reserve(4)
    trace.write(0, np.array([[1, 2, 3, 4]], np.float32))
    trace.write(0, np.array([[1, 2]], np.float32))
    assert trace.values(1).tolist() == [[2, 3, 4]]
    assert trace.values(0, 3).tolist() == [[1, 2, 3]]
    assert trace.values(4).shape == (1, 0)


def test_a_long_trace_keeps_every_value_while_it_grows() -> None:
    trace = Trace(2)
    expected = np.random.default_rng(0).standard_normal((2, 1000)).astype(np.float32)
    for start in range(1000):
        trace.reserve(start + 1)
        trace.write(start, expected[:, start : start + 1])
    np.testing.assert_array_equal(trace.values(0), expected)
    assert trace.num_bytes <= 2 * expected.nbytes
