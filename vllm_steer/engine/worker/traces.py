"""Traces on a worker: what the op wrote token by token, brought to the host and sorted by request.

The rows of a step are in the buffer once its forward pass has run and stay there until the next one. So they are
fetched at the last moment before that: when the next step is prepared, before a dummy run, or when somebody asks. Then
sampling, which the next step waits for, is under way already, and no further method of the runner has to be patched.
On an accelerator the copy is queued on the runner's own stream, behind that pass and before the next one, and is not
waited for: it is sorted in at a later fetch, once its event has passed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

FloatArray = npt.NDArray[np.float32]


class Trace:
    """The projections of one request's tokens onto its traced directions, as far as they are known.

    Tokens are counted from the first one of the request's span. A prompt that is computed again after a preemption
    writes the same values to the same places. A draft token's value is known once a later token's is: by then the place
    of a rejected one has been written over.

    Args:
        num_directions: C, how many directions are traced.
        failure: why this trace cannot be given, or None.
    """

    def __init__(self, num_directions: int, failure: str | None = None) -> None:
        self.failure = failure
        self._num_known = 0
        self._num_written = 0
        self._values_CN = np.empty((num_directions, 0), np.float32)

    @property
    def num_bytes(self) -> int:
        return self._values_CN.nbytes

    def reserve(self, count: int) -> None:
        """Make room for ``count`` tokens; room doubles, so that a long generation is not copied for every token."""
        directions, room = self._values_CN.shape
        if count > room:
            grown_CN = np.empty((directions, max(count, 2 * room)), np.float32)
            grown_CN[:, :room] = self._values_CN
            self._values_CN = grown_CN

    def write(self, start: int, values_CN: FloatArray, num_drafts: int = 0) -> None:
        """Put in the values of consecutive tokens from ``start`` on, the last of them drafts; room was reserved."""
        end = start + values_CN.shape[1]
        self._values_CN[:, start:end] = values_CN
        self._num_known = max(self._num_known, end - num_drafts)
        self._num_written = max(self._num_written, end)

    def values(self, start: int, end: int | None = None) -> FloatArray:
        """(C, n) float32: what is known of the tokens [start, end).

        Whoever gives ``end`` knows that all tokens before it were accepted.
        """
        return self._values_CN[:, start : self._num_known if end is None else min(end, self._num_written)]


@dataclass(frozen=True, slots=True)
class TraceRows:
    """Rows [token, token + count) and ``columns`` of the buffer are the trace's values from ``start`` on.

    The last ``num_drafts`` of them are of draft tokens.
    """

    trace: Trace
    columns: tuple[int, ...]
    token: int
    count: int
    start: int
    num_drafts: int = 0


@dataclass(frozen=True, slots=True)
class _Copy:
    """Rows of the buffer from ``token`` on, under way to the host until ``has_arrived``."""

    rows: Sequence[TraceRows]
    token: int
    values_TK: torch.Tensor
    has_arrived: Callable[[], bool]


class TraceFlow:
    """Moves the rows of each step from the buffer into the traces.

    Args:
        trace_TK: the buffer that the op writes, float32, on the model's device.
    """

    def __init__(self, trace_TK: torch.Tensor) -> None:
        self._trace_TK = trace_TK
        self._in_buffer: Sequence[TraceRows] = ()
        self._copies: deque[_Copy] = deque()

    def expect(self, rows: Sequence[TraceRows]) -> None:
        """Say what the forward pass that is about to run will leave in the buffer."""
        for row in rows:
            row.trace.reserve(row.start + row.count)
        self._in_buffer = rows

    def fetch(self) -> None:
        """Take the last forward pass's rows out of the buffer, and sort in whatever copies have arrived.

        Never waits. Behind a synchronised device everything is sorted in.
        """
        rows, self._in_buffer = self._in_buffer, ()
        if rows:
            first, end = min(row.token for row in rows), max(row.token + row.count for row in rows)
            self._copies.append(_Copy(rows, first, *start_copy(self._trace_TK[first:end])))
        while self._copies and self._copies[0].has_arrived():
            copy = self._copies.popleft()
            values_TK = copy.values_TK.numpy()
            for row in copy.rows:
                token = row.token - copy.token
                values_CN = values_TK[token : token + row.count, list(row.columns)].T
                row.trace.write(row.start, values_CN, row.num_drafts)


def start_copy(values_TK: torch.Tensor) -> tuple[torch.Tensor, Callable[[], bool]]:
    """The values on the host, and the question whether they have arrived.

    On an accelerator a copy, queued behind what runs and before what comes. On the host they are there already, and are
    the very same memory: they are taken over before the next pass writes to it.
    """
    if values_TK.device.type == "cpu":
        return values_TK, lambda: True
    host_TK = values_TK.to("cpu", non_blocking=True)  # PyTorch takes pinned memory for it
    arrived = torch.Event(values_TK.device)
    arrived.record()
    return host_TK, arrived.query
