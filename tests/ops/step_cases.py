"""Steps for the op, as the planner could have made them, and the op's loop written out in float64 to compare with."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from vllm_steer.ops.dispatch import connect, steer_and_read
from vllm_steer.ops.layer_tables import LayerTables
from vllm_steer.ops.stream_range import FLOAT16_LIMIT
from vllm_steer.plan.step_plan import READ, ROWS, TRACE, TRACED

DIMENSION, SLOTS, REQUESTS, PROBES = 24, 5, 4, 4
WRITTEN_PROBES = 2  # of a hook: those before it have written the others, of which conditions over prompts take sums
SPARE_TOKENS = 3  # the token tables are longer than a call: entries beyond it must be ignored


@dataclass(frozen=True)
class Case:
    """The op's arguments, in its order."""

    hidden: torch.Tensor
    residual: torch.Tensor | None
    bank: torch.Tensor
    row_of_token: torch.Tensor
    entry_slot: torch.Tensor
    entry_ab: torch.Tensor
    entry_mode: torch.Tensor
    entry_gate: torch.Tensor
    entry_threshold: torch.Tensor
    probe: torch.Tensor
    prompt_sums: torch.Tensor
    prompt_part: torch.Tensor
    keep: torch.Tensor
    segment: torch.Tensor
    sums: torch.Tensor
    last: torch.Tensor
    trace_slot: torch.Tensor
    trace: torch.Tensor
    cut: torch.Tensor
    rows: torch.Tensor
    flags: torch.Tensor

    def args(self) -> tuple[Any, ...]:
        """The arguments in the op's order."""
        return tuple(vars(self).values())

    def copy(self, device: str = "cpu") -> Case:
        """A copy with its own storage and the same strides; the gaps between the elements of hidden hold NaN."""
        shape, strides = self.hidden.shape, self.hidden.stride()
        reach = 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
        storage = torch.full((reach,), torch.nan, dtype=self.hidden.dtype, device=device)
        hidden = storage.as_strided(shape, strides).copy_(self.hidden)
        return Case(hidden, *(None if arg is None else arg.clone().to(device) for arg in self.args()[1:]))

    def of_token(self) -> list[int]:
        """The accumulator of each token, -1 where none."""
        found = [-1] * len(self.hidden)
        for accumulator, (first, count) in enumerate(self.segment.tolist()):
            found[first : first + count] = [accumulator] * count
        return found


class Owner:
    """Owns connected tables."""


def registered(hidden: torch.Tensor, residual: torch.Tensor | None, *tables: torch.Tensor) -> None:
    """The op as compiled code calls it, with tables that are connected for this call."""
    owner, layer = Owner(), LayerTables(*tables)
    connect(owner, [layer])
    steer_and_read(hidden, residual, layer.flags_4)


