"""The persistent device tensors that compiled code and CUDA graphs read.

They are allocated once and only ever written in place: a compiled graph holds the tensors themselves, and a replayed
CUDA graph holds their addresses. Letters of shapes as in ``batch_plan`` and ``ops.reference``.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from vllm_steer.batch_plan import StepPlan
from vllm_steer.ops.dispatch import steer_and_read


class SteerBuffers:
    """All tensors of one worker.

    Args:
        num_layers, hidden_size, max_tokens, max_requests, max_entries, max_directions, trace_columns: L, D, T, R/2, E,
            S, K.
        max_drafts: draft tokens of one request in one step; A = max_requests·(1 + max_drafts), see ``BatchPlanner``.
        device: where the model runs.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        hidden_size: int,
        max_tokens: int,
        max_requests: int,
        max_entries: int,
        max_directions: int,
        trace_columns: int,
        device: torch.device,
        max_drafts: int = 0,
    ) -> None:
        rows, accumulators = 2 * max_requests, max_requests * (1 + max_drafts)

        def table(*shape: int, dtype: torch.dtype, fill: float) -> torch.Tensor:
            return torch.full(shape, fill, dtype=dtype, device=device)

        self.bank_SD = table(max_directions, hidden_size, dtype=torch.float32, fill=0)
        self.row_of_token = table(max_tokens, dtype=torch.int32, fill=-1)
        self.accumulator_of_token = table(max_tokens, dtype=torch.int32, fill=-1)
        self.keep_A = table(accumulators, dtype=torch.float32, fill=1)
        self.last_token_A = table(accumulators, dtype=torch.int32, fill=-1)
        self.flags_L3 = table(num_layers, 3, dtype=torch.int32, fill=0)
        self.entry_slot_LRE = table(num_layers, rows, max_entries, dtype=torch.int32, fill=-1)
        self.entry_ab_LRE2 = table(num_layers, rows, max_entries, 2, dtype=torch.float32, fill=0)
        # One tensor a layer, not views of one: the graph mutates them, and mutated inputs must not share storage.
        shape_AD = (accumulators, hidden_size)
        self.sums_L_AD = [table(*shape_AD, dtype=torch.float32, fill=0) for _ in range(num_layers)]
        self.last_L_AD = [table(*shape_AD, dtype=torch.float32, fill=0) for _ in range(num_layers)]
        self.trace_slot_LK = table(num_layers, trace_columns, dtype=torch.int32, fill=-1)
        # One tensor for all layers, each of which writes the columns that are bound to it: one copy brings a step home.
        self.trace_TK = table(max_tokens, trace_columns, dtype=torch.float32, fill=0)
        self._high_water = 0

    def layer(self, index: int) -> HookPoint:
        """The module that carries the tensors of hooked layer number ``index`` into the traced graph."""
        return HookPoint(self, index)

    def write(self, plan: StepPlan) -> None:
        """Copy a step's tables to the device; what the step does not cover is marked untouched.

        Draft tokens of earlier steps that turned out to be accepted are added to their sums, once a plan.
        """
        if plan.accepted:
            into_N, draft_N = torch.tensor(plan.accepted).T.to(self.keep_A.device, non_blocking=True)
            for sums_AD in self.sums_L_AD:
                sums_AD.index_add_(0, into_N, sums_AD[draft_N])
        tokens = plan.num_tokens
        _copy(self.row_of_token[:tokens], plan.row_of_token_T)
        _copy(self.accumulator_of_token[:tokens], plan.accumulator_of_token_T)
        if tokens < self._high_water:
            # Padding tokens of a graph that is larger than the step must not meet an older step's rows.
            self.row_of_token[tokens : self._high_water] = -1
            self.accumulator_of_token[tokens : self._high_water] = -1
        self._high_water = tokens
        _copy(self.keep_A, plan.keep_A)
        _copy(self.last_token_A, plan.last_token_A)
        _copy(self.flags_L3, plan.flags_L3)
        if plan.entry_slot_LRE is not None and plan.entry_ab_LRE2 is not None:
            _copy(self.entry_slot_LRE, plan.entry_slot_LRE)
            _copy(self.entry_ab_LRE2, plan.entry_ab_LRE2)
        if plan.trace_slot_LK is not None:
            _copy(self.trace_slot_LK, plan.trace_slot_LK)

    def silence(self) -> None:
        """Mark every token untouched, for forward passes that no request stands behind."""
        self.row_of_token.fill_(-1)
        self.accumulator_of_token.fill_(-1)
        self.keep_A.fill_(1)
        self.last_token_A.fill_(-1)
        self.flags_L3.zero_()
        self._high_water = 0

    def write_direction(self, slot: int, vector: npt.NDArray[np.float32]) -> None:
        """Put a direction's (D,) float32 vector into a slot of the bank."""
        _copy(self.bank_SD[slot], np.array(vector, dtype=np.float32))


def _copy(target: torch.Tensor, source: npt.NDArray[np.int32] | npt.NDArray[np.float32]) -> None:
    target.copy_(torch.from_numpy(source), non_blocking=True)


class HookPoint(nn.Module):
    """Sits inside a decoder layer: so the compiler sees its tensors as inputs of the graph and not as constants."""

    def __init__(self, buffers: SteerBuffers, index: int) -> None:
        super().__init__()
        tensors = {
            "bank": buffers.bank_SD,
            "row_of_token": buffers.row_of_token,
            "entry_slot": buffers.entry_slot_LRE[index],
            "entry_ab": buffers.entry_ab_LRE2[index],
            "accumulator_of_token": buffers.accumulator_of_token,
            "keep": buffers.keep_A,
            "last_token": buffers.last_token_A,
            "sums": buffers.sums_L_AD[index],
            "last": buffers.last_L_AD[index],
            "trace_slot": buffers.trace_slot_LK[index],
            "trace": buffers.trace_TK,
            "flags": buffers.flags_L3[index],
        }
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
        """Steer and read the stream hidden + residual, in place in ``hidden``; both (T, D)."""
        steer_and_read(
            hidden, residual, self.bank, self.row_of_token, self.entry_slot, self.entry_ab, self.accumulator_of_token,
            self.keep, self.last_token, self.sums, self.last, self.trace_slot, self.trace, self.flags,
        )  # fmt: skip
