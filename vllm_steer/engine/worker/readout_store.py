"""Finished readouts on a worker: the sums of requests, kept until they are collected."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_steer.engine.resolved_spec import ResolvedReadout, Traced
from vllm_steer.engine.worker.traces import FloatArray, Trace
from vllm_steer.plan.batch_plan import PoolingState
from vllm_steer.plan.watch_run import WatchRun


@dataclass(slots=True)
class FinishedReadout:
    """The sums of one sample, copied out of the accumulators by ``ReadoutFlow``.

    Attributes:
        spec: the requested readout.
        state: number of tokens in the sums, the position that they reach, and the failure if there was one.
        sums_LND: (L, N, D) float32: the sum at each requested layer, then the rows of the last step's draft tokens,
            which may have been accepted; None with ``vectors=False``.
        tail_LMD: (L, M, D) float32: the rows of the last tokens in the sum, oldest first, which can be subtracted from
            it; None with ``vectors=False``.
        sums_PN, tail_PM: these two, projected onto each direction of ``spec.project``.
        trace: the projections of each token, or None if none were requested; then whether each condition of
            ``spec.counted`` holds there.
        watched: those of each generated token onto the directions of ``spec.watch``; None if there are none.
        rows: the rows of each token, or None if none were requested.
        prompt_sums_G: (G,) float32, the sums over the prompt at which conditions look, if these are asked for and the
            prompt was computed.
    """

    spec: ResolvedReadout
    state: PoolingState
    sums_LND: torch.Tensor | None
    tail_LMD: torch.Tensor | None
    sums_PN: torch.Tensor
    tail_PM: torch.Tensor
    trace: Trace | None
    watched: Trace | None = None
    rows: Trace | None = None
    prompt_sums_G: torch.Tensor | None = None

    def settle(self) -> None:
        """Clone the slices so that the host buffer shared with other readouts can be freed."""
        if self.spec.project:
            self.sums_PN, self.tail_PM = self.sums_PN.clone(), self.tail_PM.clone()
        if self.sums_LND is not None and self.tail_LMD is not None:
            self.sums_LND, self.tail_LMD = self.sums_LND.clone(), self.tail_LMD.clone()

    @property
    def num_bytes(self) -> int:
        """Size of the tensors, the trace and the rows in bytes."""
        tensors = (self.sums_LND, self.tail_LMD, self.sums_PN, self.tail_PM)
        pooled = sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
        return pooled + sum(one.num_bytes for one in (self.trace, self.watched, self.rows) if one is not None)

    def answer(self, computed_end: int) -> dict[str, Any]:
        """The readout as plain types for the RPC.

        Args:
            computed_end: number of tokens of the sample that the model must have computed: the prompt and all generated
                tokens but the last, and that one too if the request's stop held for it.

        Returns:
            ``{"error": reason}``, or ``{"num_tokens", "layers", "pooled": bytes of (L, D) float32 or None,
            "projections": [[name, layer, value]], "trace": [[name, bytes of (num_tokens,) float32]], "max": [[name,
            layer, value, position]], "held": None, or for each entry with a condition the count or bool or None,
            "stopped", "flags": [[name, layer, position, value]], "rows": [[layer, D, bytes of (num_tokens, D)
            float32]], "trace_error": why trace, max, held and flags alone cannot be given, or None}``. ``stopped`` has
            at most one element.
        """
        if self.state.failure is not None:
            return {"error": self.state.failure}
        over = 0 if self.spec.end is not None else self.state.next_position - computed_end
        most = self.tail_PM.shape[1]
        # Rows need nothing subtracted: surplus ones are left out.
        if over < -(self.state.num_unread + len(self.state.drafts)) or (over > most and self.rows is None):
            return {
                "error": f"the sum goes up to token {self.state.next_position} but the sample ends at {computed_end}; "
                f"allowed: up to {most} tokens too many, which can be subtracted (an abort can cause this, or a stop "
                "string that a front end in another process was slow to find)"
            }
        if self.spec.end is not None and self.state.next_position < self.spec.end:
            return {"error": f"{self.state.next_position} of {self.spec.end} prompt tokens were computed"}
        num_accepted, over = max(-over - self.state.num_unread, 0), max(over, 0)
        over = min(over, self.state.num_tokens)  # a surplus token before the span is not in the sum
        count = self.state.num_tokens + num_accepted - over
        is_last = self.spec.pool == "last"
        if is_last and over == most and count:
            return {
                "error": f"the last token of the sample is {over} tokens before the last computed one, and the rows of "
                f"{most} are kept (an abort or a stop string that was found late can cause this)"
            }
        # A mean over no tokens is NaN, as in numpy, and not zero.
        weight = np.float32(1.0 / (1 if is_last else count)) if count else np.float32(np.nan)

        def pooled(sums: torch.Tensor, tail: torch.Tensor) -> Any:
            if is_last:
                row = sums.numpy()[:, num_accepted] if num_accepted else tail.numpy()[:, most - 1 - over]
                return (row * weight).astype(np.float32, copy=False)
            total = sums.numpy()[:, : 1 + num_accepted].sum(axis=1)
            if over:
                total -= tail.numpy()[:, most - over :].sum(axis=1)
            return (total * weight).astype(np.float32, copy=False)

        vectors = None
        if self.sums_LND is not None and self.tail_LMD is not None:
            vectors = pooled(self.sums_LND, self.tail_LMD).tobytes()
        values = pooled(self.sums_PN, self.tail_PM).tolist() if self.spec.project else []
        traced = self._traced(count)
        stored = [] if self.rows is None else list(self.rows.values(0, count))
        if stored and len(stored[0]) < count:
            return {"error": f"{len(stored[0])} of the rows of {count} tokens have arrived from the device"}
        return {
            "num_tokens": count,
            "layers": self.spec.layers,
            "pooled": vectors,
            "projections": [[one.name, one.layer, value] for one, value in zip(self.spec.project, values, strict=True)],
            "trace": [[one.name, values_N.tobytes()] for one, values_N in traced if one.is_shown],
            "max": [self._largest(one, values_N) for one, values_N in traced] if self.spec.pool == "max" else [],
            "held": self._held(count),
            "rows": [
                [layer, rows_ND.shape[1], rows_ND.tobytes()]
                for layer, rows_ND in zip(self.spec.layers if stored else (), stored, strict=True)
            ],
            **self._crossings(computed_end),
            "trace_error": next((one.failure for one in (self.trace, self.watched) if one is not None), None),
        }

    def _traced(self, count: int) -> list[tuple[Traced, FloatArray]]:
        if self.trace is None or self.trace.failure is not None:
            return []
        return list(zip(self.spec.trace, self.trace.values(0, count)[: len(self.spec.trace)], strict=True))

    def _held(self, count: int) -> list[int | bool | None] | None:
        if self.spec.num_held is None:
            return None
        held: list[int | bool | None] = [None] * self.spec.num_held
        for one in self.spec.held:
            if one.gate >= 0 and self.prompt_sums_G is not None:
                total, threshold = np.float32(self.prompt_sums_G[one.gate]), np.float32(one.threshold)
                held[one.number] = bool(total > threshold if one.is_above else total < threshold)
        if self.trace is not None and self.trace.failure is None:
            values_CN = self.trace.values(0, count)[len(self.spec.trace) :]
            for one, values_N in zip(self.spec.counted, values_CN, strict=True):
                # Where the entry is not, its column holds what an earlier step has left there.
                held[one.number] = sum(int(values_N[part].sum()) for part in one.within(self.spec.first))
        return held

    def _crossings(self, computed_end: int) -> dict[str, list[list[Any]]]:
        told: dict[str, list[list[Any]]] = {"stopped": [], "flags": []}
        if self.watched is not None and self.watched.failure is None:
            first = self.spec.watch_first
            values_CN = self.watched.values(0, max(computed_end - first, 0))
            for one, values_N in zip(self.spec.watch, values_CN.tolist(), strict=True):
                position = WatchRun(one, first).see(first, values_N)
                if position is not None:
                    field = "stopped" if one.is_stop else "flags"
                    told[field].append([one.name, one.layer, position, values_N[position - first]])
        return told

    def _largest(self, one: Traced, values_N: FloatArray) -> list[Any]:
        if not len(values_N):
            return [one.name, one.layer, math.nan, -1]
        at = int(values_N.argmax())  # that of a NaN, if there is one
        return [one.name, one.layer, float(values_N[at]), self.spec.first + at]


class ReadoutStore:
    """Finished readouts by (``Resolved.key``, sample index), bounded in bytes.

    A full store first drops the oldest readouts that were collected already, then the oldest of all.

    Args:
        capacity_bytes: the bound. A single readout is kept even if it is larger.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._fresh: OrderedDict[tuple[str, int], FinishedReadout] = OrderedDict()
        self._collected: OrderedDict[tuple[str, int], FinishedReadout] = OrderedDict()
        self._bytes = 0

    def put(self, request_key: str, index: int, readout: FinishedReadout) -> None:
        """Store a readout, in place of an older one of the same sample."""
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
        """The readout of a sample, or None. It stays in the store for another call while there is room."""
        key = (request_key, index)
        if key in self._fresh:
            self._collected[key] = self._fresh.pop(key)
        return self._collected.get(key)
