"""From the token spans of one engine step to the tables that the op reads. Pure: no vLLM, no torch.

A step schedules some tokens of some requests. Request i contributes ``num_scheduled[i]`` consecutive tokens whose
positions in the request start at ``num_computed[i]``. For these the plan says

* which **row** of the entry table each token uses: a request has up to two, one for its prompt tokens and one for its
  generated tokens, chosen by the token's own position, so that a prompt that is computed again after a preemption,
  together with tokens that were generated before it, is steered exactly as the first time;
* which **accumulator** each token is summed into, for requests with a readout;
* which tokens are **traced**, for requests that follow directions token by token.

With speculative decoding the last tokens of a request in a step can be **draft** tokens, of which only the next step's
``num_computed`` tells how many were accepted. Each is summed into a draft accumulator of its own; the next plan says
which of these to add to the request's accumulator before anything else. Drafts follow the last known token, so they lie
behind the prompt.

Letters of shapes: T tokens, R rows, E entries a row, L hooked layers, A accumulators, K trace columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from vllm_steer.trace_columns import Pair, TraceColumns

IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]

STEER, READ, TRACE = 0, 1, 2
"""Columns of ``StepPlan.flags_L3``."""


@dataclass(frozen=True, slots=True)
class Entry:
    """h + (a + b·⟨h,d⟩)·d with d in ``slot`` of the bank, after hooked layer number ``layer_index``."""

    layer_index: int
    slot: int
    a: float
    b: float


@dataclass(frozen=True, slots=True)
class Pooling:
    """The positions [first, end) of a request to sum, at these hooked layers; ``end`` None is open.

    ``trace`` are the directions to follow over the same positions.
    """

    layer_indices: tuple[int, ...]
    first: int
    end: int | None
    trace: tuple[Pair, ...] = ()


@dataclass(frozen=True, slots=True)
class RequestPlan:
    """What one request asks, resolved to slots and layer indices."""

    prompt_len: int
    prompt_entries: tuple[Entry, ...] = ()
    generated_entries: tuple[Entry, ...] = ()
    pooling: Pooling | None = None

    @property
    def steers(self) -> bool:
        return bool(self.prompt_entries or self.generated_entries)


@dataclass(slots=True)
class PoolingState:
    """How far the readout of one request has come.

    Attributes:
        accumulator: its row in the accumulators.
        next_position: position of the token that must be computed next for the sum to be complete.
        num_tokens: tokens in the sum so far.
        failure: why the sum cannot be right, or None.
        drafts: draft accumulators of the draft tokens from ``next_position`` on that were computed in its last step and
            may have been accepted.
    """

    accumulator: int
    next_position: int = 0
    num_tokens: int = 0
    failure: str | None = None
    drafts: range = range(0)


@dataclass(frozen=True, slots=True)
class TracedTokens:
    """The step's tokens [token, token + count) are those of the request from ``position`` on, and are traced.

    The last ``num_drafts`` of them are draft tokens.
    """

    request_id: str
    token: int
    position: int
    count: int
    num_drafts: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The tables of one step. Entry tables and trace slots are None when they are those of the step before.

    ``accepted`` are pairs (accumulator, draft accumulator): the second is to be added to the first before the step.
    """

    num_tokens: int
    row_of_token_T: IntArray
    accumulator_of_token_T: IntArray
    keep_A: FloatArray
    last_token_A: IntArray
    flags_L3: IntArray
    entry_slot_LRE: IntArray | None
    entry_ab_LRE2: FloatArray | None
    trace_slot_LK: IntArray | None
    traced: list[TracedTokens] = field(default_factory=list)
    accepted: list[tuple[int, int]] = field(default_factory=list)


