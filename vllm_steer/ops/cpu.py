"""The CPU path of the op: the same result as ``reference``, touching only the tokens that a step steers or reads.

On the host the tables can be looked at: a layer at which no token of the step is steered, read or traced costs one look
at three integers, and which tokens are concerned is worked out in numpy, whose calls on small tables cost least. Long
runs of tokens with one row or accumulator (a prompt) are done run by run, without a copy of the row for every token;
many short ones (a decode step) all at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import embedding_bag

LONG_RUN = 16
"""From so many tokens a run on, on average, runs are steered one by one."""

LONG_SEGMENT = 64
"""The same of segments that are summed, where doing them all at once copies less."""

IntArray = npt.NDArray[np.int32]


def steer_and_read(
    hidden_TD: torch.Tensor,
    residual_TD: torch.Tensor | None,
    bank_SD: torch.Tensor,
    row_of_token: torch.Tensor,
    entry_slot_RE: torch.Tensor,
    entry_ab_RE2: torch.Tensor,
    keep_A: torch.Tensor,
    segment_A2: torch.Tensor,
    sums_AD: torch.Tensor,
    last_AD: torch.Tensor,
    trace_slot_K: torch.Tensor,
    trace_TK: torch.Tensor,
    flags_3: torch.Tensor,
) -> None:
    """See ``reference.steer_and_read``."""
    depth, is_read, is_traced = flags_3.tolist()
    if depth:
        row_T = row_of_token[: hidden_TD.shape[0]].numpy()
        _steer(hidden_TD, residual_TD, bank_SD, row_T, entry_slot_RE[:, :depth], entry_ab_RE2[:, :depth])
    if is_read:
        reset = np.flatnonzero(keep_A.numpy() == 0)
        if reset.size:
            sums_AD[_index(reset)] = 0.0
        _accumulate(hidden_TD, residual_TD, segment_A2.numpy(), sums_AD, last_AD)
    if is_traced:
        columns = (trace_slot_K >= 0).nonzero()[:, 0]
        stream_TD = _stream(hidden_TD, residual_TD, slice(None))
        trace_TK[: len(stream_TD), columns] = stream_TD @ bank_SD[trace_slot_K[columns].long()].T


def _stream(hidden_TD: torch.Tensor, residual_TD: torch.Tensor | None, at: slice | torch.Tensor) -> torch.Tensor:
    """The stream of some tokens in float32."""
    own_ND = _rows(hidden_TD, at).float()
    return own_ND if residual_TD is None else own_ND + _rows(residual_TD, at).float()


def _rows(tensor: torch.Tensor, at: slice | torch.Tensor) -> torch.Tensor:
    # a fifth of what indexing with a tensor takes
    return tensor[at] if isinstance(at, slice) else tensor.index_select(0, at)


def _index(numbers: npt.NDArray[np.int64]) -> slice | torch.Tensor:
    """What picks these rows of a tensor: a slice, which copies nothing, where they follow one another."""
    if numbers[-1] - numbers[0] == len(numbers) - 1 and (np.diff(numbers) == 1).all():
        return slice(int(numbers[0]), int(numbers[-1]) + 1)
    return torch.from_numpy(numbers)


def _steer(
    hidden_TD: torch.Tensor,
    residual_TD: torch.Tensor | None,
    bank_SD: torch.Tensor,
    row_T: IntArray,
    entry_slot_RE: torch.Tensor,
    entry_ab_RE2: torch.Tensor,
) -> None:
    slot_RE = entry_slot_RE.numpy()
    # Entries are packed to the left, so a row whose first entry is empty does nothing at this layer.
    token_N = np.flatnonzero((row_T >= 0) & (slot_RE[row_T, 0] >= 0))
    if token_N.size == 0:
        return
    row_N = row_T[token_N]
    starts_U = np.flatnonzero(np.concatenate(([True], (np.diff(row_N) != 0) | (np.diff(token_N) != 1))))
    count_U = np.diff(starts_U, append=len(row_N))
    row_U = row_N[starts_U]
    slot_UE, ab_UE2 = slot_RE[row_U], entry_ab_RE2.numpy()[row_U]  # (0, 0) where a row has fewer than the deepest
    slots_UE, a_UE, b_UE = (torch.from_numpy(one) for one in (slot_UE.clip(0), ab_UE2[..., 0].copy(), ab_UE2[..., 1]))
    only_adds = not ab_UE2[..., 1].any()
    if only_adds:  # what is added does not depend on the token
        delta_UD = embedding_bag(slots_UE, bank_SD, mode="sum", per_sample_weights=a_UE)
    if len(row_N) >= LONG_RUN * len(row_U):
        for u, (first, count) in enumerate(zip(token_N[starts_U].tolist(), count_U.tolist(), strict=True)):
            run = slice(first, first + count)
            if only_adds:
                hidden_TD[run].add_(delta_UD[u])
            else:
                _apply(hidden_TD, residual_TD, run, bank_SD[slots_UE[u]], a_UE[u], b_UE[u])
        return
    unit_N = _index(np.arange(len(row_U)).repeat(count_U))
    at = _index(token_N)
    if only_adds:
        hidden_TD[at] = (_rows(hidden_TD, at).float() + _rows(delta_UD, unit_N)).to(hidden_TD.dtype)
    else:
        directions = (bank_SD.index_select(0, slot_N) for slot_N in slots_UE[unit_N].T)
        _apply(hidden_TD, residual_TD, at, directions, a_UE[unit_N].T, b_UE[unit_N].T)


def _apply(
    hidden_TD: torch.Tensor,
    residual_TD: torch.Tensor | None,
    at: slice | torch.Tensor,
    directions: Iterable[torch.Tensor],
    a: torch.Tensor,
    b: torch.Tensor,
) -> None:
    """Entry by entry, each a direction, a and b of every token, or the same ones for all of them."""
    stream_ND = _stream(hidden_TD, residual_TD, at)
    delta_ND = torch.zeros_like(stream_ND)
    for direction, a_e, b_e in zip(directions, a, b, strict=True):
        projection_N = ((stream_ND + delta_ND) * direction).sum(dim=1)
        delta_ND.addcmul_((a_e + b_e * projection_N)[:, None], direction)
    hidden_TD[at] = (_rows(hidden_TD, at).float() + delta_ND).to(hidden_TD.dtype)


def _accumulate(
    hidden_TD: torch.Tensor,
    residual_TD: torch.Tensor | None,
    segment_A2: IntArray,
    sums_AD: torch.Tensor,
    last_AD: torch.Tensor,
) -> None:
    runs, rest = _segments(segment_A2.tobytes())
    for accumulator, run in runs:
        stream_MD = _stream(hidden_TD, residual_TD, run)
        sums_AD[accumulator] += stream_MD.sum(dim=0)
        last_AD[accumulator] = stream_MD[-1]
    if rest is None:
        return
    stream_MD = _stream(hidden_TD, residual_TD, rest.tokens)
    if rest.accumulator_M is None:
        sums_AD[rest.into] += stream_MD
    else:
        sums_AD.index_add_(0, rest.accumulator_M, stream_MD)
    last_AD[rest.into] = stream_MD[rest.ends]


@dataclass(frozen=True, slots=True)
class _AtOnce:
    """Segments to be summed together.

    Attributes:
        tokens: those of all of them, one segment behind the other.
        into: their accumulators.
        ends: the last one of ``tokens`` of each.
        accumulator_M: the accumulator of each of ``tokens``; None where ``into`` says it, as a slice.
    """

    tokens: slice | torch.Tensor
    into: slice | torch.Tensor
    ends: slice | torch.Tensor
    accumulator_M: torch.Tensor | None


@lru_cache(maxsize=8)
def _segments(table: bytes) -> tuple[list[tuple[int, slice]], _AtOnce | None]:
    """The segments (accumulator, tokens) to be summed one by one, or those to be summed together.

    Remembered by the table's content, which is the same for every layer of a step and for most decode steps in a row.
    """
    first_A, count_A = np.frombuffer(table, np.int32).astype(np.int64).reshape(-1, 2).T
    filled_N = np.flatnonzero(count_A)
    first_N, count_N = first_A[filled_N], count_A[filled_N]
    if count_N.sum() >= LONG_SEGMENT * len(filled_N):  # where there is none at all, too
        runs = zip(filled_N.tolist(), first_N.tolist(), count_N.tolist(), strict=True)
        return [(accumulator, slice(first, first + count)) for accumulator, first, count in runs], None
    before_N = count_N.cumsum() - count_N  # tokens of the segments before each
    tokens = _index((first_N - before_N).repeat(count_N) + np.arange(count_N.sum()))
    into, ends = _index(filled_N), _index(before_N + count_N - 1)
    is_told = isinstance(into, slice) and len(filled_N) == count_N.sum()
    accumulator_M = None if is_told else torch.from_numpy(filled_N.repeat(count_N))
    return [], _AtOnce(tokens, into, ends, accumulator_M)
