"""Assigns columns of the trace buffer to traced directions. Pure: no vLLM, no torch.

The op writes one number per token into each of K columns. A column is bound to a (layer index, slot) pair while at
least one request traces that pair; requests that trace the same pair share its column. A graph that was compiled or
captured with K columns works with any binding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Pair = tuple[int, int]
"""(layer index, slot) of a traced direction; or (``HELD``, number) of an entry whose condition is counted."""
HELD = -1
"""In place of a layer index: a column that the entry itself writes, 1 where its condition holds and 0 elsewhere."""


class TraceColumns:
    """The columns of one worker.

    Args:
        num_layers: L, hooked layers.
        num_columns: K, pairs that can be traced at once.
    """

    def __init__(self, num_layers: int, num_columns: int) -> None:
        self.num_columns = num_columns
        self._slot_LK = np.full((num_layers, num_columns), -1, np.int32)
        self._column_of: dict[Pair, int] = {}
        self._users: dict[Pair, set[str]] = {}
        self._free = list(range(num_columns - 1, -1, -1))
        self._changed = False

    def bind(self, request_id: str, pairs: Sequence[Pair]) -> tuple[int, ...] | None:
        """Bind a column to each pair until ``release``. If too few are free, bind nothing and return None."""
        new = set(pairs) - set(self._column_of)
        if len(new) > len(self._free):
            return None
        for pair in pairs:
            if pair not in self._column_of:
                column = self._column_of[pair] = self._free.pop()
                if pair[0] != HELD:
                    self._slot_LK[pair[0], column] = pair[1]
                    self._changed = True
            self._users.setdefault(pair, set()).add(request_id)
        return tuple(self._column_of[pair] for pair in pairs)

    def release(self, request_id: str, pairs: Sequence[Pair]) -> None:
        """Free a request's columns; does nothing if it has none."""
        for pair in pairs:
            users = self._users.get(pair, set())
            users.discard(request_id)
            if pair in self._users and not users:
                del self._users[pair]
                column = self._column_of.pop(pair)
                self._free.append(column)
                if pair[0] != HELD:
                    self._slot_LK[pair[0], column] = -1
                    self._changed = True

    def take_changes(self) -> npt.NDArray[np.int32] | None:
        """(L, K) int32, the slot that each column projects onto at each layer, -1 for none; None if unchanged."""
        if not self._changed:
            return None
        self._changed = False
        return self._slot_LK.copy()
