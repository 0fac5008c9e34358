"""The CPU path of the op: the same result as ``reference``, touching only the tokens that a step steers or reads.

On the host the tables can be looked at: a layer at which no token of the step is steered, read or traced costs one look
at three integers. What a table says (which tokens, in which order) is worked out once and remembered by its content,
which most decode steps in a row share. Long runs of tokens with one row or accumulator (a prompt) are done run by run,
without a copy of the row for every token; many short ones (a decode step) all at once; either in parts of ``PART``.
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

PART = 524_288
"""So many elements are worked on at a time: 2 MiB in float32, which stay in the cache, where a long prompt's whole
stream would come from fresh pages and cost their faults. Much less a call, and the calls cost more than the work."""

Rows = slice | torch.Tensor
"""Some rows of a tensor."""
Counts = npt.NDArray[np.int64]


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
    if not (depth or is_read or is_traced):
        return
    most = max(PART // hidden_TD.shape[1], 1)
    if depth:
        units = _units(row_of_token[: hidden_TD.shape[0]].numpy().tobytes())
        slot_UE, ab_UE2 = (table.numpy()[units.row_U, :depth] for table in (entry_slot_RE, entry_ab_RE2))
        asked = (units, slot_UE.tobytes(), ab_UE2.tobytes(), depth, most, bank_SD.data_ptr(), bank_SD._version)
        steered = _remembered(entry_slot_RE.data_ptr(), asked, bank_SD)
        if steered is not None:
            _steer(hidden_TD, residual_TD, steered)
    if is_read:
        reset = np.flatnonzero(keep_A.numpy() == 0)
        if reset.size:
            sums_AD[_index(reset)] = 0.0
        _accumulate(hidden_TD, residual_TD, _segments(segment_A2.numpy().tobytes(), most), sums_AD, last_AD)
    if is_traced:
        columns = (trace_slot_K >= 0).nonzero()[:, 0]
        directions_DK = bank_SD[trace_slot_K[columns].long()].T
        for tokens in _parts(0, hidden_TD.shape[0], most):
            trace_TK[tokens, columns] = _stream(hidden_TD, residual_TD, tokens) @ directions_DK


def _stream(hidden_TD: torch.Tensor, residual_TD: torch.Tensor | None, at: Rows) -> torch.Tensor:
    """The stream of some tokens in float32."""
    own_ND = _rows(hidden_TD, at).float()
    return own_ND if residual_TD is None else own_ND + _rows(residual_TD, at).float()


def _rows(tensor: torch.Tensor, at: Rows) -> torch.Tensor:
    # a fifth of what indexing with a tensor takes
    return tensor[at] if isinstance(at, slice) else tensor.index_select(0, at)


def _index(numbers: Counts) -> Rows:
    """What picks these rows of a tensor: a slice, which copies nothing, where they follow one another."""
    if not numbers.size:
        return slice(0, 0)
    if numbers[-1] - numbers[0] == len(numbers) - 1 and (np.diff(numbers) == 1).all():
        return slice(int(numbers[0]), int(numbers[-1]) + 1)
    return torch.from_numpy(numbers)


def _parts(first: int, stop: int, most: int) -> list[slice]:
    return [slice(at, min(at + most, stop)) for at in range(first, stop, most)]


def _consecutive(first_N: Counts, count_N: Counts) -> Counts:
    """``count`` numbers from each ``first`` on, one series behind the other."""
    stop_N = count_N.cumsum()
    numbers: Counts = (first_N - stop_N + count_N).repeat(count_N) + np.arange(count_N.sum())
    return numbers


@dataclass(frozen=True, slots=True, eq=False)
class _Units:
    """Runs of tokens with the same row; each its row, first token and number of tokens."""

    row_U: Counts
    first_U: Counts
    count_U: Counts


@lru_cache(maxsize=4)
def _units(rows: bytes) -> _Units:
    """The units of a step, which every layer of it shares."""
    row_T = np.frombuffer(rows, np.int32).astype(np.int64)
    starts_U = np.flatnonzero(np.diff(row_T, prepend=-2))
    count_U = np.diff(starts_U, append=len(row_T))
    row_U = row_T[starts_U]
    some_U = row_U >= 0
    return _Units(row_U[some_U], starts_U[some_U], count_U[some_U])


@dataclass(frozen=True, slots=True)
class _Steered:
    """What a step's units and a layer's entries ask for.

    Attributes:
        bank_SD: the directions.
        slots_UE, a_UE, b_UE: the entries of each unit that has any. One with fewer than the deepest is filled up with
            slot 0, a = b = 0.
        delta_UD: what is added to each token of a unit, where that does not depend on the token: b is 0 throughout.
        parts: tokens, and the unit of each or one for all of them.
    """

    bank_SD: torch.Tensor
    slots_UE: torch.Tensor
    a_UE: torch.Tensor
    b_UE: torch.Tensor
    delta_UD: torch.Tensor | None
    parts: list[tuple[Rows, Rows]]


_Asked = tuple[_Units, bytes, bytes, int, int, int, int]
"""Units, slots, scalars, depth, the most tokens a part; address and version of the bank, which ``_Steered`` keeps from
moving and whose version changes with every write."""
_LAST: dict[int, tuple[_Asked, _Steered | None]] = {}
"""By the address of a layer's table: what it asked for last, and what that says. No more is kept: what outlives its
step keeps the memory around it from being given back."""


def _remembered(layer: int, asked: _Asked, bank_SD: torch.Tensor) -> _Steered | None:
    last, steered = _LAST.get(layer, (None, None))
    if last != asked:
        units, slots, scalars, depth, most, *_ = asked
        steered = _steered(bank_SD, units, slots, scalars, depth, most)
        _LAST[layer] = asked, steered
    return steered


def _steered(
    bank_SD: torch.Tensor, units: _Units, slots: bytes, scalars: bytes, depth: int, most: int
) -> _Steered | None:
    """None where no token is steered at this layer."""
    slot_UE = np.frombuffer(slots, np.int32).reshape(-1, depth)
    ab_UE2 = np.frombuffer(scalars, np.float32).reshape(-1, depth, 2)
    # Entries are packed to the left, so a unit whose first entry is empty does nothing at this layer.
    some_U = slot_UE[:, 0] >= 0
    slot_UE, ab_UE2 = slot_UE[some_U], ab_UE2[some_U]
    first_U, count_U = units.first_U[some_U], units.count_U[some_U]
    if not count_U.size:
        return None
    if count_U.sum() >= LONG_RUN * len(count_U):
        runs = zip(first_U.tolist(), count_U.tolist(), strict=True)
        parts: list[tuple[Rows, Rows]] = [
            (tokens, slice(unit, unit + 1))
            for unit, (first, count) in enumerate(runs)
            for tokens in _parts(first, first + count, most)
        ]
    else:
        token_N, unit_N = _consecutive(first_U, count_U), np.arange(len(count_U)).repeat(count_U)
        parts = [(_index(token_N[some]), _index(unit_N[some])) for some in _parts(0, len(unit_N), most)]
    slots_UE = torch.from_numpy(slot_UE.clip(0))
    a_UE, b_UE = (torch.from_numpy(ab_UE2[..., which].copy()) for which in (0, 1))
    delta_UD = None if b_UE.any() else embedding_bag(slots_UE, bank_SD, mode="sum", per_sample_weights=a_UE)
    return _Steered(bank_SD, slots_UE, a_UE, b_UE, delta_UD, parts)


def _steer(hidden_TD: torch.Tensor, residual_TD: torch.Tensor | None, steered: _Steered) -> None:
    if steered.delta_UD is not None:
        for tokens, units in steered.parts:
            _add(hidden_TD, tokens, _rows(steered.delta_UD, units))
        return
    for tokens, units in steered.parts:
        directions = (steered.bank_SD.index_select(0, slot_N) for slot_N in steered.slots_UE[units].T)
        _apply(hidden_TD, residual_TD, tokens, directions, steered.a_UE[units].T, steered.b_UE[units].T)


def _add(hidden_TD: torch.Tensor, at: Rows, delta_ND: torch.Tensor) -> None:
    """In float32, rounded once."""
    if isinstance(at, slice):
        hidden_TD[at].add_(delta_ND)
    else:
        hidden_TD.index_copy_(0, at, (hidden_TD.index_select(0, at) + delta_ND).to(hidden_TD.dtype))


def _apply(
    hidden_TD: torch.Tensor,
    residual_TD: torch.Tensor | None,
    at: Rows,
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
    _add(hidden_TD, at, delta_ND)


@dataclass(frozen=True, slots=True)
class _Summed:
    """Tokens that are summed in one go.

    Attributes:
        tokens: they, in the order of their accumulators.
        into: the accumulator of all of them, or that of each.
        ended: the accumulators whose segments end among these tokens.
        ends: where, as rows of ``tokens``.
    """

    tokens: Rows
    into: int | Rows
    ended: Rows
    ends: Rows


def _accumulate(
    hidden_TD: torch.Tensor,
    residual_TD: torch.Tensor | None,
    parts: list[_Summed],
    sums_AD: torch.Tensor,
    last_AD: torch.Tensor,
) -> None:
    for part in parts:
        stream_MD = _stream(hidden_TD, residual_TD, part.tokens)
        if isinstance(part.into, torch.Tensor):
            sums_AD.index_add_(0, part.into, stream_MD)
        else:
            sums_AD[part.into] += stream_MD.sum(dim=0) if isinstance(part.into, int) else stream_MD
        last_AD[part.ended] = _rows(stream_MD, part.ends)


@lru_cache(maxsize=4)
def _segments(table: bytes, most: int) -> list[_Summed]:
    """The segments of a step, which every layer of it shares; at most so many tokens a part."""
    first_A, count_A = np.frombuffer(table, np.int32).astype(np.int64).reshape(-1, 2).T
    filled_N = np.flatnonzero(count_A)
    first_N, count_N = first_A[filled_N], count_A[filled_N]
    stop_N = count_N.cumsum()
    accumulator_M = filled_N.repeat(count_N)
    token_M = _consecutive(first_N, count_N)
    is_long = len(token_M) >= LONG_SEGMENT * len(filled_N)
    bounds = zip((stop_N - count_N).tolist(), stop_N.tolist(), strict=True) if is_long else [(0, len(token_M))]
    found = []
    for part in (part for first, stop in bounds for part in _parts(first, stop, most)):
        into = accumulator_M[part]
        is_one = len(into) > 1 and into[0] == into[-1]
        ended_N = np.flatnonzero((stop_N > part.start) & (stop_N <= part.stop))
        found.append(
            _Summed(
                tokens=_index(token_M[part]),
                into=int(into[0]) if is_one else _index(into),
                ended=_index(filled_N[ended_N]),
                ends=_index(stop_N[ended_N] - 1 - part.start),
            )
        )
    return found