def make_case(
    seed: int,
    *,
    tokens: int = 9,
    entries: int = 3,
    steered: str = "some",
    read: str = "some",
    columns: int = 0,
    dimension: int = DIMENSION,
    dtype: torch.dtype = torch.float32,
    residual: bool = True,
    strided: bool = False,
    modes: bool = False,
    stored: bool | None = None,
) -> Case:
    """A step as the planner could have made it: entries packed to the left, flags that say which tables are in use.

    With `stored` None there is no room for rows, as in an engine that allows none; else it says whether this step's are
    stored.
    """
    rng = np.random.default_rng(seed)
    rows = 2 * REQUESTS

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))

    row_of_token = rng.integers(0, rows, tokens + SPARE_TOKENS).astype(np.int32)
    if steered != "all":
        row_of_token[:tokens][rng.random(tokens) < {"none": 1, "some": 0.5}[steered]] = -1
    segment = np.zeros((REQUESTS, 2), np.int32)
    segment[:, 0] = rng.integers(0, tokens + 1, REQUESTS)  # the first token of an empty segment means nothing
    if read != "none":
        cuts = [0, *sorted(rng.integers(0, tokens + 1, REQUESTS - 1).tolist()), tokens]
        for accumulator, (first, end) in zip(rng.permutation(REQUESTS), itertools.pairwise(cuts), strict=True):
            gap = int(rng.integers(0, 2)) if read == "some" and end > first else 0
            segment[accumulator] = first + gap, end - first - gap

    hidden = normal(tokens, 2 * dimension).to(dtype)
    hidden = hidden[:, :dimension] if strided else hidden[:, :dimension].contiguous()
    counts = rng.integers(0, entries + 1, rows)
    counts[rng.integers(rows)] = entries
    entry_slot = np.full((rows, entries), -1, np.int32)
    entry_ab = np.zeros((rows, entries, 2), np.float32)
    entry_gate = np.full((rows, entries), 10**9, np.int32)
    entry_threshold = np.zeros((rows, entries), np.float32)
    entry_mode = np.full((rows, entries), 255, np.int32)  # that of an empty entry means nothing
    for row, count in enumerate(counts):
        entry_slot[row, :count] = rng.integers(0, SLOTS, count)
        for entry in range(count):
            alpha = rng.uniform(-8, 8)
            entry_ab[row, entry] = [(alpha, 0), (0, -1), (alpha, -1)][rng.integers(3)]
            entry_mode[row, entry] = 0
            if modes:
                # add, ablate by a part, mirror, set, scale, and clamp with both bounds or one; relative where that has
                # a meaning, in units of about the stream's length.
                a, b, mode = [
                    (alpha, 0, 0), (0, -0.5, 0), (0, -2, 0), (alpha, -1, 0), (0, 1.5, 0), (alpha / 4, alpha / 4 + 1, 4),
                    (alpha / 4, np.inf, 4), (-np.inf, alpha / 4, 4),
                ][rng.integers(8)]  # fmt: skip
                if (a or mode) and rng.random() < 0.5:
                    a, b, mode = a / 8, b / 8 if mode else b, mode | 1
                entry_ab[row, entry] = a, b
                # above or below a threshold, of what is seen here, was stored before, or was stored over the prompt; or
                # a probe, which does nothing
                condition = [0, 0, 8, 16, 8 | 32, 16 | 32, 64, 8 | 128, 16 | 128][rng.integers(9)]
                if columns and condition & (8 | 16) and rng.random() < 0.5:
                    condition |= 2 << 8  # counted in the second column, which no direction has
                entry_mode[row, entry] = mode | 2 * int(rng.random() < 0.4) | condition
                entry_gate[row, entry] = rng.integers(PROBES if condition & 32 else SLOTS)
                if condition & 64:
                    entry_gate[row, entry] = rng.integers(WRITTEN_PROBES)
                if condition & 128:
                    entry_gate[row, entry] = rng.integers(REQUESTS) * PROBES + rng.integers(WRITTEN_PROBES, PROBES)
                entry_threshold[row, entry] = rng.normal()
    bank = normal(SLOTS, dimension)
    bank /= bank.norm(dim=1, keepdim=True)
    trace_slot = np.arange(columns, dtype=np.int32) % SLOTS
    trace_slot[1:2] = -1  # the second column is off
    prompt_part = np.zeros((REQUESTS, 2), np.int32)
    if modes:  # two with prompt tokens in this step, whose sums are about as large as the thresholds
        for place in rng.permutation(REQUESTS)[:2]:
            first = int(rng.integers(0, tokens))
            prompt_part[place] = first, min(int(rng.integers(1, 5)), tokens - first)
    any_steered = bool((row_of_token[:tokens] >= 0).any())
    return Case(
        hidden=hidden,
        residual=normal(tokens, dimension).to(dtype) if residual else None,
        bank=bank,
        row_of_token=torch.from_numpy(row_of_token),
        entry_slot=torch.from_numpy(entry_slot),
        entry_ab=torch.from_numpy(entry_ab),
        entry_mode=torch.from_numpy(entry_mode),
        entry_gate=torch.from_numpy(entry_gate),
        entry_threshold=torch.from_numpy(entry_threshold),
        probe=normal(tokens + SPARE_TOKENS, PROBES),
        prompt_sums=normal(REQUESTS, PROBES),
        prompt_part=torch.from_numpy(prompt_part),
        keep=torch.from_numpy(rng.integers(0, 2, REQUESTS).astype(np.int32)),
        segment=torch.from_numpy(segment),
        sums=normal(REQUESTS, dimension),
        last=normal(REQUESTS, dimension),
        trace_slot=torch.from_numpy(trace_slot),
        trace=normal(tokens + SPARE_TOKENS, columns),
        cut=torch.zeros(rows, dtype=torch.int32),
        rows=normal(0 if stored is None else tokens + SPARE_TOKENS, dimension),
        flags=torch.tensor(
            [
                entries if any_steered else 0,
                len(segment) if segment[:, 1].any() else 0,
                TRACED * (columns > 0) | ROWS * bool(stored),
                0,
            ],
            dtype=torch.int32,
        ),
    )


