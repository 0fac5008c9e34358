"""The op in Triton: at most two launches per hook, each of which exits at once if there is nothing to do.

``_steer_and_trace`` has one program per token, which holds the token's whole row, and stores it where rows are asked
for. In ``_read`` each program has some accumulators and a block of D, and sums their segments by itself. So a sum has
the same order in all calls with the same number of tokens, whatever else is in the batch, and programs share nothing.
The amount of work is read on the device: a replayed CUDA graph does what the tables say at that time; no shape, grid or
block size depends on the tables.
"""

# Kernels are not Python functions: Triton gives their parameters its own types.
# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false, disallow-untyped-decorators=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vllm_steer.ops.host_flags import asked
from vllm_steer.ops.stream_range import FLOAT16_LIMIT
from vllm_steer.plan import entry_rows, step_plan

RELATIVE = tl.constexpr(entry_rows.RELATIVE)
KEEP_NORM = tl.constexpr(entry_rows.KEEP_NORM)
CLAMP = tl.constexpr(entry_rows.CLAMP)
ABOVE, BELOW = tl.constexpr(entry_rows.ABOVE), tl.constexpr(entry_rows.BELOW)
STORED, PROBE = tl.constexpr(entry_rows.STORED), tl.constexpr(entry_rows.PROBE)
PROMPT, HELD_SHIFT = tl.constexpr(entry_rows.PROMPT), tl.constexpr(entry_rows.HELD_SHIFT)
TRACED, ROWS = tl.constexpr(step_plan.TRACED), tl.constexpr(step_plan.ROWS)
NEEDS_NORM = tl.constexpr(entry_rows.RELATIVE | entry_rows.KEEP_NORM)


PROMPT_BLOCK = tl.constexpr(256)
"""Prompt tokens whose probes are summed at a time."""


class Tiling(NamedTuple):
    """How the work of a call is divided.

    Attributes:
        elements_a_warp: elements of a token's row per warp of ``_steer_and_trace``.
        block_t, block_d: tokens and elements that ``_read`` processes at a time.
        programs: programs of ``_read`` for each block of D. With more of them, an idle hook takes longer to exit.
        warps: warps of each program of ``_read``.
    """

    elements_a_warp: int
    block_t: int
    block_d: int
    programs: int
    warps: int


FEW_TOKENS = 512
"""Up to this many tokens, a step mostly generates; vLLM captures no larger graph by default."""
FEW = Tiling(elements_a_warp=512, block_t=16, block_d=256, programs=128, warps=2)
MANY = Tiling(elements_a_warp=2048, block_t=256, block_d=32, programs=16, warps=4)
"""Measured on an H200: ``FEW`` for many short segments, ``MANY`` for a few long ones, which only narrow blocks spread
over the device."""


