"""The persistent device tensors that compiled code and CUDA graphs read.

They are allocated once and only written in place, because a compiled graph holds the tensors themselves and a replayed
CUDA graph holds their addresses. Letters of shapes as in ``batch_plan`` and ``ops.reference``.

The tables of a step are packed into one int32 tensor, those that change most often first. One copy of its beginning
brings all changes to the device::

    accepted drafts | keep | segments | flags | trace slots | row of token | parts of prompts | entries, row by row
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.functional import embedding_bag

from vllm_steer.device.staging import ring_for
from vllm_steer.ops.dispatch import connect, steer_and_read
from vllm_steer.ops.host_flags import HostFlags
from vllm_steer.ops.layer_tables import LayerTables
from vllm_steer.plan.block_sums import MOST_SEGMENTS
from vllm_steer.plan.entry_rows import MOST_PROBES
from vllm_steer.plan.step_plan import VERSION, IntArray, PromptPart, StepPlan

_CHANGES = itertools.count()
"""Numbers the versions of all tables in this process."""
_VECTORS_A_COPY = 1024  # bounds the memory of a copy to the device


class SteerBuffers:
    """All tensors of one worker.

    Args:
        num_layers, hidden_size, max_tokens, max_entries, max_directions, trace_columns: L, D, T, E, S, K.
        max_requests, max_windows: R = max_requests·max_windows.
        max_drafts: draft tokens of one request in one step; A = max_requests·(1 + max_drafts), see ``BatchPlanner``.
        device: where the model runs.
        has_rows: whether rows can be stored.
        can_cut: whether the residual stream is float16, which the op may have to clip.
        num_blocks: KV blocks whose sums are kept, see ``block_sums``.

    Attributes:
        bank_SD: (S, D) float32, the directions.
        row_of_token, keep_A, segment_A2, trace_slot_LK: int32 tables, see ``StepPlan``.
        flags_L4: (L, 4) int32, see ``ops.reference``.
        entry_slot_LRE, entry_ab_LRE2, entry_mode_LRE, entry_gate_LRE, entry_threshold_LRE: the entry table; slots,
            modes and gates are int32, the others float32.
        probe_TG: (T, G) float32, the projections that probes store for conditions at later layers.
        prompt_sums_MG: (M, G) float32, the sums over the prompts of what their probes stored, up to the last step.
        prompt_part_M2: int32, the first token and the number of tokens of each prompt's part of this step.
        sums_L_AD, last_L_AD: for each layer (A + num_blocks, D) float32, the sums and the last tokens of the
            accumulators, and behind them those of KV blocks.
        trace_TK: (T, K) float32, the traced projections.
        rows_L_TD: for each layer (T, D) float32, the stored rows of the step; (0, D) without ``has_rows``.
        cut_R: (R,) int32, 1 for rows whose stream was clipped.
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
        max_windows: int = 2,
        can_cut: bool = False,
        has_rows: bool = False,
        num_blocks: int = 0,
    ) -> None:
        self.can_cut = can_cut
        rows, accumulators = max_windows * max_requests, max_requests * (1 + max_drafts)
        segments = accumulators + min(num_blocks, MOST_SEGMENTS)

        def floats(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        packer = _Packer()
        self._accepted = packer.table(max_requests * max_drafts, 2, fill=0)
        self._keep = packer.table(segments, fill=1)
        self._segment = packer.table(segments, 2, fill=0)
        self._flags = packer.table(num_layers, _aligned(VERSION + 1), fill=0)
        self._trace_slot = packer.table(num_layers, _aligned(trace_columns), fill=-1)
        self._row = packer.table(max_tokens, fill=-1)
        self._prompt_part = packer.table(max_requests, 2, fill=0)
        # Rows are written before they are read.
        self._entry = packer.table(rows, num_layers, 8 * max_entries, fill=-1)
        packed = packer.pack(device)
        # The tables as the device has them after all queued copies. On a CPU it is the same memory.
        self._image = packed.numpy() if device.type == "cpu" else packed.numpy(force=True).copy()
        self._packed, self._ring = packed, ring_for(device, len(packed))
        self._num_changed = 0
        self._high_water = 0
        self._segments_high_water = accumulators
        self._nothing = StepPlan.blank(num_layers, accumulators)
        self._written: StepPlan | None = None
        self._to_sum: list[PromptPart] = []
        self._parked: dict[str, torch.Tensor] = {}

        self.bank_SD = floats(max_directions, hidden_size)
        self.keep_A, self.segment_A2 = self._keep.of(packed), self._segment.of(packed)
        self.flags_L4 = self._flags.of(packed)
        self._host_flags = HostFlags(self.flags_L4, self._flags.of(self._image))
        self.trace_slot_LK = self._trace_slot.of(packed)[:, :trace_columns]
        self.row_of_token = self._row.of(packed)
        entry_LRE8 = self._entry.of(packed).unflatten(2, (max_entries, 8)).transpose(0, 1)
        self.entry_slot_LRE, self.entry_mode_LRE, self.entry_gate_LRE = (entry_LRE8[..., at] for at in (0, 3, 4))
        floats_LRE8 = entry_LRE8.view(torch.float32)
        self.entry_ab_LRE2, self.entry_threshold_LRE = floats_LRE8[..., 1:3], floats_LRE8[..., 5]
        self.probe_TG = floats(max_tokens, MOST_PROBES)
        self.prompt_sums_MG = floats(max_requests, MOST_PROBES)
        self.prompt_part_M2 = self._prompt_part.of(packed)
        self.sums_L_AD, self.last_L_AD = (
            [
                torch.empty(accumulators + num_blocks, hidden_size, dtype=torch.float32, device=device)
                for _ in range(num_layers)
            ]
            for _ in range(2)
        )
        for rows_AD in (*self.sums_L_AD, *self.last_L_AD):
            rows_AD[:accumulators] = 0  # rows of blocks are written before they are read
        # One tensor for all layers; each writes only its own columns. So one copy fetches the traces of a step.
        self.trace_TK = floats(max_tokens, trace_columns)
        self.rows_L_TD = [floats(max_tokens if has_rows else 0, hidden_size) for _ in range(num_layers)]
        # The op sets 1 at the rows of requests whose stream it clipped. A newly assigned row begins at 0.
        self.cut_R = torch.zeros(rows, dtype=torch.int32, device=device)
        connect(self, [self._tables_of(index) for index in range(num_layers)])

    def layer(self, index: int) -> HookPoint:
        """The module that carries the tensors of hooked layer number ``index`` into the traced graph."""
        return HookPoint(self, index)

    def _tables_of(self, index: int) -> LayerTables:
        return LayerTables(
            bank_SD=self.bank_SD,
            row_of_token=self.row_of_token,
            entry_slot_RE=self.entry_slot_LRE[index],
            entry_ab_RE2=self.entry_ab_LRE2[index],
            entry_mode_RE=self.entry_mode_LRE[index],
            entry_gate_RE=self.entry_gate_LRE[index],
            entry_threshold_RE=self.entry_threshold_LRE[index],
            probe_TG=self.probe_TG,
            prompt_sums_MG=self.prompt_sums_MG,
            prompt_part_M2=self.prompt_part_M2,
            keep_A=self.keep_A,
            segment_A2=self.segment_A2,
            sums_AD=self.sums_L_AD[index],
            last_AD=self.last_L_AD[index],
            trace_slot_K=self.trace_slot_LK[index],
            trace_TK=self.trace_TK,
            cut_R=self.cut_R,
            rows_TD=self.rows_L_TD[index],
            flags_4=self.flags_L4[index],
        )

    def write(self, plan: StepPlan | None) -> None:
        """Copy a step's tables to the device, in at most one copy; tokens beyond the step are marked untouched.

        Accepted draft tokens of earlier steps are added to their sums, once per plan; so are the parts of prompts that
        the last step computed.

        Args:
            plan: None for an idle step after an idle step.
        """
        self._host_flags.is_step = True
        if self._to_sum:
            self._sum_prompts()
        if plan is None or plan is self._written:  # a steady decode has one plan for all its steps
            return
        self._written = plan
        if plan.accepted:
            self._put(self._accepted, np.array(plan.accepted, np.int32))
        self._put(self._keep, plan.keep_A)
        self._put(self._segment, plan.segment_A2)
        stale = self._segments_high_water - len(plan.keep_A)
        if stale > 0:  # segments of blocks of an older step
            self._put(self._keep, np.ones(stale, np.int32), at=len(plan.keep_A))
            self._put(self._segment, np.zeros((stale, 2), np.int32), at=len(plan.keep_A))
        self._segments_high_water = len(plan.keep_A)
        self._put(self._flags, plan.flags_L3)
        if plan.trace_slot_LK is not None:
            self._put(self._trace_slot, plan.trace_slot_LK)
        self._put(self._row, plan.row_of_token_T)
        if plan.num_tokens < self._high_water:
            # Padding tokens of a graph that is larger than the step must not use rows of an older step.
            self._put(self._row, np.full(self._high_water - plan.num_tokens, -1, np.int32), at=plan.num_tokens)
        self._high_water = plan.num_tokens
        if plan.prompt_parts or plan.parked or plan.returned:
            self._begin_prompts(plan)
        if plan.new_rows and self.can_cut:
            self.cut_R.zero_()
        for row, row_LE8 in plan.new_rows:
            self._put(self._entry, row_LE8.reshape(1, len(row_LE8), -1), at=row)
        if self._num_changed:
            self._flags.of(self._image)[:, VERSION] = next(_CHANGES) % np.iinfo(np.int32).max + 1
            self._num_changed = max(self._num_changed, self._flags.end_of(self._flags.shape[0]))
            if self._ring is not None:
                self._ring.send(self._image[: self._num_changed], self._packed)
        self._num_changed = 0
        if plan.accepted:
            into_N, draft_N = self._accepted.of(self._packed)[: len(plan.accepted)].unbind(1)
            for sums_AD in self.sums_L_AD:
                sums_AD.index_add_(0, into_N, sums_AD[draft_N])
        if plan.loaded:
            self._load(plan.loaded)

    def _load(self, loaded: Sequence[tuple[int, tuple[int, ...]]]) -> None:
        """Assign to accumulators the sums of rows of blocks, and the last of the rows of last tokens. Never waits."""
        ends = list(itertools.accumulate(len(rows) for _, rows in loaded))
        numbers = [accumulator for accumulator, _ in loaded] + [0, *ends[:-1]] + [rows[-1] for _, rows in loaded]
        numbers += [row for _, rows in loaded for row in rows]
        on_device = torch.tensor(numbers).to(self.keep_A.device, non_blocking=True)
        into_N, offset_N, last_N, row_M = on_device.split([len(loaded)] * 3 + [ends[-1]])
        for sums_AD, last_AD in zip(self.sums_L_AD, self.last_L_AD, strict=True):
            sums_AD[into_N] = embedding_bag(row_M, sums_AD, offset_N, mode="sum")
            last_AD[into_N] = last_AD[last_N]

    def sums_of_prompt(self, place: int) -> torch.Tensor:
        """(G,) float32 on the device, a copy of one row of ``prompt_sums_MG`` after the last forward pass."""
        self._sum_prompts()
        return self.prompt_sums_MG[place].clone()

    def forget(self, request_id: str) -> None:
        """Drop the sums that were put aside for a request which has ended."""
        self._parked.pop(request_id, None)

    def silence(self) -> None:
        """Mark every token untouched, for forward passes without requests."""
        self.write(self._nothing)
        self._host_flags.is_step = False

    def write_directions(self, slots: Sequence[int], vectors_ND: npt.NDArray[np.float32]) -> None:
        """Write (N, D) float32 vectors into N slots of the bank, many in one copy to the device."""
        device = self.bank_SD.device
        slot_N = torch.tensor(slots, dtype=torch.int64)
        for start in range(0, len(slots), _VECTORS_A_COPY):
            some = slice(start, start + _VECTORS_A_COPY)
            # A copy, because PyTorch warns of memory that is read-only, as that of a message is.
            vectors = torch.from_numpy(np.array(vectors_ND[some], dtype=np.float32))
            self.bank_SD.index_copy_(0, slot_N[some].to(device), vectors.to(device))

    def _begin_prompts(self, plan: StepPlan) -> None:
        """Prepare the sums over prompts of which this step computes a part, or which are put aside or come back."""
        for request_id, place in plan.parked:
            self._parked[request_id] = self.prompt_sums_MG[place].clone()
        for request_id, place in plan.returned:
            self.prompt_sums_MG[place] = self._parked.pop(request_id)
        part_M2 = np.zeros(self._prompt_part.shape, np.int32)
        for part in plan.prompt_parts:
            part_M2[part.place] = part.token, part.count
            if part.is_first:
                self.prompt_sums_MG[part.place].zero_()
        self._put(self._prompt_part, part_M2)
        self._to_sum = plan.prompt_parts

    def _sum_prompts(self) -> None:
        """Add what the probes of the last step stored to the sums over its prompts, each part in one order."""
        for part in self._to_sum:
            self.prompt_sums_MG[part.place] += self.probe_TG[part.token : part.token + part.count].sum(dim=0)
        self._to_sum = []
        self._put(self._prompt_part, np.zeros(self._prompt_part.shape, np.int32))

    def _put(self, table: _Table, values: IntArray, at: int = 0) -> None:
        """Write rows of a table from ``at`` on, as wide as ``values``, and note how much to copy to the device."""
        rows = table.of(self._image)[at : at + len(values)]
        if values.ndim > 1:
            rows = rows[..., : values.shape[-1]]
        if not (rows == values).all():
            rows[...] = values
            self._num_changed = max(self._num_changed, table.end_of(at + len(values)))


@dataclass
class _Table:
    """One table's place in the packed tensor."""

    start: int
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        self.size = math.prod(self.shape)

    def of(self, packed: Any) -> Any:
        """The table as a view of the packed tensor, or of its NumPy image."""
        return packed[self.start : self.start + self.size].reshape(self.shape)

    def end_of(self, rows: int) -> int:
        """Offset at which the first ``rows`` rows of the table end."""
        return self.start + rows * (self.size // self.shape[0])


class _Packer:
    """Packs tables into one tensor, one after another."""

    def __init__(self) -> None:
        self._filled: list[tuple[_Table, int]] = []
        self._end = 0

    def table(self, *shape: int, fill: int) -> _Table:
        table = _Table(self._end, shape)
        self._filled.append((table, fill))
        self._end += _aligned(table.size)
        return table

    def pack(self, device: torch.device) -> torch.Tensor:
        packed = torch.zeros(self._end, dtype=torch.int32)
        for table, fill in self._filled:
            table.of(packed).fill_(fill)
        return packed.to(device)


def _aligned(num_elements: int) -> int:
    """Round up to 16 bytes, the alignment that compilers check for in a view, so that the next table is aligned."""
    return -(-num_elements // 4) * 4


class HookPoint(nn.Module):
    """Submodule of a decoder layer, so that the compiler sees the layer's flags as a graph input and not as a constant.

    Args:
        buffers: the worker's tensors.
        index: number of the hooked layer.
    """

    flags: torch.Tensor

    def __init__(self, buffers: SteerBuffers, index: int) -> None:
        super().__init__()
        self._owner = buffers  # the op finds a layer's tables for as long as these live
        self.register_buffer("flags", buffers.flags_L4[index], persistent=False)

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
        """Steer the stream hidden + residual, both (T, D), in place in ``hidden``, and read it."""
        steer_and_read(hidden, residual, self.flags)