def over_prompt(count: int) -> Case:
    """The last token has three entries, gated by sums over ``count`` prompt tokens of this step and those before it.

    The first holds by a little, the second fails by a little, and the third looks at a prompt without a part.
    """
    case = make_case(17, tokens=count + 1, entries=3, steered="none", read="none")
    place, probe = 2, 3
    case.prompt_part[place] = torch.tensor([0, count])
    total = case.prompt_sums[place, probe].double() + case.probe[:count, probe].double().sum()
    case.row_of_token[count] = 0
    case.entry_slot[0], case.entry_ab[0] = 1, torch.tensor([5.0, 0.0])
    case.entry_mode[0] = torch.tensor([128 | 8, 128 | 16, 128 | 8], dtype=torch.int32)
    case.entry_gate[0] = torch.tensor([place * PROBES + probe] * 2 + [probe], dtype=torch.int32)
    case.entry_threshold[0] = torch.tensor([total - 0.01, total - 0.01, case.prompt_sums[0, probe] - 0.01])
    case.flags[0] = 3
    return case


def with_blocks(case: Case, size: int, spare: int = 3) -> Case:
    """Behind each request's segment the sums of its blocks of ``size`` tokens, in rows in no particular order."""
    tokens = [(first, first + count) for first, count in case.segment.tolist()]
    parts = [(at, min(size, end - at)) for first, end in tokens for at in range(first, end, size)]
    segments = torch.tensor([*case.segment.tolist(), *parts], dtype=torch.int32).reshape(-1, 2)
    rows = REQUESTS + torch.randperm(len(parts) + spare, generator=torch.Generator().manual_seed(1))[: len(parts)]
    sums = torch.full((REQUESTS + len(parts) + spare, case.sums.shape[1]), torch.nan)  # of older content
    sums[:REQUESTS] = case.sums
    flags = case.flags.clone()
    flags[READ] = len(segments)
    keep = torch.cat([case.keep, -rows.int()])
    return replace(case, keep=keep, segment=segments, sums=sums, last=sums.clone(), flags=flags)


@dataclass(frozen=True)
class Expected:
    """The results that ``loop`` expects: float64 values, the marks of cut rows, and the tokens that must not change."""

    hidden: np.ndarray
    sums: np.ndarray
    last: np.ndarray
    trace: np.ndarray
    probe: np.ndarray
    cut: np.ndarray
    rows: np.ndarray
    untouched: list[int]


def _stopped(new: float, own: float, beside: float) -> float:
    """The new value of an element in a float16 stream: hidden, and hidden + residual, stop at the limit."""
    for before, offset in ((own + beside, beside), (own, 0.0)):
        if new > own and new + offset > max(FLOAT16_LIMIT, before):
            new = max(FLOAT16_LIMIT, before) - offset
        elif new < own and new + offset < min(-FLOAT16_LIMIT, before):
            new = min(-FLOAT16_LIMIT, before) - offset
    return new


def _entry(h: np.ndarray, d: np.ndarray, a: float, b: float, mode: int) -> np.ndarray:
    """One entry; bits of the mode: 1 relative, 2 keep the norm, 4 clamp."""
    length, p = np.linalg.norm(h), h @ d
    unit = length if mode & 1 else 1.0
    c = np.clip(p, a * unit, b * unit) - p if mode & 4 else a * unit + b * p
    moved: np.ndarray = h + c * d
    if mode & 2 and np.linalg.norm(moved) > 0:
        moved = moved * length / np.linalg.norm(moved)
    return moved


