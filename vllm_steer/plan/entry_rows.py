"""Assigns rows of the entry table to requests and fills them. Pure: no vLLM, no torch.

A request has a pair of rows, one for its prompt tokens and one for its generated tokens, and keeps it while it runs. A
step sends only the rows of the requests that are new in it.

Letters of shapes: R rows, L hooked layers, E entries per row.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Entry(NamedTuple):
    """The change h + (a + b·⟨h,d⟩)·d after hooked layer number ``layer_index``; d is in ``slot`` of the bank."""

    layer_index: int
    slot: int
    a: float
    b: float


class EntryRows:
    """The rows of one worker.

    Args:
        num_layers: L, hooked layers.
        max_requests: requests that can be scheduled in one step; R = 2·max_requests.
        max_entries: E, entries of one row at one layer.
    """

    def __init__(self, num_layers: int, max_requests: int, max_entries: int) -> None:
        self._blank_2LE3 = np.zeros((2, num_layers, max_entries, 3), np.int32)
        self._blank_2LE3[..., 0] = -1
        self._first_row: dict[str, int] = {}
        self._free = list(range(2 * max_requests - 2, -1, -2))
        self._depth_RL = np.zeros((2 * max_requests, num_layers), np.int32)
        self._changes: list[tuple[int, npt.NDArray[np.int32]]] = []

    def lend(
        self, request_id: str, prompt: Sequence[Entry], generated: Sequence[Entry], in_step: Collection[str]
    ) -> int:
        """Assign a pair of rows to a request until ``release``, and return the row of its prompt tokens.

        The next row is the one for its generated tokens. There are as many pairs as requests can run. A request that
        was preempted in a step without tokens still holds its pair, because the planner does not see such steps. So if
        no pair is free, one is taken from a request that is not in this step; that request gets a new pair later.

        Args:
            request_id: the request.
            prompt, generated: entries of its prompt tokens and of its generated tokens, used for a new pair only.
            in_step: all requests of this step.
        """
        if request_id not in self._first_row:
            if not self._free:
                for absent in [one for one in self._first_row if one not in in_step][:1]:
                    self.release(absent)
            first_row = self._first_row[request_id] = self._free.pop()
            self._write(first_row, prompt, generated)
        return self._first_row[request_id]

    def lent(self) -> dict[str, int]:
        """Request -> its row for prompt tokens, for all requests with rows; a copy."""
        return dict(self._first_row)

    def release(self, request_id: str) -> None:
        """Free a request's rows; does nothing if it has none."""
        if request_id in self._first_row:
            self._free.append(self._first_row.pop(request_id))

    def depth(self, rows: Sequence[int]) -> npt.NDArray[np.int32]:
        """(L,) int32: the most entries that any of these rows has at each layer."""
        depth_L: npt.NDArray[np.int32] = self._depth_RL[list(rows)].max(axis=0)
        return depth_L

    def take_changes(self) -> list[tuple[int, npt.NDArray[np.int32]]]:
        """The pairs written since the last call: the first row, and (2, L, E, 3) int32 for it and the next row.

        An entry is (slot, a, b); a and b are the bits of a float32. Slot -1 means no entry. Entries are packed to the
        left, in the order given.
        """
        changes, self._changes = self._changes, []
        return changes

    def _write(self, first_row: int, prompt: Sequence[Entry], generated: Sequence[Entry]) -> None:
        pair_2LE3 = self._blank_2LE3.copy()
        coefficients_2LE2 = pair_2LE3.view(np.float32)[..., 1:]
        depth_2L = self._depth_RL[first_row : first_row + 2]
        for half, entries in enumerate((prompt, generated)):
            if half and generated == prompt:  # the usual case
                pair_2LE3[half], depth_2L[half] = pair_2LE3[0], depth_2L[0]
                continue
            depth = [0] * depth_2L.shape[1]
            for layer_index, slot, a, b in entries:
                place = half, layer_index, depth[layer_index]
                pair_2LE3[(*place, 0)] = slot
                coefficients_2LE2[place] = a, b
                depth[layer_index] += 1
            depth_2L[half] = depth
        self._changes.append((first_row, pair_2LE3))
