"""Rows on a worker: the stream of each token of a request, copied to the host layer by layer and sorted by request.

They travel as traces do, see ``traces``: a forward pass leaves its rows in the buffers, and the next step fetches them
before its own pass overwrites them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from vllm_steer.engine.worker import traces
from vllm_steer.engine.worker.traces import FloatArray, Flow, Trace, TraceRows


class RowFlow(Flow):
    """Moves the stored rows of each step from the buffers into the rows of their requests.

    A request's rows are a ``Trace`` whose values are vectors; its ``columns`` are the layer indices.

    Args:
        rows_L_TD: per hooked layer (tokens, D) float32, the buffers that the op writes, on the model's device.
    """

    def __init__(self, rows_L_TD: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self._rows_L_TD = rows_L_TD

    def _start(
        self, rows: Sequence[TraceRows], first: int, end: int
    ) -> tuple[Mapping[int, torch.Tensor], Callable[[], bool]]:
        values, has_arrived = {}, _at_once
        for layer in sorted({layer for row in rows for layer in row.columns}):
            # The copies run in order: when the last one has arrived, so have the others.
            values[layer], has_arrived = traces.start_copy(self._rows_L_TD[layer][first:end])
        return values, has_arrived

    def _own(self, values: Mapping[int, torch.Tensor], row: TraceRows, token: int) -> list[FloatArray]:
        return [values[layer][token : token + row.count].numpy() for layer in row.columns]


def rows_of(num_layers: int, size: int) -> Trace:
    """The rows of a request at this many layers, as far as they are known; its values are (L, N, D)."""
    return Trace(num_layers, size=(size,))


def _at_once() -> bool:
    return True
