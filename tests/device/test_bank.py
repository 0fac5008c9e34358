"""Vectors in the bank: many at once, from memory that may not be written, each in its slot."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from vllm_steer.device.buffers import SteerBuffers
from vllm_steer.directions import Direction
from vllm_steer.engine.registry import DirectionRegistry, bank_writes

SLOTS, SIZE = 3000, 4


def make(slots: int = SLOTS, size: int = SIZE) -> SteerBuffers:
    return SteerBuffers(
        num_layers=1,
        hidden_size=size,
        max_tokens=4,
        max_requests=1,
        max_entries=1,
        max_directions=slots,
        trace_columns=0,
        device=torch.device("cpu"),
    )


def test_many_vectors_are_written_to_their_slots_in_any_order() -> None:
    buffers = make()
    rng = np.random.default_rng(0)
    slots = rng.permutation(SLOTS)[:2500]  # more than one copy to the device takes
    message = rng.standard_normal((2500, SIZE)).astype("<f4").tobytes()
    vectors_ND = np.frombuffer(message, "<f4").reshape(-1, SIZE)
    buffers.write_directions(slots.tolist(), vectors_ND)
    expected = np.zeros((SLOTS, SIZE), np.float32)
    for slot, vector_D in zip(slots, vectors_ND, strict=True):
        expected[slot] = vector_D
    assert np.array_equal(buffers.bank_SD.numpy(), expected)


def test_one_vector_is_written_as_one_of_many() -> None:
    one, many = make(), make()
    vector_D = np.arange(1.0, 1.0 + SIZE, dtype=np.float32)
    one.write_directions([7], vector_D[None])
    many.write_directions([3, 7], np.stack([np.zeros_like(vector_D), vector_D]))
    assert torch.equal(one.bank_SD, many.bank_SD)
    assert one.bank_SD[7].tolist() == vector_D.tolist()
    assert not one.bank_SD[[*range(7), *range(8, SLOTS)]].any()


@pytest.mark.slow  # draws and holds a gigabyte
def test_ten_thousand_directions_of_4096_numbers_are_in_the_bank_in_seconds() -> None:
    slots, size = 10_000, 4096
    drawn_SD = np.random.default_rng(0).standard_normal((slots, size), np.float32)
    directions = [Direction(f"d{slot}", slot % 4, row_D) for slot, row_D in enumerate(drawn_SD)]
    buffers, registry = make(slots, size), DirectionRegistry(slots, size)
    start = time.process_time()
    writes = registry.reserve(directions)
    for written, vectors in bank_writes(writes):
        buffers.write_directions(written, np.frombuffer(vectors, "<f4").reshape(len(written), -1))
    registry.publish(writes)
    assert time.process_time() - start < 10  # 0.7 s measured
    for slot in (0, 5_000, 9_999):
        found = registry.find(f"d{slot}", None, ())
        assert np.array_equal(buffers.bank_SD[found.slot].numpy(), drawn_SD[slot])