def loop(case: Case, hidden_after: np.ndarray | None = None) -> Expected:
    """The loop of ``ops/reference.py`` in float64.

    Args:
        hidden_after: the steered hidden states to read from, as the implementation under test rounded them, so that
            its rounding does not enter the comparison of sums; None reads from this loop's own.
    """
    bank = case.bank.double().numpy()
    hidden = case.hidden.double().numpy().copy()
    tokens = len(hidden)
    residual = np.zeros_like(hidden) if case.residual is None else case.residual.double().numpy()
    sums, last, trace = (tensor.double().numpy().copy() for tensor in (case.sums, case.last, case.trace))
    probe = case.probe.double().numpy().copy()
    cut = case.cut.numpy().copy()
    untouched = []
    for t in range(tokens):
        row = int(case.row_of_token[t])
        h = hidden[t] + residual[t]
        touched = False
        if row >= 0:
            for e in range(case.entry_slot.shape[1]):
                slot = int(case.entry_slot[row, e])
                a, b = case.entry_ab[row, e].tolist()
                if slot >= 0:
                    touched = True
                    mode, gate = int(case.entry_mode[row, e]), int(case.entry_gate[row, e])
                    if mode & 64:
                        probe[t, gate] = h @ bank[slot]
                        continue
                    if mode & (8 | 16):
                        if mode & 128:
                            first, count = case.prompt_part[gate // PROBES].tolist()
                            seen = float(case.prompt_sums[gate // PROBES, gate % PROBES])
                            seen += probe[first : first + count, gate % PROBES].sum()
                        else:
                            seen = probe[t, gate] if mode & 32 else h @ bank[gate]
                        bound = case.entry_threshold[row, e]
                        holds = bool(seen > bound if mode & 8 else seen < bound)
                        if mode >> 8:
                            trace[t, (mode >> 8) - 1] = holds
                        if not holds:
                            continue
                    h = _entry(h, bank[slot], a, b, mode)
        if touched:
            new = h - residual[t]
            if case.hidden.dtype == torch.float16:
                stopped = np.array([_stopped(*one) for one in zip(new, hidden[t], residual[t], strict=True)])
                cut[row] |= bool((stopped != new).any())
                new = stopped
            hidden[t] = new
        else:
            untouched.append(t)
    stream = (hidden if hidden_after is None else hidden_after) + residual
    for s, (first, count) in enumerate(case.segment.tolist()):
        keep = int(case.keep[s])
        row = s if keep >= 0 else -keep
        if keep <= 0:
            sums[row] = 0
        for t in range(first, first + count):
            sums[row] += stream[t]
            last[row] = stream[t]
    for k, slot in enumerate(case.trace_slot.tolist()):
        if slot >= 0:
            trace[:tokens, k] = stream @ bank[slot]
    rows = case.rows.double().numpy().copy()
    if int(case.flags[TRACE]) & ROWS and len(rows):
        rows[:tokens] = stream
    return Expected(hidden, sums, last, trace, probe, cut, rows, untouched)


def check(
    case: Case, implementation: Callable[..., None], device: str = "cpu", rounding: float = 0.51, scale: float = 1.0
) -> None:
    """Assert that an implementation of the op equals ``loop`` on ``case`` and changes no input.

    Args:
        rounding: how far the one rounding to hidden's type may go, in units of its eps.
        scale: the largest α divided by 8.
    """
    if not case.flags[READ]:
        # A reset where nothing is read at the layer has no effect (the accumulator is not read before its next reset),
        # and the fast paths skip it.
        case = replace(case, keep=torch.ones_like(case.keep))
    run = case.copy(device)
    implementation(*run.args())
    got = run.copy() if device == "cpu" else Case(*(None if arg is None else arg.cpu() for arg in run.args()))

    expected = loop(case)
    # One rounding to hidden's type (by default half an ulp, eps/2 relative) on top of float32 arithmetic over D ≤ 600
    # elements and four entries with |α| ≤ 8: about 1e-5 absolute. A wrong coefficient, order or slot errs by over 0.1.
    eps = torch.finfo(case.hidden.dtype).eps
    np.testing.assert_allclose(got.hidden.double().numpy(), expected.hidden, rtol=rounding * eps, atol=2e-5 * scale)
    np.testing.assert_array_equal(got.cut.numpy(), expected.cut)
    np.testing.assert_allclose(got.probe.numpy(), expected.probe, rtol=1e-5, atol=1e-4 * scale)
    for token in expected.untouched:
        assert torch.equal(got.hidden[token], case.hidden[token]), f"token {token} is nobody's and was changed"

    # The rest is read from the implementation's own hidden: float32 sums of at most 70 rows, so 1e-5 whatever
    # hidden's type. A token too many or too few errs by about 1.
    read = loop(case, hidden_after=got.hidden.double().numpy())
    np.testing.assert_allclose(got.sums.numpy(), read.sums, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(got.last.numpy(), read.last, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(got.trace.numpy(), read.trace, rtol=1e-5, atol=1e-4)
    # one float32 addition; a row that was not written is off by about 1
    np.testing.assert_allclose(got.rows.numpy(), read.rows, rtol=1e-6, atol=1e-6)
    for name in (
        "residual",
        "bank",
        "row_of_token",
        "entry_slot",
        "entry_ab",
        "entry_mode",
        "entry_gate",
        "entry_threshold",
        "prompt_sums",
        "prompt_part",
        "keep",
        "segment",
        "flags",
    ):
        before, after = getattr(case, name), getattr(got, name)
        assert before is after or torch.equal(before, after), f"{name} is an input and was changed"
