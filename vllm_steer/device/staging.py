"""How a step's tables get to a device with memory of its own: one copy, from pinned memory, that nobody waits for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

RING_LENGTH = 4
"""More copies than a runner ever has under way: it prepares one step while another one runs."""


class StagingRing:
    """Host buffers taken in turn, each written again only once the copy out of it is over.

    Args:
        num_elements: the most int32 numbers of one copy.
        new_event: makes what is recorded behind a copy and waited for before its buffer is used again.
        pin_memory: without it a copy to an accelerator waits for the device.
    """

    def __init__(self, num_elements: int, new_event: Callable[[], Any], *, pin_memory: bool = True) -> None:
        self._buffers = [
            torch.empty(num_elements, dtype=torch.int32, pin_memory=pin_memory) for _ in range(RING_LENGTH)
        ]
        self._events: list[Any] = [None] * RING_LENGTH
        self._new_event = new_event
        self._next = 0

    def send(self, values: npt.NDArray[np.int32], target: torch.Tensor) -> None:
        """Copy ``values`` to as many elements of ``target``, behind what its stream has to do already."""
        index, self._next = self._next, (self._next + 1) % RING_LENGTH
        if self._events[index] is None:
            self._events[index] = self._new_event()
        else:
            self._events[index].synchronize()  # returns at once unless every buffer is under way
        staged = self._buffers[index][: len(values)]
        staged.numpy()[:] = values
        target[: len(values)].copy_(staged, non_blocking=True)
        self._events[index].record()


def ring_for(device: torch.device, num_elements: int) -> StagingRing | None:
    """The ring that a device needs; None for the host, whose tables are written where they are."""
    if device.type == "cpu":
        return None
    return StagingRing(num_elements, lambda: torch.Event(device))
