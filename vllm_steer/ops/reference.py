"""The specification of the op, in plain torch: any device, no host sync, no data-dependent shape.

As a loop, with every number in float32::

    for t in range(T):
        h = hidden[t] + residual[t]
        if row_of_token[t] >= 0:
            for e in range(E):                                  # in the order of the entries
                slot, (a, b) = entry_slot[row_of_token[t], e], entry_ab[row_of_token[t], e]
                mode = entry_mode[row_of_token[t], e]           # bits, see ``plan.entry_rows``
                if slot >= 0:
                    before, p = norm(h), dot(h, bank[slot])
                    if mode & PROBE:
                        probe[t, entry_gate[row_of_token[t], e]] = p
                        continue
                    if mode & (ABOVE | BELOW):
                        gate, threshold = entry_gate[row_of_token[t], e], entry_threshold[row_of_token[t], e]
                        if mode & PROMPT:                       # over the prompt: of earlier steps, and of this one
                            (first, count), g = prompt_part[gate // G], gate % G
                            w = prompt_sums[gate // G, g] + sum(probe[first:first + count, g])
                        else:
                            w = probe[t, gate] if mode & STORED else dot(h, bank[gate])
                        holds = w > threshold if mode & ABOVE else w < threshold
                        if mode >> HELD_SHIFT:                  # a column of its own
                            trace[t, (mode >> HELD_SHIFT) - 1] = 1 if holds else 0
                        if not holds:
                            continue
                    unit = before if mode & RELATIVE else 1
                    if mode & CLAMP:
                        c = a * unit - p if p < a * unit else b * unit - p if p > b * unit else 0
                    else:
                        c = a * unit + b * p
                    h += c * bank[slot]
                    if mode & KEEP_NORM and norm(h) > 0:
                        h *= before / norm(h)
            new = hidden[t] + (h - (hidden[t] + residual[t]))
            if hidden's dtype is float16 and any element of new is not within(new, hidden[t], residual[t]):
                new, cut[row_of_token[t]] = within(new, hidden[t], residual[t]), 1
            hidden[t] = new                                     # rounded once, to hidden's dtype
            h = hidden[t] + residual[t]                         # reads see what the next layer gets
    for s in range(A):
        row = s if keep[s] >= 0 else -keep[s]                   # the sum of a KV block has a row of its own
        if keep[s] <= 0:
            sums[row] = 0                                       # assigned: a NaN or inf must not outlive its request
        first, count = segment[s]
        for t in range(first, first + count):
            sums[row] += h[t]
        if count > 0:
            last[row] = h[first + count - 1]
    for t, k with trace_slot[k] >= 0:
        trace[t, k] = dot(h[t], bank[trace_slot[k]])
    if flags[TRACE] & ROWS and rows is not empty:
        for t in range(T):
            rows[t] = h[t]

``within`` keeps new and new + residual inside ± FLOAT16_LIMIT. An element of hidden, or of hidden + residual, that is
already beyond the limit can only move towards zero. NaN and infinity from the model itself stay as they are.

Shapes: T tokens of this call (at most as many as the token tables hold), D hidden size, S bank slots, R rows, E
entries, G probes, M prompts, A accumulators, K trace columns. ``rows`` has as many rows as the token tables, or none.
``hidden`` and ``residual`` are float32, bfloat16 or float16 with any strides. The tables and ``cut`` are int32, all
other tensors float32. Segments and the parts of prompts lie within the T tokens. Segments with keep >= 0 do not overlap
each other, nor do those with keep < 0. ``sums`` and ``last`` have A rows or more; keep < 0 names one of them, each at
most once. Entries of a row are packed to the left. The probes that ``prompt_part`` names for an entry with ``PROMPT``
were stored by earlier calls of the same forward pass, so no call writes what it also sums.

``flags`` holds four numbers: the most entries of a row of this step, how many of the first segments are in use (0 if
nothing is summed), what is done for each token (``TRACED``, ``ROWS`` or both), and a process-unique version of the
tables, these three numbers included; 0 means unknown. Fast paths may skip work that the flags rule out, and may cache
the work for tables of one version. The reference ignores all flags but ``ROWS``.
"""

from __future__ import annotations

import torch

