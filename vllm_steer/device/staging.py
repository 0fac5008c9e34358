"""Copies a step's tables to a device with memory of its own: one asynchronous copy from pinned memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

RING_LENGTH = 4
"""More copies than a runner ever has in flight: it prepares one step while another one runs."""


class StagingRing:
    """Host buffers used in turn; each is rewritten only after the copy from it has finished.

    Args:
        num_elements: most int32 numbers of one copy.
        new_event: creates a device event. It is recorded after each copy and awaited before the buffer is reused.
        pin_memory: without it, a copy to an accelerator waits for the device.
    """

    def __init__(self, num_elements: int, new_event: Callable[[], Any], *, pin_memory: bool = True) -> None:
        self._buffers = [
            torch.empty(num_elements, dtype=torch.int32, pin_memory=pin_memory) for _ in range(RING_LENGTH)
        ]
        self._events: list[Any] = [None] * RING_LENGTH
        self._new_event = new_event
        self._next = 0

    def send(self, values: npt.NDArray[np.int32], target: torch.Tensor) -> None:
        """Queue a copy of ``values`` (int32) to the first elements of ``target`` on the current stream."""
        index, self._next = self._next, (self._next + 1) % RING_LENGTH
        if self._events[index] is None:
            self._events[index] = self._new_event()
        else:
            self._events[index].synchronize()  # returns at once unless all buffers are in flight
        staged = self._buffers[index][: len(values)]
        staged.numpy()[:] = values
        target[: len(values)].copy_(staged, non_blocking=True)
        self._events[index].record()


def ring_for(device: torch.device, num_elements: int) -> StagingRing | None:
    """The ring for a device; None for a CPU, whose tables are written in place."""
    if device.type == "cpu":
        return None
    return StagingRing(num_elements, lambda: torch.Event(device))