class BatchPlanner:
    """Keeps what the active requests ask and builds the plan of each step.

    Args:
        num_layers: L, hooked layers.
        max_requests: requests that can be scheduled in one step; R = 2·max_requests.
        max_entries: E, entries of one row at one layer.
        trace_columns: K, directions that can be traced at once.
        max_drafts: draft tokens of one request in one step; A = max_requests·(1 + max_drafts), the accumulators of all
            requests first and the draft accumulators of each in turn behind them.

    Attributes:
        columns: request -> its trace columns, one for each direction of ``Pooling.trace``; a request is not in here if
            it traces nothing, or if too few columns were free when it came.
    """

    def __init__(
        self, num_layers: int, max_requests: int, max_entries: int, trace_columns: int, max_drafts: int = 0
    ) -> None:
        self.num_layers = num_layers
        self.max_requests = max_requests
        self.max_entries = max_entries
        self.max_drafts = max_drafts
        self.requests: dict[str, RequestPlan] = {}
        self.poolings: dict[str, PoolingState] = {}
        self.columns: dict[str, tuple[int, ...]] = {}
        self._trace_columns = TraceColumns(num_layers, trace_columns)
        self._free_accumulators = list(range(max_requests - 1, -1, -1))
        self._tables_for: tuple[RequestPlan, ...] = ()
        self._depth_L = np.zeros(num_layers, np.int32)
        self._is_idle = True

    def add(self, request_id: str, plan: RequestPlan) -> None:
        """Start planning for a request that has come to the worker."""
        self.requests[request_id] = plan
        if plan.pooling is not None and plan.pooling.trace:
            columns = self._trace_columns.bind(request_id, plan.pooling.trace)
            if columns is not None:
                self.columns[request_id] = columns

    def remove(self, request_id: str) -> None:
        """Forget a finished request and free its accumulator and trace columns."""
        plan = self.requests.pop(request_id, None)
        if plan is not None and plan.pooling is not None:
            self._trace_columns.release(request_id, plan.pooling.trace)
        self.columns.pop(request_id, None)
        self._release(request_id)

    def preempt(self, request_id: str) -> None:
        """Free the accumulator of a request that will be computed again from position 0."""
        self._release(request_id)

    def build(
        self,
        request_ids: Sequence[str],
        num_computed: Sequence[int],
        num_scheduled: Sequence[int],
        drafts: Mapping[str, Sequence[int]] = MappingProxyType({}),
    ) -> StepPlan | None:
        """The plan of a step, or None when this step and the one before do nothing at all.

        Args:
            request_ids: requests in the order of their tokens in the batch.
            num_computed: tokens of each request that were computed before this step.
            num_scheduled: tokens of each request in this step, its draft tokens included.
            drafts: request -> its draft tokens, for requests that have any.
        """
        if not self.requests:
            if self._is_idle:
                return None
            self._is_idle = True
            return self._blank(int(np.sum(num_scheduled)))
        plan = self._blank(int(np.sum(num_scheduled)))
        self._is_idle = False
        steered: list[RequestPlan] = []
        offset = 0
        for request_id, computed, scheduled in zip(request_ids, num_computed, num_scheduled, strict=True):
            request = self.requests.get(request_id)
            if request is not None:
                if request.steers:
                    row = 2 * len(steered)
                    steered.append(request)
                    split = offset + min(max(request.prompt_len - computed, 0), scheduled)
                    if request.prompt_entries:
                        plan.row_of_token_T[offset:split] = row
                    if request.generated_entries:
                        plan.row_of_token_T[split : offset + scheduled] = row + 1
                if request.pooling is not None:
                    num_drafts = len(drafts.get(request_id, ()))
                    if request_id not in self.poolings:
                        self.poolings[request_id] = PoolingState(self._free_accumulator(request_ids))
                    self._pool(plan, request_id, request.pooling, offset, int(computed), int(scheduled), num_drafts)
            offset += scheduled
        entry_slot_LRE, entry_ab_LRE2 = self._tables(tuple(steered))
        if (plan.row_of_token_T >= 0).any():
            plan.flags_L3[:, STEER] = self._depth_L
        return replace(plan, entry_slot_LRE=entry_slot_LRE, entry_ab_LRE2=entry_ab_LRE2)

    def _blank(self, num_tokens: int) -> StepPlan:
        num_accumulators = self.max_requests * (1 + self.max_drafts)
        return StepPlan(
            num_tokens=num_tokens,
            row_of_token_T=np.full(num_tokens, -1, np.int32),
            accumulator_of_token_T=np.full(num_tokens, -1, np.int32),
            keep_A=np.ones(num_accumulators, np.float32),
            last_token_A=np.full(num_accumulators, -1, np.int32),
            flags_L3=np.zeros((self.num_layers, 3), np.int32),
            entry_slot_LRE=None,
            entry_ab_LRE2=None,
            trace_slot_LK=self._trace_columns.take_changes(),
        )

    def _free_accumulator(self, request_ids: Sequence[str]) -> int:
        """An accumulator for a request of this step.

        There are as many as requests can run, but one that was preempted in a step without tokens, of which no planner
        hears, still has its own. So where none is left, one is taken from a request that is not in this step: a
        preempted one begins again anyway, and the readout of any other fails at its next token.
        """
        if not self._free_accumulators:
            self._release(next(holder for holder in self.poolings if holder not in request_ids))
        return self._free_accumulators.pop()

    def _release(self, request_id: str) -> None:
        state = self.poolings.pop(request_id, None)
        if state is not None:
            self._free_accumulators.append(state.accumulator)

    def _pool(
        self,
        plan: StepPlan,
        request_id: str,
        pooling: Pooling,
        offset: int,
        computed: int,
        scheduled: int,
        num_drafts: int,
    ) -> None:
        state = self.poolings[request_id]
        if computed == 0:
            state.next_position, state.num_tokens, state.drafts = 0, 0, range(0)
        num_accepted = computed - state.next_position
        if not 0 <= num_accepted <= len(state.drafts) and state.failure is None:
            state.failure = (
                f"the engine went on at token {computed} where token {state.next_position} was due, so the activations "
                "in between were not seen"
            )
        if state.failure is not None:
            return
        if pooling.end is None:
            plan.accepted.extend((state.accumulator, draft) for draft in state.drafts[:num_accepted])
            state.num_tokens += num_accepted
        first_draft = self.max_requests + state.accumulator * self.max_drafts
        state.next_position = computed + scheduled - num_drafts
        state.drafts = range(first_draft, first_draft + num_drafts)
        start = max(computed, pooling.first)
        end = computed + scheduled if pooling.end is None else min(state.next_position, pooling.end)
        if start >= end:
            return
        if start == pooling.first:
            plan.keep_A[state.accumulator] = 0.0
            state.num_tokens = 0
        known = min(end, state.next_position) - start  # the tokens behind them are drafts
        token = offset + start - computed
        if known > 0:
            state.num_tokens += known
            plan.accumulator_of_token_T[token : token + known] = state.accumulator
            plan.last_token_A[state.accumulator] = token + known - 1
        if end > state.next_position:
            plan.accumulator_of_token_T[token + known : token + end - start] = state.drafts
            plan.keep_A[state.drafts] = 0.0
        plan.flags_L3[list(pooling.layer_indices), READ] += end - start
        if request_id in self.columns:
            plan.traced.append(TracedTokens(request_id, token, start, end - start, end - start - known))
            plan.flags_L3[[layer_index for layer_index, _ in pooling.trace], TRACE] = 1

    def _tables(self, steered: tuple[RequestPlan, ...]) -> tuple[IntArray | None, FloatArray | None]:
        """The entry tables for these requests in this order, or (None, None) if they stand already."""
        if len(steered) == len(self._tables_for) and all(
            new is old for new, old in zip(steered, self._tables_for, strict=True)
        ):
            return None, None
        self._tables_for = steered
        shape = (self.num_layers, 2 * self.max_requests, self.max_entries)
        slots, coefficients = np.full(shape, -1, np.int32), np.zeros((*shape, 2), np.float32)
        depth_L = np.zeros(self.num_layers, np.int32)
        for index, request in enumerate(steered):
            for row, entries in ((2 * index, request.prompt_entries), (2 * index + 1, request.generated_entries)):
                filled: dict[int, int] = {}
                for entry in entries:
                    column = filled.get(entry.layer_index, 0)
                    slots[entry.layer_index, row, column] = entry.slot
                    coefficients[entry.layer_index, row, column] = entry.a, entry.b
                    filled[entry.layer_index] = column + 1
                for layer_index, count in filled.items():
                    depth_L[layer_index] = max(depth_L[layer_index], count)
        self._depth_L = depth_L
        return slots, coefficients