from vllm_steer.ops.stream_range import FLOAT16_LIMIT
from vllm_steer.plan.entry_rows import ABOVE, BELOW, CLAMP, HELD_SHIFT, KEEP_NORM, PROBE, PROMPT, RELATIVE, STORED
from vllm_steer.plan.step_plan import ROWS, TRACE


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
    """Steer ``hidden_TD`` in place, then sum and trace the stream; the module docstring has the loop and the shapes."""
    tokens, dimension = hidden_TD.shape
    stream_TD = hidden_TD.float()
    if residual_TD is not None:
        stream_TD = stream_TD + residual_TD.float()

    row_T = row_of_token[:tokens].long()
    slot_TE = entry_slot_RE[row_T.clamp(min=0)].long()
    slot_TE = torch.where((row_T >= 0)[:, None], slot_TE, -1)
    ab_TE2, mode_TE = entry_ab_RE2[row_T.clamp(min=0)], entry_mode_RE[row_T.clamp(min=0)]
    gate_TE, threshold_TE = entry_gate_RE[row_T.clamp(min=0)].long(), entry_threshold_RE[row_T.clamp(min=0)]
    summed = _summed_over_prompts(probe_TG[:tokens], prompt_sums_MG, prompt_part_M2).flatten()
    delta_TD = torch.zeros_like(stream_TD)
    for entry in range(slot_TE.shape[1]):
        direction_TD = bank_SD[slot_TE[:, entry].clamp(min=0)]
        before_TD, mode_T = stream_TD + delta_TD, mode_TE[:, entry]
        gate_T = gate_TE[:, entry].clamp(min=0)
        seen_T = (before_TD * bank_SD[gate_T.clamp(max=len(bank_SD) - 1)]).sum(dim=1)
        place_T = gate_T.clamp(max=probe_TG.shape[1] - 1)
        seen_T = torch.where((mode_T & STORED) != 0, probe_TG[:tokens].gather(1, place_T[:, None])[:, 0], seen_T)
        seen_T = torch.where((mode_T & PROMPT) != 0, summed[gate_T.clamp(max=len(summed) - 1)], seen_T)
        threshold_T = threshold_TE[:, entry]
        is_off_T = ((mode_T & ABOVE) != 0) & ~(seen_T > threshold_T)
        is_off_T = is_off_T | (((mode_T & BELOW) != 0) & ~(seen_T < threshold_T)) | ((mode_T & PROBE) != 0)
        norm_T = before_TD.norm(dim=1)
        unit_T = torch.where((mode_T & RELATIVE) != 0, norm_T, 1.0)
        projection_T = (before_TD * direction_TD).sum(dim=1)
        a_T, b_T = ab_TE2[:, entry].unbind(1)
        # Selected by comparisons, which NaN always fails: no bound is infinity, and a stream of length 0 makes it NaN.
        lowered_T = torch.where(projection_T > b_T * unit_T, b_T * unit_T - projection_T, 0.0)
        clamped_T = torch.where(projection_T < a_T * unit_T, a_T * unit_T - projection_T, lowered_T)
        coefficient_T = torch.where((mode_T & CLAMP) != 0, clamped_T, a_T * unit_T + b_T * projection_T)
        is_off_T = is_off_T | (slot_TE[:, entry] < 0)
        if trace_TK.shape[1]:
            column_T = (torch.where(slot_TE[:, entry] >= 0, mode_T, 0) >> HELD_SHIFT) - 1
            held_TK = trace_TK[:tokens].scatter(1, column_T.clamp(min=0).long()[:, None], (~is_off_T)[:, None].float())
            trace_TK[:tokens] = torch.where((column_T >= 0)[:, None], held_TK, trace_TK[:tokens])
        coefficient_T = torch.where(is_off_T, 0.0, coefficient_T)
        is_probe_T1 = (((mode_T & PROBE) != 0) & (slot_TE[:, entry] >= 0))[:, None]
        stored_TG = probe_TG[:tokens].scatter(1, place_T[:, None], projection_T[:, None])
        probe_TG[:tokens] = torch.where(is_probe_T1, stored_TG, probe_TG[:tokens])
        delta_TD = delta_TD + coefficient_T[:, None] * direction_TD
        after_T = (stream_TD + delta_TD).norm(dim=1)
        is_kept_T = ((mode_T & KEEP_NORM) != 0) & ~is_off_T & (after_T > 0)
        kept_TD = (stream_TD + delta_TD) * (norm_T / after_T)[:, None] - stream_TD
        delta_TD = torch.where(is_kept_T[:, None], kept_TD, delta_TD)
    steered_T1 = (slot_TE >= 0).any(dim=1)[:, None]
    own_TD = hidden_TD.float()
    new_TD = own_TD + delta_TD
    if hidden_TD.dtype == torch.float16:
        beside_TD = torch.zeros_like(own_TD) if residual_TD is None else residual_TD.float()
        new_TD, is_cut_T = within_limit(new_TD, own_TD, beside_TD)
        cut_R.index_add_(0, row_T.clamp(min=0), (is_cut_T & steered_T1[:, 0]).int()).clamp_(max=1)
    hidden_TD.copy_(torch.where(steered_T1, new_TD.to(hidden_TD.dtype), hidden_TD))
    stream_TD = hidden_TD.float() if residual_TD is None else hidden_TD.float() + residual_TD.float()

    first_A, count_A = segment_A2.long().unbind(1)
    accumulators = len(keep_A)
    number_A = torch.arange(accumulators, device=keep_A.device) - accumulators
    is_block_A1 = (keep_A < 0)[:, None]
    # Each segment adds its number at its first token and subtracts it after its last one, so the running total is the
    # accumulator of each token. Tokens that are not read go to one extra accumulator, which is discarded, so no shape
    # depends on the data.
    added = sums_AD.new_zeros(accumulators + 1, dimension)
    for is_one_A in (keep_A >= 0, keep_A < 0):
        own_A = torch.where((count_A > 0) & is_one_A, number_A, 0)
        ends_T = own_A.new_zeros(tokens + 1).index_add_(0, first_A, own_A)
        accumulator_T = ends_T.index_add_(0, first_A + count_A, -own_A).cumsum(0)[:tokens] + accumulators
        added.index_add_(0, accumulator_T, stream_TD)
    last_token_A = (first_A + count_A - 1).clamp(min=0)
    kept_AD = torch.where(keep_A[:, None] > 0, sums_AD[:accumulators], 0.0)
    for rows, new_AD, is_new_A1 in (
        (sums_AD, kept_AD + added[:accumulators], torch.ones_like(is_block_A1)),
        (last_AD, stream_TD[last_token_A], (count_A > 0)[:, None]),
    ):
        rows[:accumulators] = torch.where(~is_block_A1 & is_new_A1, new_AD, rows[:accumulators])
        # Accumulators that are not of a block all write row 0, as it is.
        row_A = torch.where(keep_A < 0, -keep_A.long(), 0)
        rows.index_copy_(0, row_A, torch.where(is_block_A1 & is_new_A1, new_AD, rows[row_A]))

    if trace_slot_K.shape[0]:
        traced_TK = stream_TD @ bank_SD[trace_slot_K.long().clamp(min=0)].T
        trace_TK[:tokens] = torch.where((trace_slot_K >= 0)[None, :], traced_TK, trace_TK[:tokens])
    if rows_TD.shape[0]:
        rows_TD[:tokens] = torch.where((flags_4[TRACE] & ROWS) != 0, stream_TD, rows_TD[:tokens])


