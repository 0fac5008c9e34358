"""Rows on a worker: the stream of each token of a request, copied to the host layer by layer and sorted by request.

They travel as traces do, see ``traces``: a forward pass leaves its rows in the buffers, and the next step fetches them
before its own pass overwrites them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vllm_steer.engine.worker import traces
from vllm_steer.engine.worker.traces import Trace, TraceRows


@dataclass(frozen=True, slots=True)
class _Copy:
    """A copy to the host of some layers' rows from ``token`` on, complete once ``has_arrived`` returns True."""

    rows: Sequence[TraceRows]
    token: int
    of_layer: dict[int, torch.Tensor]
    has_arrived: Callable[[], bool]


class RowFlow:
    """Moves the stored rows of each step from the buffers into the rows of their requests.

    A request's rows are a ``Trace`` whose values are vectors; its ``columns`` are the layer indices.

    Args:
        rows_L_TD: per hooked layer (tokens, D) float32, the buffers that the op writes, on the model's device.
    """

    def __init__(self, rows_L_TD: Sequence[torch.Tensor]) -> None:
        self._rows_L_TD = rows_L_TD
        self._in_buffers: Sequence[TraceRows] = ()
        self._copies: deque[_Copy] = deque()

    def expect(self, rows: Sequence[TraceRows]) -> None:
        """Announce the rows that the next forward pass will store."""
        for row in rows:
            row.trace.reserve(row.start + row.count)
        self._in_buffers = rows

    def fetch(self) -> None:
        """Start to copy the last forward pass's rows from the buffers, and sort in the copies that have arrived.

        Never waits. After a synchronisation of the device, everything is sorted in.
        """
        rows, self._in_buffers = self._in_buffers, ()
        if rows:
            first, end = min(row.token for row in rows), max(row.token + row.count for row in rows)
            of_layer, has_arrived = {}, _at_once
            for layer in sorted({layer for row in rows for layer in row.columns}):
                # The copies run in order: when the last one has arrived, so have the others.
                of_layer[layer], has_arrived = traces.start_copy(self._rows_L_TD[layer][first:end])
            self._copies.append(_Copy(rows, first, of_layer, has_arrived))
        while self._copies and self._copies[0].has_arrived():
            copy = self._copies.popleft()
            values = {layer: rows_TD.numpy() for layer, rows_TD in copy.of_layer.items()}
            for row in copy.rows:
                token = row.token - copy.token
                own = [values[layer][token : token + row.count] for layer in row.columns]
                row.trace.write(row.start, own, row.num_drafts)


def rows_of(num_layers: int, size: int) -> Trace:
    """The rows of a request at this many layers, as far as they are known; its values are (L, N, D)."""
    return Trace(num_layers, size=(size,))


def _at_once() -> bool:
    return True
