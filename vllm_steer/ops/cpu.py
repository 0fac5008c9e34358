"""The CPU path of the op: the same result as ``reference``, touching only the tokens that a step steers or reads.

On the host the flags can be looked at: a layer at which no token of the step is steered, read or traced costs one
look at three integers.
"""

from __future__ import annotations

import torch


def steer_and_read(
    hidden_TD: torch.Tensor,
    residual_TD: torch.Tensor | None,
    bank_SD: torch.Tensor,
    row_of_token: torch.Tensor,
    entry_slot_RE: torch.Tensor,
    entry_ab_RE2: torch.Tensor,
    accumulator_of_token: torch.Tensor,
    keep_A: torch.Tensor,
    last_token_A: torch.Tensor,
    sums_AD: torch.Tensor,
    last_AD: torch.Tensor,
    trace_slot_K: torch.Tensor,
    trace_TK: torch.Tensor,
    flags_3: torch.Tensor,
) -> None:
    """See ``reference.steer_and_read``."""
    depth, tokens_read, traced = flags_3.tolist()
    if depth:
        _steer(hidden_TD, residual_TD, bank_SD, row_of_token, entry_slot_RE[:, :depth], entry_ab_RE2)
    if tokens_read:
        _accumulate(hidden_TD, residual_TD, accumulator_of_token, keep_A, last_token_A, sums_AD, last_AD)
    if traced:
        columns = (trace_slot_K >= 0).nonzero()[:, 0]
        stream_TD = _stream(hidden_TD, residual_TD)
        trace_TK[: len(stream_TD), columns] = stream_TD @ bank_SD[trace_slot_K[columns].long()].T


def _stream(hidden_ND: torch.Tensor, residual_ND: torch.Tensor | None) -> torch.Tensor:
    return hidden_ND.float() if residual_ND is None else hidden_ND.float() + residual_ND.float()


def _steer(
    hidden_TD: torch.Tensor,
    residual_TD: torch.Tensor | None,
    bank_SD: torch.Tensor,
    row_of_token: torch.Tensor,
    slot_RE: torch.Tensor,
    ab_RE2: torch.Tensor,
) -> None:
    row_T = row_of_token[: hidden_TD.shape[0]]
    # Entries are packed to the left, so a row whose first entry is empty does nothing at this layer.
    token_N = ((row_T >= 0) & (slot_RE[row_T.clamp(min=0), 0] >= 0)).nonzero()[:, 0]
    if token_N.numel() == 0:
        return
    row_N = row_T[token_N]
    hidden_ND = hidden_TD[token_N].float()
    stream_ND = hidden_ND if residual_TD is None else hidden_ND + residual_TD[token_N].float()
    delta_ND = torch.zeros_like(stream_ND)
    for entry in range(slot_RE.shape[1]):
        slot_N = slot_RE[row_N, entry]
        a_N, b_N = ab_RE2[row_N, entry].unbind(dim=1)  # (0, 0) where a row has fewer entries than the deepest
        direction_ND = bank_SD[slot_N.clamp(min=0)]
        if b_N.any():
            a_N = a_N + b_N * ((stream_ND + delta_ND) * direction_ND).sum(dim=1)
        delta_ND.addcmul_(a_N[:, None], direction_ND)
    hidden_TD[token_N] = (hidden_ND + delta_ND).to(hidden_TD.dtype)


def _accumulate(
    hidden_TD: torch.Tensor,
    residual_TD: torch.Tensor | None,
    accumulator_of_token: torch.Tensor,
    keep_A: torch.Tensor,
    last_token_A: torch.Tensor,
    sums_AD: torch.Tensor,
    last_AD: torch.Tensor,
) -> None:
    accumulator_T = accumulator_of_token[: hidden_TD.shape[0]]
    token_N = (accumulator_T >= 0).nonzero()[:, 0]
    stream_ND = _stream(hidden_TD[token_N], None if residual_TD is None else residual_TD[token_N])
    sums_AD[keep_A == 0] = 0.0
    sums_AD.index_add_(0, accumulator_T[token_N], stream_ND)
    ends = (last_token_A >= 0).nonzero()[:, 0]
    end_token = last_token_A[ends]
    last_AD[ends] = _stream(hidden_TD[end_token], None if residual_TD is None else residual_TD[end_token])
