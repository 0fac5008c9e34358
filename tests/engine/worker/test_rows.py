"""A step's rows on their way from the buffers of the layers to the rows of their requests."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from vllm_steer.engine.worker import traces
from vllm_steer.engine.worker.rows import RowFlow, rows_of
from vllm_steer.engine.worker.traces import TraceRows

LAYERS, TOKENS, SIZE = 3, 8, 4


def buffers() -> list[torch.Tensor]:
    return [torch.zeros(TOKENS, SIZE) for _ in range(LAYERS)]


def step(flow: RowFlow, rows_L_TD: list[torch.Tensor], rows: list[TraceRows], seed: int) -> np.ndarray:
    """A forward pass that fills all buffers; returns what it wrote, (LAYERS, TOKENS, SIZE)."""
    flow.fetch()
    flow.expect(rows)
    written = np.random.default_rng(seed).standard_normal((LAYERS, TOKENS, SIZE)).astype(np.float32)
    for buffer_TD, own in zip(rows_L_TD, written, strict=True):
        buffer_TD.copy_(torch.from_numpy(own))
    return written


def test_each_request_gets_its_own_layers_and_tokens_of_every_step() -> None:
    rows_L_TD = buffers()
    flow, one, two = RowFlow(rows_L_TD), rows_of(1, SIZE), rows_of(2, SIZE)
    first = step(flow, rows_L_TD, [TraceRows(one, (1,), 1, 2, 0), TraceRows(two, (0, 2), 4, 4, 0)], seed=0)
    second = step(flow, rows_L_TD, [TraceRows(two, (0, 2), 0, 1, 4), TraceRows(one, (1,), 3, 1, 2)], seed=1)
    step(flow, rows_L_TD, [], seed=2)
    np.testing.assert_array_equal(one.values(0)[0], np.concatenate([first[1, 1:3], second[1, 3:4]]))
    np.testing.assert_array_equal(two.values(0), np.concatenate([first[[0, 2], 4:8], second[[0, 2], :1]], axis=1))


def test_a_draft_that_was_rejected_is_overwritten_and_one_at_the_end_is_not_known_yet() -> None:
    rows_L_TD = buffers()
    flow, rows = RowFlow(rows_L_TD), rows_of(1, SIZE)
    step(flow, rows_L_TD, [TraceRows(rows, (0,), 0, 4, 0, num_drafts=3)], seed=0)
    second = step(flow, rows_L_TD, [TraceRows(rows, (0,), 2, 3, 2, num_drafts=2)], seed=1)
    flow.fetch()
    assert rows.values(0).shape == (1, 3, SIZE)
    np.testing.assert_array_equal(rows.values(2, 5)[0], second[0, 2:5])


def test_a_stage_without_the_layers_keeps_nothing_and_copies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "start_copy", lambda _: pytest.fail("there is nothing to copy"))
    rows_L_TD = buffers()
    flow, rows = RowFlow(rows_L_TD), rows_of(0, SIZE)
    step(flow, rows_L_TD, [TraceRows(rows, (), 0, 4, 0)], seed=0)
    flow.fetch()
    assert rows.values(0, 4).shape == (0, 0, SIZE)
    assert rows.num_bytes == 0


def test_copies_that_are_under_way_are_sorted_in_once_they_have_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator: nothing waits, and the last layer's copy of a step speaks for those before it."""
    arrivals: list[bool] = []

    def slow_copy(values_TD: torch.Tensor) -> tuple[torch.Tensor, Callable[[], bool]]:
        number = len(arrivals)
        arrivals.append(False)
        return values_TD.clone(), lambda: arrivals[number]

    monkeypatch.setattr(traces, "start_copy", slow_copy)
    rows_L_TD = buffers()
    flow, rows = RowFlow(rows_L_TD), rows_of(2, SIZE)
    written = [step(flow, rows_L_TD, [TraceRows(rows, (0, 1), 2, 1, start)], seed=start) for start in range(2)]
    flow.fetch()
    assert len(arrivals) == 4
    assert rows.values(0).shape == (2, 0, SIZE)
    arrivals[:2] = [True, True]
    flow.fetch()
    np.testing.assert_array_equal(rows.values(0), written[0][:2, 2:3])
    arrivals[2:] = [True, True]
    flow.fetch()
    np.testing.assert_array_equal(rows.values(0), np.concatenate([one[:2, 2:3] for one in written], axis=1))
