"""The rows of a request's last tokens, kept pass by pass for a front end that finds a stop string late."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vllm_steer.engine.worker.tail_rows import MAX_TOKENS_BACK, TailRows
from vllm_steer.plan.batch_plan import PoolingState

LAST_L_AD = [torch.zeros(3, 2) for _ in range(2)]


def row_of(position: int, layer: int) -> float:
    return 100.0 * layer + position


def passes(tails: TailRows, accumulator: int, positions: Sequence[int], request_id: str = "a") -> None:
    """Forward passes that each leave the row of one token, and what happens before the next pass."""
    for position in positions:
        for layer, last_AD in enumerate(LAST_L_AD):
            last_AD[accumulator] = row_of(position, layer)
        tails.keep({request_id: PoolingState(accumulator, next_position=position + 1, num_tokens=1)})


def kept(tails: TailRows, position: int, request_id: str = "a") -> list[int]:
    """The positions of the kept rows before ``position``; both layers must have the same."""
    rows_LD = tails.before(request_id, position)
    found = [int(row[0, 0]) for row in rows_LD]
    for at, row_LD in zip(found, rows_LD, strict=True):
        np.testing.assert_array_equal(row_LD.numpy(), [[row_of(at, layer)] * 2 for layer in range(2)])
    return found


def test_the_rows_of_the_last_tokens_before_one_come_in_order() -> None:
    tails = TailRows(LAST_L_AD)
    passes(tails, 1, range(5, 9))
    assert kept(tails, 9) == [5, 6, 7, 8]
    assert kept(tails, 8) == [5, 6, 7]
    assert kept(tails, 9, "another") == []


def test_only_as_many_are_kept_as_can_be_taken_back_beside_the_last() -> None:
    tails = TailRows(LAST_L_AD)
    passes(tails, 1, range(100))
    assert kept(tails, 100) == list(range(100 - (MAX_TOKENS_BACK - 1), 100))


def test_a_gap_ends_what_can_be_taken_back() -> None:
    tails = TailRows(LAST_L_AD)
    passes(tails, 1, [5, 6, 8])  # 7 and 8 were computed in one pass
    assert kept(tails, 9) == [8]


def test_a_request_that_was_not_in_every_pass_or_was_computed_again_keeps_its_rows() -> None:
    tails = TailRows(LAST_L_AD)
    passes(tails, 1, [5, 5, 6])
    assert kept(tails, 7) == [5, 6]
    passes(tails, 2, [7])  # preempted and computed again in one chunk, in another accumulator
    assert kept(tails, 8) == [5, 6, 7]


def test_requests_share_a_pass_and_nothing_is_kept_when_there_are_none() -> None:
    tails = TailRows(LAST_L_AD)
    for layer, last_AD in enumerate(LAST_L_AD):
        last_AD[0], last_AD[2] = row_of(3, layer), row_of(9, layer)
    tails.keep({"a": PoolingState(0, 4, 1), "b": PoolingState(2, 10, 1)})
    assert (kept(tails, 4), kept(tails, 10, "b")) == ([3], [9])
    tails.keep({})
    assert kept(tails, 4) == []
