"""Traces on a worker: the op's values for each token, copied to the host and sorted by request.

A forward pass writes its rows to the buffer, where they stay until the next pass. They are fetched at the last moment
before that: when the next step is prepared, before a dummy run, or on request. By then sampling, which the next step
waits for, is under way, and no further method of the runner needs a patch. On an accelerator the copy is queued on the
runner's own stream, between that pass and the next one. Nothing waits for it: a later fetch sorts it in once its event
has passed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

FloatArray = npt.NDArray[np.float32]


class Trace:
    """The projections of one request's tokens onto its traced directions, as far as they are known.

    Tokens count from the first token of the request's span. A prompt that is computed again after a preemption writes
    the same values to the same places. The value of a draft token counts as known once that of a later token is: by
    then the value of a rejected draft has been overwritten.

    Args:
        num_directions: C, the number of traced directions.
        failure: why this trace cannot be given, or None.
        size: shape of each value: a number, or the vector that ``rows`` keeps of a token.
    """

    def __init__(self, num_directions: int, failure: str | None = None, size: tuple[int, ...] = ()) -> None:
        self.failure = failure
        self._num_known = 0
        self._num_written = 0
        self._values_CN = np.empty((num_directions, 0, *size), np.float32)

    @property
    def num_bytes(self) -> int:
        """Size of the values in bytes, reserved space included."""
        return self._values_CN.nbytes

    def reserve(self, count: int) -> None:
        """Make room for ``count`` tokens. The room doubles, so that a long generation is not copied for every token."""
        directions, room, *size = self._values_CN.shape
        if count > room:
            grown_CN = np.empty((directions, max(count, 2 * room), *size), np.float32)
            grown_CN[:, :room] = self._values_CN
            self._values_CN = grown_CN

    def write(self, start: int, values_CN: FloatArray | Sequence[FloatArray], num_drafts: int = 0) -> None:
        """Store the values of consecutive tokens; ``reserve`` must have made room for them.

        Args:
            start: the first of these tokens.
            values_CN: (C, N) float32, one column per token.
            num_drafts: how many of the last tokens are draft tokens.
        """
        end = start + (len(values_CN[0]) if len(values_CN) else 0)
        for own_N, values_N in zip(self._values_CN, values_CN, strict=True):
            own_N[start:end] = values_N
        self._num_known = max(self._num_known, end - num_drafts)
        self._num_written = max(self._num_written, end)

    def values(self, start: int, end: int | None = None) -> FloatArray:
        """(C, n) float32: the known values of the tokens [start, end).

        Give ``end`` only if all tokens before it are known to be accepted.
        """
        return self._values_CN[:, start : self._num_known if end is None else min(end, self._num_written)]


@dataclass(frozen=True, slots=True)
class TraceRows:
    """Rows [token, token + count) of the buffer, at ``columns``, are the values of ``trace`` from ``start`` on.

    The last ``num_drafts`` rows belong to draft tokens.
    """

    trace: Trace
    columns: tuple[int, ...]
    token: int
    count: int
    start: int
    num_drafts: int = 0


@dataclass(frozen=True, slots=True)
class _Copy:
    """A copy to the host of what a pass wrote from ``token`` on, complete once ``has_arrived`` returns True."""

    rows: Sequence[TraceRows]
    token: int
    values: Mapping[int, torch.Tensor]
    has_arrived: Callable[[], bool]


class Flow(ABC):
    """Moves what each step writes for single tokens from the device into the traces of their requests."""

    def __init__(self) -> None:
        self._in_buffer: Sequence[TraceRows] = ()
        self._copies: deque[_Copy] = deque()

    def expect(self, rows: Sequence[TraceRows]) -> None:
        """Announce the rows that the next forward pass will write."""
        for row in rows:
            row.trace.reserve(row.start + row.count)
        self._in_buffer = rows

    def fetch(self) -> None:
        """Start to copy the last forward pass's rows to the host, and sort in the copies that have arrived.

        Never waits. After a synchronisation of the device, everything is sorted in.
        """
        rows, self._in_buffer = self._in_buffer, ()
        if rows:
            first, end = min(row.token for row in rows), max(row.token + row.count for row in rows)
            self._copies.append(_Copy(rows, first, *self._start(rows, first, end)))
        while self._copies and self._copies[0].has_arrived():
            copy = self._copies.popleft()
            for row in copy.rows:
                token = row.token - copy.token
                row.trace.write(row.start, self._own(copy.values, row, token), row.num_drafts)

    @abstractmethod
    def _start(
        self, rows: Sequence[TraceRows], first: int, end: int
    ) -> tuple[Mapping[int, torch.Tensor], Callable[[], bool]]:
        """Start to copy the tokens [first, end) of the step; the copies, and whether all have arrived."""

    @abstractmethod
    def _own(self, values: Mapping[int, torch.Tensor], row: TraceRows, token: int) -> Any:
        """The values of ``row``, whose first token is number ``token`` of the copies, as ``Trace.write`` takes them."""


class TraceFlow(Flow):
    """Moves the projections of each step from the buffer into the traces.

    Args:
        trace_TK: (tokens, trace columns) float32, the buffer that the op writes, on the model's device.
    """

    def __init__(self, trace_TK: torch.Tensor) -> None:
        super().__init__()
        self._trace_TK = trace_TK

    def _start(
        self, rows: Sequence[TraceRows], first: int, end: int
    ) -> tuple[Mapping[int, torch.Tensor], Callable[[], bool]]:
        values_TK, has_arrived = start_copy(self._trace_TK[first:end])
        return {0: values_TK}, has_arrived

    def _own(self, values: Mapping[int, torch.Tensor], row: TraceRows, token: int) -> FloatArray:
        own_CN: FloatArray = values[0].numpy()[token : token + row.count, list(row.columns)].T
        return own_CN


def start_copy(values_TK: torch.Tensor) -> tuple[torch.Tensor, Callable[[], bool]]:
    """Start to copy a tensor to the host.

    On an accelerator the copy is queued after the work already queued and before later work. On a CPU there is no copy:
    the result is the same memory, and is read before the next pass writes to it.

    Returns:
        The tensor on the host, and a function that returns whether its values have arrived.
    """
    if values_TK.device.type == "cpu":
        return values_TK, lambda: True
    host_TK = values_TK.to("cpu", non_blocking=True)  # PyTorch allocates pinned memory for it
    arrived = torch.Event(values_TK.device)
    arrived.record()
    return host_TK, arrived.query
