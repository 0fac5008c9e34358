"""Finished readouts on a worker: what is kept of a request's sums until someone asks for it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from vllm_steer.batch_plan import PoolingState
from vllm_steer.buffers import SteerBuffers
from vllm_steer.engine.resolved import ResolvedReadout
from vllm_steer.engine.traces import Trace


@dataclass(frozen=True, slots=True)
class FinishedReadout:
    """The sums of one sample, copied out of the accumulators.

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

    @classmethod
    def take(
        cls,
        buffers: SteerBuffers,
        spec: ResolvedReadout,
        state: PoolingState,
        trace: Trace | None,
        before_last: Sequence[torch.Tensor] = (),
    ) -> FinishedReadout:
        """Copy a request's accumulators to the host without waiting for the device.

        Args:
            before_last: the rows, at all hooked layers, of the tokens before the last one in the sum: ``TailRows``.

        The projections are taken here and not when they are collected: the bank may have changed by then.
        """
        drafts = state.drafts if spec.end is None else ()
        sums_LND = _rows(buffers.sums_L_AD, spec.layer_indices, state.accumulator, *drafts)
        ends = () if spec.end is not None else (state.accumulator,)  # an end that was told is not overrun
        tail_LMD = _rows(buffers.last_L_AD, spec.layer_indices, *ends)
        if before_last:
            earlier_LMD = torch.stack([rows_LD[spec.layer_indices] for rows_LD in before_last], dim=1)
            tail_LMD = torch.cat([earlier_LMD, tail_LMD], dim=1)
        layer_P = [spec.layers.index(layer) for _, layer, _ in spec.project]
        slot_P = [slot for _, _, slot in spec.project]

        def to_host(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to("cpu", non_blocking=True)

        def projected(rows_LND: torch.Tensor) -> torch.Tensor:
            if not spec.project:  # five calls for nothing, for every request
                return torch.zeros(0, rows_LND.shape[1])
            return to_host((rows_LND[layer_P] * buffers.bank_SD[slot_P][:, None]).sum(dim=2))

        return cls(
            spec=spec,
            state=replace(state),
            sums_LND=to_host(sums_LND) if spec.vectors else None,
            tail_LMD=to_host(tail_LMD) if spec.vectors else None,
            sums_PN=projected(sums_LND),
            tail_PM=projected(tail_LMD),
            trace=trace,
        )

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
                f"too many that can be taken back out: {most} (a stop string can cause this on a separate engine "
                "process, whose front end was slow to find it)"
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
            return ((total - tail.numpy()[:, most - over :].sum(axis=1)) * weight).astype(np.float32)

        vectors = None
        if self.sums_LND is not None and self.tail_LMD is not None:
            vectors = mean(self.sums_LND, self.tail_LMD).tobytes()
        values = mean(self.sums_PN, self.tail_PM).tolist()
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


def _rows(tensors_L: list[torch.Tensor], indices: list[int], *rows: int) -> torch.Tensor:
    """A copy of these rows at these layers, (L, N, D); a pipeline stage may have none of the layers."""
    if not indices or not rows:
        return tensors_L[0].new_zeros(len(indices), len(rows), tensors_L[0].shape[1])
    one_after_another = torch.stack([tensors_L[index][row] for index in indices for row in rows])
    return one_after_another.reshape(len(indices), len(rows), -1)


class ReadoutStore:
    """Finished readouts by (external request id, sample index), bounded in bytes.

    When it is full, the oldest that were collected already go first, then the oldest of all.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._fresh: OrderedDict[tuple[str, int], FinishedReadout] = OrderedDict()
        self._collected: OrderedDict[tuple[str, int], FinishedReadout] = OrderedDict()
        self._bytes = 0

    def put(self, external_id: str, index: int, readout: FinishedReadout) -> None:
        """Keep a readout; an older one of the same sample is replaced."""
        key = (external_id, index)
        for kept in (self._fresh, self._collected):
            replaced = kept.pop(key, None)
            self._bytes -= replaced.num_bytes if replaced is not None else 0
        self._fresh[key] = readout
        self._bytes += readout.num_bytes
        while self._bytes > self.capacity_bytes and len(self._fresh) + len(self._collected) > 1:
            _, evicted = (self._collected or self._fresh).popitem(last=False)
            self._bytes -= evicted.num_bytes

    def get(self, external_id: str, index: int) -> FinishedReadout | None:
        """The readout of a sample, which stays in the store for another look while there is room."""
        key = (external_id, index)
        if key in self._fresh:
            self._collected[key] = self._fresh.pop(key)
        return self._collected.get(key)
