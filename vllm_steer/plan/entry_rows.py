"""Which rows of the entry table are whose, and what stands in them. Pure: no vLLM, no torch.

A request has a pair of rows, one for its prompt tokens and one for its generated tokens, and keeps it while it runs: a
step sends the rows of the requests that are new in it, and no others.

Letters of shapes: R rows, L hooked layers, E entries a row.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Entry(NamedTuple):
    """h + (a + b·⟨h,d⟩)·d with d in ``slot`` of the bank, after hooked layer number ``layer_index``."""

    layer_index: int
    slot: int
    a: float
    b: float


class EntryRows:
    """The rows of one worker.

    Args:
        num_layers: L.
        max_requests: requests that can be scheduled in one step; R = 2·max_requests.
        max_entries: E.
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
        """The row of a request's prompt tokens until ``release``; that of its generated tokens is the next one.

        There are as many pairs as requests can run, but one that was preempted in a step without tokens, of which no
        planner hears, still has its own. So where none is left, one is taken from a request that is not ``in_step``: it
        gets another when it comes back.
        """
        if request_id not in self._first_row:
            if not self._free:
                for absent in [one for one in self._first_row if one not in in_step][:1]:
                    self.release(absent)
            first_row = self._first_row[request_id] = self._free.pop()
            self._write(first_row, prompt, generated)
        return self._first_row[request_id]

    def lent(self) -> dict[str, int]:
        """Request -> its row for prompt tokens, of all that have any; a copy."""
        return dict(self._first_row)

    def release(self, request_id: str) -> None:
        """Give a request's rows back; harmless if it has none."""
        if request_id in self._first_row:
            self._free.append(self._first_row.pop(request_id))

    def depth(self, rows: Sequence[int]) -> npt.NDArray[np.int32]:
        """(L,) int32: the most entries that any of these rows has at each layer."""
        depth_L: npt.NDArray[np.int32] = self._depth_RL[list(rows)].max(axis=0)
        return depth_L

    def take_changes(self) -> list[tuple[int, npt.NDArray[np.int32]]]:
        """The pairs that were written since the last call: the first row, and (2, L, E, 3) int32 for it and the next.

        An entry is (slot, a, b), the last two the bits of a float32; a slot of -1 is no entry. Entries are packed to
        the left, in the order given.
        """
        changes, self._changes = self._changes, []
        return changes

    def _write(self, first_row: int, prompt: Sequence[Entry], generated: Sequence[Entry]) -> None:
        pair_2LE3 = self._blank_2LE3.copy()
        coefficients_2LE2 = pair_2LE3.view(np.float32)[..., 1:]
        depth_2L = self._depth_RL[first_row : first_row + 2]
        for half, entries in enumerate((prompt, generated)):
            if half and generated == prompt:  # as a rule
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
