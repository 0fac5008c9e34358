"""The CPU path of the op: the same result as ``reference``, touching only the tokens that a step steers or reads.

The host can read the tables, so a layer at which no token of the step is steered, read or traced costs one read of four
integers. The work of a layer (which tokens, in which order, what is added to them) is derived from the tables once and
cached while their version stays the same. Most consecutive decode steps share a version. The cache matters because all
weights of the model pass through the CPU caches between two steps, so a read of the tables then costs several times
more than in a loop. Long runs of tokens with one row or accumulator (a prompt) are processed run by run, without a copy
of the row for every token. Many short runs (a decode step) are processed all at once. Both go in parts of ``PART``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import embedding_bag

from vllm_steer.ops.reference import within_limit
from vllm_steer.ops.stream_range import FLOAT16_LIMIT
from vllm_steer.plan.entry_rows import ABOVE, BELOW, CLAMP, HELD_SHIFT, KEEP_NORM, PROBE, PROMPT, RELATIVE, STORED
from vllm_steer.plan.step_plan import ROWS, TRACED

LONG_RUN = 16
"""Average length, in tokens, from which runs are steered one by one."""

LONG_SEGMENT = 64
"""The same for summed segments. It is larger, because summing all segments at once copies less."""

PART = 524_288
"""Elements processed at a time: 2 MiB in float32, which stay in the CPU cache. The whole stream of a long prompt would
come from fresh pages and cost their page faults. With much smaller parts, the calls cost more than the work."""

Rows = slice | torch.Tensor | None
"""Rows of a tensor; None means all of them, without a slice."""
Counts = npt.NDArray[np.int64]


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
    """The op on the CPU; see ``reference.steer_and_read``."""
    depth, num_segments, by_token, version = flags_4.tolist()
    if not (depth or num_segments or by_token):
        return
    is_traced = by_token & TRACED
    asked = version, hidden_TD.shape, bank_SD._version
    last, work = _LAST.get(flags_4.data_ptr(), (None, None))
    if work is None or last != asked or not version:
        num_tokens, dimension = hidden_TD.shape
        most = max(PART // dimension, 1)
        units = _units(row_of_token[:num_tokens].numpy().tobytes()) if depth else None
        tables = (entry_slot_RE, entry_ab_RE2, entry_mode_RE, entry_gate_RE, entry_threshold_RE)
        work = _Work(
            None if units is None else _steered(bank_SD, units, num_tokens, tables, depth, most),
            _index(reset) if num_segments and (reset := _reset(keep_A.numpy()[:num_segments])).size else None,
            _summed(
                segment_A2.numpy()[:num_segments].tobytes(), keep_A.numpy()[:num_segments].tobytes(), num_tokens, most
            )
            if num_segments
            else [],
            _parts(0, num_tokens, most) if is_traced else [],
        )
        _LAST[flags_4.data_ptr()] = asked, work
    if work.steered is not None:
        summed_MG = prompt_sums_MG
        if work.steered.looks_at_prompts and prompt_part_M2[:, 1].any():
            summed_MG = _summed_over_prompts(probe_TG, prompt_sums_MG, prompt_part_M2)
        _steer(hidden_TD, residual_TD, bank_SD, work.steered, probe_TG, summed_MG, trace_TK, cut_R)
    if num_segments:
        if work.reset is not None:
            sums_AD[work.reset] = 0.0
        _accumulate(hidden_TD, residual_TD, work.summed, sums_AD, last_AD)
    if is_traced:
        columns = (trace_slot_K >= 0).nonzero()[:, 0]
        directions_DK = bank_SD[trace_slot_K[columns].long()].T
        for tokens in work.traced:
            trace_TK[tokens, columns] = _stream(hidden_TD, residual_TD, tokens) @ directions_DK
    if by_token & ROWS and len(rows_TD):
        _store(hidden_TD, residual_TD, rows_TD[: len(hidden_TD)])


def _store(hidden_TD: torch.Tensor, residual_TD: torch.Tensor | None, rows_TD: torch.Tensor) -> None:
    """Write the stream of all tokens to ``rows_TD``."""
    rows_TD.copy_(hidden_TD)
    if residual_TD is not None:
        rows_TD.add_(residual_TD)  # in float32, to which a narrower residual is converted exactly


@dataclass(frozen=True, slots=True)
class _Work:
    """The work of one layer in one step.

    Attributes:
        steered: None if no token is steered.
        reset: accumulators to set to zero; None for none.
        summed, traced: tokens to sum and to trace, in parts.
    """

    steered: _Steered | None
    reset: slice | torch.Tensor | None
    summed: list[_Summed]
    traced: list[slice]


_LAST: dict[int, tuple[tuple[int, torch.Size, int], _Work]] = {}
"""Address of a layer's flags -> (version of the tables, shape of hidden, version of the bank), and the last work there.
Only the last is kept: objects that outlive their step keep the memory around them from being freed."""


def _stream(hidden_TD: torch.Tensor, residual_TD: torch.Tensor | None, at: Rows) -> torch.Tensor:
    """The stream of some tokens in float32."""
    own_ND = _rows(hidden_TD, at).float()
    return own_ND if residual_TD is None else own_ND + _rows(residual_TD, at).float()


def _rows(tensor: torch.Tensor, at: Rows) -> torch.Tensor:
    if at is None:
        return tensor
    # index_select takes a fifth of the time of indexing with a tensor
    return tensor[at] if isinstance(at, slice) else tensor.index_select(0, at)


def _rows_of(numbers: Counts, count: int) -> Rows:
    """Selects the rows ``numbers`` of a tensor with ``count`` rows."""
    index = _index(numbers)
    return None if isinstance(index, slice) and index == slice(0, count) else index


def _index(numbers: Counts) -> slice | torch.Tensor:
    """Index of the rows ``numbers``: a slice, which copies nothing, if they are consecutive."""
    if not numbers.size:
        return slice(0, 0)
    if numbers[-1] - numbers[0] == len(numbers) - 1 and (np.diff(numbers) == 1).all():
        return slice(int(numbers[0]), int(numbers[-1]) + 1)
    return torch.from_numpy(numbers)


def _parts(first: int, stop: int, most: int) -> list[slice]:
    return [slice(at, min(at + most, stop)) for at in range(first, stop, most)]


def _consecutive(first_N: Counts, count_N: Counts) -> Counts:
    """``count`` consecutive numbers from each ``first`` on, concatenated."""
    stop_N = count_N.cumsum()
    numbers: Counts = (first_N - stop_N + count_N).repeat(count_N) + np.arange(count_N.sum())
    return numbers


@dataclass(frozen=True, slots=True, eq=False)
class _Units:
    """Runs of tokens with the same row: row, first token and number of tokens of each."""

    row_U: Counts
    first_U: Counts
    count_U: Counts


@lru_cache(maxsize=4)
def _units(rows: bytes) -> _Units:
    """The units of a step, cached because all its layers share them."""
    row_T = np.frombuffer(rows, np.int32).astype(np.int64)
    starts_U = np.flatnonzero(np.diff(row_T, prepend=-2))
    count_U = np.diff(starts_U, append=len(row_T))
    row_U = row_T[starts_U]
    some_U = row_U >= 0
    return _Units(row_U[some_U], starts_U[some_U], count_U[some_U])


@dataclass(frozen=True, slots=True)
class _Steered:
    """The steering of one layer in one step.

    Attributes:
        row_U: row of each unit that has entries at this layer.
        slots_UE, a_UE, b_UE: its entries, padded to the depth of the step with slot 0, a = b = 0.
        forms: modes, gates and thresholds of the entries, each (U, E); None if all modes are 0.
        delta_UD: vector to add to each token of a unit; None if it depends on the token, that is if any b or mode is
            not 0.
        parts: tokens, with the unit of each or one unit for all of them.
        looks_at_prompts: whether any condition does.
        is_counted: whether any condition is.
    """

    row_U: torch.Tensor
    slots_UE: torch.Tensor
    a_UE: torch.Tensor
    b_UE: torch.Tensor
    forms: tuple[torch.Tensor, ...] | None
    delta_UD: torch.Tensor | None
    parts: list[tuple[Rows, Rows]]
    looks_at_prompts: bool
    is_counted: bool


def _steered(
    bank_SD: torch.Tensor,
    units: _Units,
    num_tokens: int,
    tables: tuple[torch.Tensor, ...],
    depth: int,
    most: int,
) -> _Steered | None:
    """None if no token is steered at this layer; ``tables``: slots, coefficients, modes, gates and thresholds."""
    slot_UE, ab_UE2, mode_UE = (table.numpy()[units.row_U, :depth] for table in tables[:3])
    # Entries are packed to the left, so a unit whose first entry is empty does nothing at this layer.
    some_U = slot_UE[:, 0] >= 0
    slot_UE, ab_UE2, mode_UE = slot_UE[some_U], ab_UE2[some_U], mode_UE[some_U]
    has_modes = bool(mode_UE[slot_UE >= 0].any())
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
        parts = [
            (_rows_of(token_N[some], num_tokens), _rows_of(unit_N[some], len(count_U)))
            for some in _parts(0, len(unit_N), most)
        ]
    slots_UE = torch.from_numpy(slot_UE.clip(0))
    a_UE, b_UE = (torch.from_numpy(ab_UE2[..., which].copy()) for which in (0, 1))
    is_fixed = not (has_modes or b_UE.any())
    delta_UD = embedding_bag(slots_UE, bank_SD, mode="sum", per_sample_weights=a_UE) if is_fixed else None
    forms = None
    if has_modes:
        gate_UE, threshold_UE = (table.numpy()[units.row_U[some_U], :depth] for table in tables[3:])
        used_UE = np.where(slot_UE >= 0, mode_UE, 0)
        forms = tuple(map(torch.from_numpy, (used_UE, gate_UE.astype(np.int64), threshold_UE)))
    looks_at_prompts = forms is not None and bool((forms[0] & PROMPT).any())
    is_counted = forms is not None and bool((forms[0] >> HELD_SHIFT).any())
    row_U = torch.from_numpy(units.row_U[some_U])
    return _Steered(row_U, slots_UE, a_UE, b_UE, forms, delta_UD, parts, looks_at_prompts, is_counted)


def _steer(
    hidden_TD: torch.Tensor,
    residual_TD: torch.Tensor | None,
    bank_SD: torch.Tensor,
    steered: _Steered,
    probe_TG: torch.Tensor,
    summed_MG: torch.Tensor,
    trace_TK: torch.Tensor,
    cut_R: torch.Tensor,
) -> None:
    is_bounded = hidden_TD.dtype == torch.float16
    for tokens, units in steered.parts:
        if steered.delta_UD is not None:
            delta_ND = _rows(steered.delta_UD, units)
        else:
            directions = (bank_SD.index_select(0, slot_N) for slot_N in _rows(steered.slots_UE, units).T)
            a_EN, b_EN = _rows(steered.a_UE, units).T, _rows(steered.b_UE, units).T
            stream_ND = _stream(hidden_TD, residual_TD, tokens)
            if steered.forms is None:
                delta_ND = _delta(stream_ND, directions, a_EN, b_EN)
            else:
                forms_EN = [_rows(table_UE, units).T for table_UE in steered.forms]
                probe_NG = _rows(probe_TG[: len(hidden_TD)], tokens)
                trace_NK = _rows(trace_TK[: len(hidden_TD)], tokens) if steered.is_counted else None
                stores = probe_NG, summed_MG, trace_NK
                delta_ND = _delta_by_mode(stream_ND, directions, a_EN, b_EN, forms_EN, bank_SD, *stores)
                if trace_NK is not None and isinstance(tokens, torch.Tensor):
                    trace_TK.index_copy_(0, tokens, trace_NK)
                if isinstance(tokens, torch.Tensor):  # else it was a view
                    probe_TG.index_copy_(0, tokens, probe_NG)
        if is_bounded:
            _add_within_limit(hidden_TD, residual_TD, tokens, delta_ND, _rows(steered.row_U, units), cut_R)
        else:
            _add(hidden_TD, tokens, delta_ND)


def _summed_over_prompts(
    probe_TG: torch.Tensor, prompt_sums_MG: torch.Tensor, prompt_part_M2: torch.Tensor
) -> torch.Tensor:
    """(M, G) float32: ``prompt_sums_MG``, and the parts of this step added."""
    summed_MG = prompt_sums_MG.clone()
    for place, (first, count) in enumerate(prompt_part_M2.tolist()):
        if count:
            summed_MG[place] += probe_TG[first : first + count].sum(dim=0)
    return summed_MG


def _add(hidden_TD: torch.Tensor, at: Rows, delta_ND: torch.Tensor) -> None:
    """Add in float32 and round once."""
    if not isinstance(at, torch.Tensor):
        _rows(hidden_TD, at).add_(delta_ND)
    else:
        hidden_TD.index_copy_(0, at, (hidden_TD.index_select(0, at) + delta_ND).to(hidden_TD.dtype))


def _add_within_limit(
    hidden_TD: torch.Tensor,
    residual_TD: torch.Tensor | None,
    at: Rows,
    delta_ND: torch.Tensor,
    row_N: torch.Tensor,
    cut_R: torch.Tensor,
) -> None:
    """``_add`` in float16: clips values to the limit, and marks rows with clipped values in ``cut_R``.

    Args:
        row_N: row of each token, or one row for all of them.
    """
    own_ND = _rows(hidden_TD, at).float()
    beside_ND = torch.zeros_like(own_ND) if residual_TD is None else _rows(residual_TD, at).float()
    new_ND = own_ND + delta_ND
    largest = torch.maximum(new_ND.abs().max(), (new_ND + beside_ND).abs().max())
    if not largest <= FLOAT16_LIMIT:  # rare; true for NaN too
        new_ND, is_cut_N = within_limit(new_ND, own_ND, beside_ND)
        cut_R[row_N.expand(len(is_cut_N))[is_cut_N]] = 1
    if isinstance(at, torch.Tensor):
        hidden_TD.index_copy_(0, at, new_ND.to(hidden_TD.dtype))
    else:
        _rows(hidden_TD, at).copy_(new_ND)


def _delta(
    stream_ND: torch.Tensor, directions: Iterable[torch.Tensor], a: torch.Tensor, b: torch.Tensor
) -> torch.Tensor:
    """The sum of all entries for each token. An entry has a direction, a and b per token, or one for all tokens."""
    delta_ND = torch.zeros_like(stream_ND)
    for direction, a_e, b_e in zip(directions, a, b, strict=True):
        projection_N = ((stream_ND + delta_ND) * direction).sum(dim=1)
        delta_ND.addcmul_((a_e + b_e * projection_N)[:, None], direction)
    return delta_ND


def _delta_by_mode(
    stream_ND: torch.Tensor,
    directions: Iterable[torch.Tensor],
    a: torch.Tensor,
    b: torch.Tensor,
    forms: Sequence[torch.Tensor],
    bank_SD: torch.Tensor,
    probe_NG: torch.Tensor,
    summed_MG: torch.Tensor,
    trace_NK: torch.Tensor | None,
) -> torch.Tensor:
    """``_delta`` for entries of which some have a mode; probes are stored in ``probe_NG``, and in ``trace_NK`` which
    conditions hold."""
    summed = summed_MG.flatten()
    steered_ND = stream_ND
    for direction, a_e, b_e, mode_e, gate_e, threshold_e in zip(directions, a, b, *forms, strict=True):
        norm_N = torch.linalg.vector_norm(steered_ND, dim=1)
        unit_N = norm_N.where((mode_e & RELATIVE) != 0, 1.0)
        projection_N = (steered_ND * direction).sum(dim=1)
        low_N, high_N = a_e * unit_N, b_e * unit_N
        # By comparisons, which fail for the NaN that an infinite bound becomes at a stream of length 0.
        clamped_N = (high_N - projection_N).where(projection_N > high_N, 0.0)
        clamped_N = (low_N - projection_N).where(projection_N < low_N, clamped_N)
        factor_N = clamped_N.where((mode_e & CLAMP) != 0, low_N + b_e * projection_N)
        is_on_N: torch.Tensor = (mode_e & PROBE) == 0
        if bool((mode_e & (ABOVE | BELOW | PROBE)).any()):
            place_N = gate_e.clamp(max=probe_NG.shape[1] - 1).expand(len(stream_ND))[:, None]
            seen_N = (steered_ND * bank_SD[gate_e.clamp(max=len(bank_SD) - 1)]).sum(dim=1)
            seen_N = probe_NG.gather(1, place_N)[:, 0].where((mode_e & STORED) != 0, seen_N)
            seen_N = summed[gate_e.clamp(max=len(summed) - 1)].where((mode_e & PROMPT) != 0, seen_N)
            is_on_N = is_on_N & (((mode_e & ABOVE) == 0) | (seen_N > threshold_e))
            is_on_N = is_on_N & (((mode_e & BELOW) == 0) | (seen_N < threshold_e))
            factor_N = factor_N.where(is_on_N, 0.0)
            if trace_NK is not None:
                column_N = ((mode_e >> HELD_SHIFT) - 1).expand(len(stream_ND))
                held_NK = trace_NK.scatter(1, column_N.clamp(min=0).long()[:, None], is_on_N[:, None].float())
                trace_NK.copy_(held_NK.where((column_N >= 0)[:, None], trace_NK))
            stored_NG = probe_NG.scatter(1, place_N, projection_N[:, None])
            probe_NG.copy_(stored_NG.where(((mode_e & PROBE) != 0)[:, None], probe_NG))
        steered_ND = steered_ND + factor_N[:, None] * direction
        after_N = torch.linalg.vector_norm(steered_ND, dim=1)
        ratio_N = (norm_N / after_N).where(((mode_e & KEEP_NORM) != 0) & is_on_N & (after_N > 0), 1.0)
        steered_ND = steered_ND * ratio_N[:, None]
    return steered_ND - stream_ND


@dataclass(frozen=True, slots=True)
class _Summed:
    """Tokens that are summed in one call.

    Attributes:
        tokens: the tokens, in the order of their segments.
        into: one row for all tokens, or one for each.
        ended: rows of the segments that end among these tokens.
        ends: the last token of each of these segments, as rows of ``tokens``.
    """

    tokens: Rows
    into: int | slice | torch.Tensor
    ended: slice | torch.Tensor
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


def _row_of(keep_A: Counts) -> Counts:
    """The row into which each segment is summed."""
    rows: Counts = np.where(keep_A < 0, -keep_A, np.arange(len(keep_A)))
    return rows


def _reset(keep_A: Counts) -> Counts:
    rows: Counts = _row_of(keep_A)[keep_A <= 0].astype(np.int64)
    return rows


@lru_cache(maxsize=4)
def _summed(table: bytes, keep: bytes, num_tokens: int, most: int) -> list[_Summed]:
    """The segments of a step, which all its layers share, in parts of at most ``most`` tokens."""
    first_A, count_A = np.frombuffer(table, np.int32).astype(np.int64).reshape(-1, 2).T
    row_A = _row_of(np.frombuffer(keep, np.int32).astype(np.int64))
    is_block_A = np.frombuffer(keep, np.int32) < 0
    found = []
    for of_blocks in (False, True) if is_block_A.any() else (False,):  # segments of blocks overlap the others
        filled_N = np.flatnonzero((count_A != 0) & (is_block_A == of_blocks))
        found += _in_parts(row_A[filled_N], first_A[filled_N], count_A[filled_N], num_tokens, most)
    return found


def _in_parts(filled_N: Counts, first_N: Counts, count_N: Counts, num_tokens: int, most: int) -> list[_Summed]:
    """Segments that do not overlap; ``filled_N``: the row of each."""
    stop_N = count_N.cumsum()
    row_M = filled_N.repeat(count_N)
    token_M = _consecutive(first_N, count_N)
    is_long = len(token_M) >= LONG_SEGMENT * len(filled_N)
    bounds = zip((stop_N - count_N).tolist(), stop_N.tolist(), strict=True) if is_long else [(0, len(token_M))]
    found = []
    for part in (part for first, stop in bounds for part in _parts(first, stop, most)):
        into = row_M[part]
        is_one = len(into) > 1 and into[0] == into[-1]
        ended_N = np.flatnonzero((stop_N > part.start) & (stop_N <= part.stop))
        found.append(
            _Summed(
                tokens=_rows_of(token_M[part], num_tokens),
                into=int(into[0]) if is_one else _index(into),
                ended=_index(filled_N[ended_N]),
                ends=_rows_of(stop_N[ended_N] - 1 - part.start, part.stop - part.start),
            )
        )
    return found