def _summed_over_prompts(
    probe_TG: torch.Tensor, prompt_sums_MG: torch.Tensor, prompt_part_M2: torch.Tensor
) -> torch.Tensor:
    """(M, G) float32: ``prompt_sums_MG``, and the parts of this step added."""
    first_M1, count_M1 = prompt_part_M2[:, :1], prompt_part_M2[:, 1:]
    token_T = torch.arange(len(probe_TG), device=probe_TG.device)
    is_in_MT = (token_T >= first_M1) & (token_T < first_M1 + count_M1)
    # Selected, not multiplied: NaN times zero is NaN.
    return prompt_sums_MG + torch.where(is_in_MT[:, :, None], probe_TG[None], 0.0).sum(dim=1)


def within_limit(
    new_ND: torch.Tensor, own_ND: torch.Tensor, beside_ND: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``within`` of the module's loop, for N tokens; all arguments are (N, D) float32.

    Args:
        new_ND: hidden after steering.
        own_ND: hidden before steering.
        beside_ND: residual.

    Returns:
        The clipped ``new_ND``, and (N,) bool, whether anything of the token was clipped.
    """
    stream_ND = own_ND + beside_ND
    most_own_ND, least_own_ND = _bounds(own_ND)
    most_stream_ND, least_stream_ND = _bounds(stream_ND)
    # Selected by comparisons, which NaN always fails.
    most_ND = torch.where(most_stream_ND - beside_ND < most_own_ND, most_stream_ND - beside_ND, most_own_ND)
    least_ND = torch.where(least_stream_ND - beside_ND > least_own_ND, least_stream_ND - beside_ND, least_own_ND)
    is_over_ND, is_under_ND = new_ND > most_ND, new_ND < least_ND
    kept_ND = torch.where(is_over_ND, most_ND, torch.where(is_under_ND, least_ND, new_ND))
    return kept_ND, (is_over_ND | is_under_ND).any(dim=1)


def _bounds(before_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest and the smallest value that each element may take."""
    return (
        torch.where(before_ND > FLOAT16_LIMIT, before_ND, FLOAT16_LIMIT),
        torch.where(before_ND < -FLOAT16_LIMIT, before_ND, -FLOAT16_LIMIT),
    )
