"""Finished readouts on a worker: what is kept of a request's sums until someone asks for it."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_steer.engine.resolved_spec import ResolvedReadout
from vllm_steer.engine.worker.traces import Trace
from vllm_steer.plan.batch_plan import PoolingState


@dataclass(slots=True)
class FinishedReadout:
    """The sums of one sample, copied out of the accumulators by ``ReadoutFlow``.

    Attributes:
        spec: what was asked.
        state: how many tokens are in the sums, up to which position, and what went wrong if something did.
        sums_LND: the sum at each layer that was asked, and behind it the rows of the draft tokens of the last step, of
            which nobody has told yet whether they were accepted; None with ``vectors=False``.
        tail_LMD: the rows of the last tokens in the sum that can be taken back out, in order, or None likewise.
        sums_PN, tail_PM: the same two, projected onto each direction of ``spec.project``.
        trace: the projections token by token, or None where none were asked.
    """

    spec: ResolvedReadout
    state: PoolingState
    sums_LND: torch.Tensor | None
    tail_LMD: torch.Tensor | None
    sums_PN: torch.Tensor
    tail_PM: torch.Tensor
    trace: Trace | None

    def settle(self) -> None:
        """Go on with copies of its own, instead of a share in what was brought to the host for many at once."""
        if self.spec.project:
            self.sums_PN, self.tail_PM = self.sums_PN.clone(), self.tail_PM.clone()
        if self.sums_LND is not None and self.tail_LMD is not None:
            self.sums_LND, self.tail_LMD = self.sums_LND.clone(), self.tail_LMD.clone()

    @property
    def num_bytes(self) -> int:
        tensors = (self.sums_LND, self.tail_LMD, self.sums_PN, self.tail_PM)
        pooled = sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
        return pooled + (self.trace.num_bytes if self.trace is not None else 0)

    def answer(self, computed_end: int) -> dict[str, Any]:
        """The readout as plain types for the RPC.

        Args:
            computed_end: how many tokens of the request have been computed if everything went as it should: the prompt
                and all generated tokens but the last.

        Returns:
            ``{"error": reason}``, or ``{"num_tokens", "layers", "mean": bytes of (L, D) float32 or None,
            "projections": [[name, layer, value]], "trace": [[name, bytes of (num_tokens,) float32]],
            "trace_error": why the trace alone cannot be given, or None}``.
        """
        if self.state.failure is not None:
            return {"error": self.state.failure}
        over = 0 if self.spec.end is not None else self.state.next_position - computed_end
        most = self.tail_PM.shape[1]
        if not -len(self.state.drafts) <= over <= most:
            return {
                "error": f"the sum goes up to token {self.state.next_position} where {computed_end} is the end; tokens "
                f"too many that can be taken back out: {most} (an abort can cause this, or a stop string that a front "
                "end beside the engine's process was slow to find)"
            }
        if self.spec.end is not None and self.state.next_position < self.spec.end:
            return {"error": f"{self.state.next_position} of {self.spec.end} prompt tokens were computed"}
        num_accepted, over = max(-over, 0), max(over, 0)
        over = min(over, self.state.num_tokens)  # a token too many that lies before the span is not in the sum
        count = self.state.num_tokens + num_accepted - over
        # A mean over no token is NaN, as numpy has it, and not a made-up zero.
        weight = np.float32(1.0 / count) if count else np.float32(np.nan)

        def mean(sums: torch.Tensor, tail: torch.Tensor) -> Any:
            total = sums.numpy()[:, : 1 + num_accepted].sum(axis=1)
            if over:
                total -= tail.numpy()[:, most - over :].sum(axis=1)
            return (total * weight).astype(np.float32, copy=False)

        vectors = None
        if self.sums_LND is not None and self.tail_LMD is not None:
            vectors = mean(self.sums_LND, self.tail_LMD).tobytes()
        values = mean(self.sums_PN, self.tail_PM).tolist() if self.spec.project else []
        return {
            "num_tokens": count,
            "layers": self.spec.layers,
            "mean": vectors,
            "projections": [
                [name, layer, value] for (name, layer, _), value in zip(self.spec.project, values, strict=True)
            ],
            "trace": self._traced(count),
            "trace_error": self.trace.failure if self.trace is not None else None,
        }

    def _traced(self, count: int) -> list[list[Any]]:
        if self.trace is None or self.trace.failure is not None:
            return []
        values_CN = self.trace.values(0, count)
        return [[name, values_N.tobytes()] for (name, _, _), values_N in zip(self.spec.trace, values_CN, strict=True)]


class ReadoutStore:
    """Finished readouts by (``Resolved.key``, sample index), bounded in bytes.

    When it is full, the oldest that were collected already go first, then the oldest of all.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._fresh: OrderedDict[tuple[str, int], FinishedReadout] = OrderedDict()
        self._collected: OrderedDict[tuple[str, int], FinishedReadout] = OrderedDict()
        self._bytes = 0

    def put(self, request_key: str, index: int, readout: FinishedReadout) -> None:
        """Keep a readout; an older one of the same sample is replaced."""
        key = (request_key, index)
        for kept in (self._fresh, self._collected):
            replaced = kept.pop(key, None)
            self._bytes -= replaced.num_bytes if replaced is not None else 0
        self._fresh[key] = readout
        self._bytes += readout.num_bytes
        while self._bytes > self.capacity_bytes and len(self._fresh) + len(self._collected) > 1:
            _, evicted = (self._collected or self._fresh).popitem(last=False)
            self._bytes -= evicted.num_bytes

    def get(self, request_key: str, index: int) -> FinishedReadout | None:
        """The readout of a sample, which stays in the store for another look while there is room."""
        key = (request_key, index)
        if key in self._fresh:
            self._collected[key] = self._fresh.pop(key)
        return self._collected.get(key)