@triton.jit
def _steer_and_trace(
    hidden,
    hidden_stride_t,
    hidden_stride_d,
    residual,
    residual_stride_t,
    residual_stride_d,
    bank,
    row_of_token,
    entry_slot,
    slot_stride_r,
    slot_stride_e,
    entry_ab,
    ab_stride_r,
    ab_stride_e,
    entry_mode,
    mode_stride_r,
    mode_stride_e,
    entry_gate,
    entry_threshold,
    probe,
    prompt_sums,
    prompt_part,
    trace_slot,
    trace,
    cut,
    rows,
    flags,
    D: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LIMIT: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)  # 131,072 tokens of 16,384 elements exceed an int32
    depth = tl.load(flags)
    by_token = tl.load(flags + 2)
    traced = by_token & TRACED
    row = tl.load(row_of_token + token)
    steered = False
    if (depth > 0) & (row >= 0):
        # Entries are packed to the left, so a row whose first entry is empty does nothing at this layer.
        steered = tl.load(entry_slot + row.to(tl.int64) * slot_stride_r) >= 0
    stored = 0
    if HAS_ROWS:
        stored = by_token & ROWS
    if (not steered) & (traced == 0) & (stored == 0):
        return

    slots = entry_slot + row.to(tl.int64) * slot_stride_r
    coefficients = entry_ab + row.to(tl.int64) * ab_stride_r
    modes = entry_mode + row.to(tl.int64) * mode_stride_r
    gates = entry_gate + row.to(tl.int64) * mode_stride_r
    thresholds = entry_threshold + row.to(tl.int64) * mode_stride_r
    projections = traced + stored  # how many to compute; a norm and a stored row count too
    if steered:
        for entry in range(depth):
            b = tl.load(coefficients + entry * ab_stride_e + 1)
            mode = tl.load(modes + entry * mode_stride_e)
            if (tl.load(slots + entry * slot_stride_e) >= 0) & ((b != 0) | (mode != 0)):
                projections += 1

    column = tl.arange(0, BLOCK_D)
    within = column < D
    hidden_at = hidden + token * hidden_stride_t + column.to(tl.int64) * hidden_stride_d
    own = tl.load(hidden_at, mask=within, other=0.0).to(tl.float32)
    stream = own
    if HAS_RESIDUAL:
        residual_at = residual + token * residual_stride_t + column.to(tl.int64) * residual_stride_d
        is_needed = projections > 0
        if hidden.dtype.element_ty == tl.float16:
            is_needed = is_needed | steered  # the limit applies to the stream too
        needed = tl.where(is_needed, D, 0)
        beside = tl.load(residual_at, mask=column < needed, other=0.0).to(tl.float32)
        stream = own + beside

    if steered:
        delta = tl.zeros([BLOCK_D], dtype=tl.float32)
        for entry in range(depth):
            slot = tl.load(slots + entry * slot_stride_e)
            if slot >= 0:
                direction = tl.load(bank + slot.to(tl.int64) * D + column, mask=within, other=0.0)
                factor = tl.load(coefficients + entry * ab_stride_e)
                b = tl.load(coefficients + entry * ab_stride_e + 1)
                mode = tl.load(modes + entry * mode_stride_e)
                norm = 1.0
                if (mode & NEEDS_NORM) != 0:
                    norm = tl.sqrt_rn(tl.sum((stream + delta) * (stream + delta), axis=0))
                unit = norm if (mode & RELATIVE) != 0 else 1.0
                factor *= unit
                if (b != 0) | ((mode & CLAMP) != 0):
                    projection = tl.sum((stream + delta) * direction, axis=0)
                    if (mode & CLAMP) != 0:
                        # By comparisons, which fail for the NaN of an infinite bound at a stream of length 0.
                        high = b * unit
                        above = tl.where(projection > high, high - projection, 0.0)
                        factor = tl.where(projection < factor, factor - projection, above)
                    else:
                        factor += b * projection
                is_on = (mode & PROBE) == 0
                if (mode & (ABOVE | BELOW | PROBE)) != 0:
                    gate = tl.load(gates + entry * mode_stride_e)
                    threshold = tl.load(thresholds + entry * mode_stride_e)
                    if (mode & PROBE) != 0:
                        tl.store(probe + token * G + gate, tl.sum((stream + delta) * direction, axis=0))
                    else:
                        seen = 0.0
                        if (mode & PROMPT) != 0:
                            seen = tl.load(prompt_sums + gate)
                            first = tl.load(prompt_part + 2 * (gate // G)).to(tl.int64)
                            count = tl.load(prompt_part + 2 * (gate // G) + 1)
                            for start in range(0, count, PROMPT_BLOCK):
                                index = start + tl.arange(0, PROMPT_BLOCK)
                                stored_at = probe + (first + index) * G + gate % G
                                seen += tl.sum(tl.load(stored_at, mask=index < count, other=0.0), axis=0)
                        elif (mode & STORED) != 0:
                            seen = tl.load(probe + token * G + gate)
                        else:
                            other = tl.load(bank + gate.to(tl.int64) * D + column, mask=within, other=0.0)
                            seen = tl.sum((stream + delta) * other, axis=0)
                        is_on = (((mode & ABOVE) == 0) | (seen > threshold)) & (
                            ((mode & BELOW) == 0) | (seen < threshold)
                        )
                        if (mode >> HELD_SHIFT) > 0:
                            tl.store(trace + token * K + (mode >> HELD_SHIFT) - 1, tl.where(is_on, 1.0, 0.0))
                    factor = tl.where(is_on, factor, 0.0)
                delta += factor * direction
                if ((mode & KEEP_NORM) != 0) & is_on:
                    after = tl.sqrt_rn(tl.sum((stream + delta) * (stream + delta), axis=0))
                    if after > 0:
                        delta = (stream + delta) * (norm / after) - stream
        new = own + delta
        if hidden.dtype.element_ty == tl.float16:
            # Selected by comparisons, which NaN always fails, as in the reference.
            most = tl.where(own > LIMIT, own, LIMIT)
            least = tl.where(own < -LIMIT, own, -LIMIT)
            if HAS_RESIDUAL:
                most_of_stream = tl.where(stream > LIMIT, stream, LIMIT) - beside
                least_of_stream = tl.where(stream < -LIMIT, stream, -LIMIT) - beside
                most = tl.where(most_of_stream < most, most_of_stream, most)
                least = tl.where(least_of_stream > least, least_of_stream, least)
            is_over, is_under = new > most, new < least
            new = tl.where(is_over, most, tl.where(is_under, least, new))
            if tl.max(((is_over | is_under) & within).to(tl.int32), axis=0) != 0:
                tl.store(cut + row, 1)
        rounded = new.to(hidden.dtype.element_ty)
        tl.store(hidden_at, rounded, mask=within)
        stream = rounded.to(tl.float32)
        if HAS_RESIDUAL:
            stream += beside

    if traced != 0:
        for k in range(K):
            slot = tl.load(trace_slot + k)
            if slot >= 0:
                direction = tl.load(bank + slot.to(tl.int64) * D + column, mask=within, other=0.0)
                tl.store(trace + token * K + k, tl.sum(stream * direction, axis=0))
    if HAS_ROWS:  # noqa: SIM102  # a constant; without it nothing of this is compiled
        if stored != 0:
            tl.store(rows + token * D + column, stream, mask=within)


@triton.jit
def _read(
    hidden,
    hidden_stride_t,
    hidden_stride_d,
    residual,
    residual_stride_t,
    residual_stride_d,
    keep,
    segment,
    sums,
    last,
    flags,
    D: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    used = tl.load(flags + 1)
    if used == 0:
        return
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    within = column < D
    hidden_column = hidden + column.to(tl.int64) * hidden_stride_d
    residual_column = residual + column.to(tl.int64) * residual_stride_d
    for accumulator in range(tl.program_id(0), used, tl.num_programs(0)):
        first = tl.load(segment + 2 * accumulator).to(tl.int64)
        count = tl.load(segment + 2 * accumulator + 1)
        kept_at = tl.load(keep + accumulator)
        is_kept = kept_at > 0
        if (count > 0) | (is_kept == 0):
            row = tl.where(kept_at < 0, -kept_at, accumulator)
            at = row.to(tl.int64) * D + column
            total = tl.zeros([BLOCK_D], dtype=tl.float32)
            if count > 0:
                token = first + count - 1
                end = tl.load(hidden_column + token * hidden_stride_t, mask=within, other=0.0).to(tl.float32)
                if HAS_RESIDUAL:
                    beside = tl.load(residual_column + token * residual_stride_t, mask=within, other=0.0)
                    end += beside.to(tl.float32)
                tl.store(last + at, end, mask=within)
                total = end
            if count > 1:  # otherwise, as in most steps, the segment is one token
                total = tl.zeros([BLOCK_D], dtype=tl.float32)
                for start in range(0, count, BLOCK_T):
                    index = start + tl.arange(0, BLOCK_T)
                    token = (first + index)[:, None]
                    mask = (index < count)[:, None] & within[None, :]
                    stream = tl.load(hidden_column[None, :] + token * hidden_stride_t, mask=mask, other=0.0)
                    stream = stream.to(tl.float32)
                    if HAS_RESIDUAL:
                        beside = tl.load(residual_column[None, :] + token * residual_stride_t, mask=mask, other=0.0)
                        stream += beside.to(tl.float32)
                    total += tl.sum(stream, axis=0)
            # Selected, not multiplied: NaN times zero is NaN.
            kept = tl.where(is_kept, tl.load(sums + at, mask=within, other=0.0), 0.0)
            tl.store(sums + at, kept + total, mask=within)


def steer_and_read(
    hidden_TD: torch.Tensor,
    residual_TD: torch.Tensor | None,
    bank_SD: torch.Tensor,
    row_of_token: torch.Tensor,
    entry_slot_RE: torch.Tensor,
    entry_ab_RE2: torch.Tensor,
    entry_mode_RE: torch.Tensor,
    entry_gate_RE: torch.Tensor,
    entry_threshold_RE: torch.Tensor,
    probe_TG: torch.Tensor,
    prompt_sums_MG: torch.Tensor,
    prompt_part_M2: torch.Tensor,
    keep_A: torch.Tensor,
    segment_A2: torch.Tensor,
    sums_AD: torch.Tensor,
    last_AD: torch.Tensor,
    trace_slot_K: torch.Tensor,
    trace_TK: torch.Tensor,
    cut_R: torch.Tensor,
    rows_TD: torch.Tensor,
    flags_4: torch.Tensor,
) -> None:
    """The op on CUDA; see ``reference.steer_and_read``.

    All tensors but the stream and the entries must be contiguous, as in ``SteerBuffers``; modes, gates and thresholds
    of the entries must have the same strides.
    """
    tokens, dimension = hidden_TD.shape
    if tokens == 0:
        return
    beside_TD = hidden_TD if residual_TD is None else residual_TD
    tiling = FEW if tokens <= FEW_TOKENS else MANY
    is_touched, is_read = asked(flags_4)
    if is_touched:
        block = triton.next_power_of_2(dimension)
        _steer_and_trace[(tokens,)](
            hidden_TD, *hidden_TD.stride(), beside_TD, *beside_TD.stride(), bank_SD, row_of_token,
            entry_slot_RE, *entry_slot_RE.stride(), entry_ab_RE2, *entry_ab_RE2.stride()[:2],
            entry_mode_RE, *entry_mode_RE.stride(), entry_gate_RE, entry_threshold_RE, probe_TG, prompt_sums_MG,
            prompt_part_M2, trace_slot_K, trace_TK, cut_R, rows_TD, flags_4, D=dimension, K=trace_slot_K.shape[0],
            G=probe_TG.shape[1], HAS_RESIDUAL=residual_TD is not None, HAS_ROWS=len(rows_TD) > 0, BLOCK_D=block,
            LIMIT=FLOAT16_LIMIT,
            num_warps=min(max(block // tiling.elements_a_warp, 1), 16),
        )  # fmt: skip
    if is_read:
        _read[(min(len(keep_A), tiling.programs), triton.cdiv(dimension, tiling.block_d))](
            hidden_TD, *hidden_TD.stride(), beside_TD, *beside_TD.stride(), keep_A, segment_A2, sums_AD, last_AD,
            flags_4, D=dimension, HAS_RESIDUAL=residual_TD is not None, BLOCK_T=tiling.block_t,
            BLOCK_D=tiling.block_d, num_warps=tiling.warps,
        )  # fmt: skip
