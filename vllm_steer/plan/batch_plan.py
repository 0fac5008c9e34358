"""Turns the token spans of one engine step into the tables that the op reads. Pure: no vLLM, no torch.

A step schedules some tokens of some requests. Request i contributes ``num_scheduled[i]`` consecutive tokens, starting
at position ``num_computed[i]`` of the request. For these tokens the plan contains

* the **row** of the entry table that each token uses. The steering cuts a request into windows, and each has its row;
  the token's own position decides. After a preemption, the prompt and the tokens generated so far are computed again
  together, and are steered exactly as the first time;
* the **segment** of the step's tokens that each accumulator sums, for requests with a readout;
* the **traced** tokens, for requests that follow directions token by token;
* the **stored** tokens, for requests that want every token's row. These have no segment;
* the **parts of prompts** to sum, for requests with conditions over their prompt.

With speculative decoding the last tokens of a request in a step can be **draft** tokens. Only the next step's
``num_computed`` shows how many were accepted. Each draft is summed into its own draft accumulator. The next plan lists
the draft accumulators to add to the request's accumulator before anything else. Drafts follow the last known token, so
they are never part of the prompt.

A reader that begins within its span has the sums of its cached tokens loaded from rows behind the accumulators, where
segments of KV blocks put them; ``block_sums`` decides which.

Letters of shapes: T tokens, R rows, E entries per row, L hooked layers, A accumulators, K trace columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import cast

from vllm_steer.plan.block_sums import StepBlocks
from vllm_steer.plan.entry_rows import Entry, EntryRows, Packed, pack
from vllm_steer.plan.prompt_sums import PromptSums
from vllm_steer.plan.step_plan import READ, ROWS, STEER, TRACE, TRACED, StepPlan, TracedTokens
from vllm_steer.plan.trace_columns import Pair, TraceColumns

_NONE: Mapping[int, int] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Pooling:
    """The tokens of one request to sum and trace.

    Attributes:
        layer_indices: hooked layers, by index, whose stream is summed.
        first, end: positions [first, end) of the request; with ``end`` None there is no end.
        trace: directions to follow over the same positions.
        watch: directions to follow from position ``watch_first`` on.
        stores_rows: store the row of each token and sum nothing.
        held: conditions to count over the same positions as ``trace``, each as (``HELD``, its number).
    """

    layer_indices: tuple[int, ...]
    first: int
    end: int | None
    trace: tuple[Pair, ...] = ()
    watch: tuple[Pair, ...] = ()
    watch_first: int = 0
    stores_rows: bool = False
    held: tuple[Pair, ...] = ()

    @property
    def followed(self) -> tuple[Pair, ...]:
        """Everything that takes a trace column: that of ``trace``, then of ``watch``, then of ``held``."""
        return self.trace + self.watch + self.held


@dataclass(frozen=True, slots=True)
class RequestPlan:
    """The spec of one request, resolved to bank slots and layer indices.

    Attributes:
        windows: (first position, packed entries) of each window in order. The first begins at 0, each ends where the
            next begins; empty if no token is steered. Given as ``Entry`` objects, they are packed.
        pooling: what to read; None for nothing.
        summed_prompt: the number of prompt tokens if a condition looks at the prompt, else 0.
    """

    windows: tuple[tuple[int, Packed | Sequence[Entry]], ...] = ()
    pooling: Pooling | None = None
    summed_prompt: int = 0

    def __post_init__(self) -> None:
        if not all(isinstance(entries, bytes) for _, entries in self.windows):
            packed = tuple((start, own if isinstance(own, bytes) else pack(own)) for start, own in self.windows)
            object.__setattr__(self, "windows", packed)

    @property
    def packed(self) -> tuple[tuple[int, Packed], ...]:
        """``windows``, packed as they are by now."""
        return cast("tuple[tuple[int, Packed], ...]", self.windows)

    def alike_after(self, position: int) -> float:
        """How many tokens after this one get the same treatment as it and may share its plan; may be infinite."""
        if position < self.summed_prompt:
            return 0
        bounds = [start for start, _ in self.windows]
        if self.pooling is not None:
            bounds += [self.pooling.first, self.pooling.first + 1]  # the sum begins with its first token
            bounds += [] if self.pooling.end is None else [self.pooling.end]
            bounds += [self.pooling.watch_first] if self.pooling.watch else []
        return min((bound for bound in bounds if bound > position), default=math.inf) - position - 1


@dataclass(slots=True)
class PoolingState:
    """Progress of one request's readout.

    Attributes:
        accumulator: its row in the accumulators.
        next_position: position of the token that must be computed next for the sum to be complete.
        num_tokens: tokens in the sum so far.
        failure: reason why the sum is wrong, or None.
        drafts: draft accumulators of the draft tokens of the request's last step, which may have been accepted; without
            the first ``num_unread`` of them.
        num_unread: how many of the draft tokens from ``next_position`` on lie before the readout's first position.
        num_starts: how often the request has begun. A step without tokens tells the worker of no preemption, so the sum
            of a request that came back can be as long as the one before, and only this tells them apart.
    """

    accumulator: int
    next_position: int = 0
    num_tokens: int = 0
    failure: str | None = None
    drafts: range = range(0)
    num_unread: int = 0
    num_starts: int = 0


@dataclass(slots=True)
class _Reads:
    """The reads of a step while its plan is being built.

    Attributes:
        segments: accumulator -> first token and number of tokens.
        layers: the layer indices of each readout.
        growing: states whose sums take in tokens of this step.
        passing: states whose sums take in none, but whose position advances.
        blocks: (first token, number of tokens, row) of each segment of a block.
    """

    segments: dict[int, tuple[int, int]] = field(default_factory=dict)
    layers: set[tuple[int, ...]] = field(default_factory=set)
    growing: list[PoolingState] = field(default_factory=list)
    passing: list[PoolingState] = field(default_factory=list)
    blocks: list[tuple[int, int, int]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _SettledStep:
    """A step with one token per request, whose plan stays valid while each request advances by one token.

    Attributes:
        request_ids, num_computed: those that the next step has if it follows this one.
        steps_left: how many more steps the plan is valid for; may be infinite.
        plan: the plan of this step and of the next.
        reads: the reads of both.
    """

    request_ids: list[str]
    num_computed: list[int]
    steps_left: float
    plan: StepPlan
    reads: _Reads

    def follows(self, request_ids: Sequence[str], num_computed: Sequence[int], num_scheduled: Sequence[int]) -> bool:
        """Whether a step with these spans can use the same plan; arguments as in ``BatchPlanner.build``."""
        return (
            self.request_ids == request_ids and self.num_computed == num_computed and max(num_scheduled, default=0) == 1
        )


class BatchPlanner:
    """Holds the plans of the active requests and builds the plan of each step.

    Args:
        num_layers: L, hooked layers.
        max_requests: requests that can be scheduled in one step.
        max_entries: E, entries of one row at one layer.
        max_windows: windows of one request; R = max_requests·max_windows.
        trace_columns: K, directions that can be traced at once.
        max_drafts: draft tokens of one request in one step. A = max_requests·(1 + max_drafts): the accumulators of all
            requests come first, then the draft accumulators of each of them in turn.

    Attributes:
        requests: request -> its plan.
        poolings: request -> progress of its readout, from its first step on.
        columns: request -> its trace columns, one for each direction of ``Pooling.followed``. A request is missing here
            if it follows nothing, or if too few columns were free when it was added.
    """

    def __init__(
        self,
        num_layers: int,
        max_requests: int,
        max_entries: int,
        trace_columns: int,
        max_drafts: int = 0,
        max_windows: int = 2,
    ) -> None:
        self.num_layers = num_layers
        self.max_requests = max_requests
        self.max_drafts = max_drafts
        self.requests: dict[str, RequestPlan] = {}
        self.poolings: dict[str, PoolingState] = {}
        self.columns: dict[str, tuple[int, ...]] = {}
        self._held_columns: dict[str, dict[int, int]] = {}
        self._rows = EntryRows(num_layers, max_requests, max_entries, max_windows)
        self._prompt_sums = PromptSums(max_requests)
        self._trace_columns = TraceColumns(num_layers, trace_columns)
        self._num_accumulators = max_requests * (1 + max_drafts)
        self._free_accumulators = list(range(max_requests - 1, -1, -1))
        self._settled: _SettledStep | None = None
        self._is_idle = True

    def add(self, request_id: str, plan: RequestPlan) -> None:
        """Start planning for a new request."""
        self._settled = None
        self.requests[request_id] = plan
        if plan.pooling is not None and plan.pooling.followed:
            columns = self._trace_columns.bind(request_id, plan.pooling.followed)
            if columns is not None:
                self.columns[request_id] = columns
                held = plan.pooling.held
                if held:
                    own = columns[-len(held) :]
                    self._held_columns[request_id] = {number: k for (_, number), k in zip(held, own, strict=True)}

    def remove(self, request_id: str) -> None:
        """Forget a finished request and free its rows, accumulator, trace columns and sums over its prompt."""
        plan = self.requests.pop(request_id, None)
        if plan is not None and plan.pooling is not None:
            self._trace_columns.release(request_id, plan.pooling.followed)
        self.columns.pop(request_id, None)
        self._held_columns.pop(request_id, None)
        self._prompt_sums.release(request_id)
        self.preempt(request_id)

    def preempt(self, request_id: str) -> None:
        """Free the rows and the accumulator of a preempted request; it is computed again from position 0.

        It keeps the sums over its prompt.
        """
        self._settled = None
        self._rows.release(request_id)
        self._release(request_id)

    def rows(self) -> dict[str, tuple[int, ...]]:
        """Request -> the row of each of its windows, -1 for one that is not steered.

        Contains every request that has been steered and was not removed or preempted since.
        """
        return self._rows.lent()

    def build(
        self,
        request_ids: Sequence[str],
        num_computed: Sequence[int],
        num_scheduled: Sequence[int],
        drafts: Mapping[str, Sequence[int]] = MappingProxyType({}),
        blocks: StepBlocks | None = None,
    ) -> StepPlan | None:
        """Build the plan of a step; None if there are no requests to plan for, now and in the step before.

        Args:
            request_ids: requests in the order of their tokens in the batch.
            num_computed: number of tokens of each request that were computed before this step.
            num_scheduled: number of tokens of each request in this step, its draft tokens included.
            drafts: request -> its draft tokens, for requests that have any.
            blocks: what the step does with sums of blocks.
        """
        if not self.requests and self._is_idle:
            return None
        self._is_idle = not self.requests
        is_alike = self._settled is not None and not drafts and blocks is None
        if self._settled is not None and is_alike and self._settled.follows(request_ids, num_computed, num_scheduled):
            return self._go_on(self._settled)
        return self._build(request_ids, num_computed, num_scheduled, drafts, blocks or StepBlocks())

    def _go_on(self, settled: _SettledStep) -> StepPlan:
        """Advance all readouts by one token and return the same plan again."""
        for state in settled.reads.growing:
            state.num_tokens += 1
            state.next_position += 1
        for state in settled.reads.passing:
            state.next_position += 1
        following, steps_left = [computed + 1 for computed in settled.num_computed], settled.steps_left - 1
        self._settled = replace(settled, num_computed=following, steps_left=steps_left) if steps_left else None
        return settled.plan

    def _build(
        self,
        request_ids: Sequence[str],
        num_computed: Sequence[int],
        num_scheduled: Sequence[int],
        drafts: Mapping[str, Sequence[int]],
        blocks: StepBlocks,
    ) -> StepPlan:
        plan = StepPlan.blank(self.num_layers, self._num_accumulators, sum(num_scheduled))
        reads = _Reads()
        rows_used: list[int] = []
        steps_left = math.inf if not drafts and max(num_scheduled, default=0) == 1 else 0
        offset = 0
        for request_id, computed, scheduled in zip(request_ids, num_computed, num_scheduled, strict=True):
            request = self.requests.get(request_id)
            if request is not None:
                steps_left = min(steps_left, request.alike_after(computed)) if steps_left else 0
                place = self._sum_prompt(plan, request_id, request, request_ids, offset, computed, scheduled)
                if request.windows:
                    entries_W = [entries for _, entries in request.packed]
                    held_columns = self._held_columns.get(request_id, _NONE)
                    rows = self._rows.lend(request_id, entries_W, request_ids, place, held_columns)
                    end = computed + scheduled
                    for (start, _), row in zip(reversed(request.windows), reversed(rows), strict=True):
                        if start < end:
                            first = max(start, computed)
                            if row >= 0:
                                plan.row_of_token_T[offset + first - computed : offset + end - computed] = row
                                rows_used.append(row)
                            end = first
                        if end == computed:
                            break
                if request.pooling is not None:
                    num_drafts = len(drafts.get(request_id, ())) if drafts else 0
                    if request_id not in self.poolings:
                        self.poolings[request_id] = PoolingState(self._free_accumulator(request_ids))
                    if request_id in blocks.loads:
                        self._load(plan, request_id, request.pooling, computed, blocks.loads[request_id])
                    for first, end, slot in blocks.parts.get(request_id, ()):
                        assert computed <= first < end <= computed + scheduled  # else other tokens would be summed
                        reads.blocks.append((offset + first - computed, end - first, self._num_accumulators + slot))
                        reads.layers.add(request.pooling.layer_indices)
                    self._pool(plan, reads, request_id, request.pooling, offset, computed, scheduled, num_drafts)
                    if request.pooling.watch and request_id in self.columns:
                        _watch(plan, request_id, request.pooling, offset, computed, scheduled, num_drafts)
            offset += scheduled
        if rows_used:
            plan.flags_L3[:, STEER] = self._rows.depth(rows_used)
        if reads.blocks:
            plan = plan.with_blocks(reads.blocks)
        if reads.segments:
            plan.segment_A2[list(reads.segments)] = list(reads.segments.values())
        if reads.segments or reads.blocks:
            plan.flags_L3[sorted(set().union(*reads.layers)), READ] = len(plan.segment_A2)
        self._settled = None
        alone = plan.accepted or plan.traced or plan.watched or plan.stored or plan.parked or plan.returned
        if steps_left and not (alone or plan.loaded or reads.blocks):
            following = [computed + 1 for computed in num_computed]
            self._settled = _SettledStep(list(request_ids), following, steps_left, plan, reads)
        new_rows, trace_slot_LK = self._rows.take_changes(), self._trace_columns.take_changes()
        if not new_rows and trace_slot_LK is None:
            return plan
        return replace(plan, new_rows=new_rows, trace_slot_LK=trace_slot_LK)

    def prompt_sums_of(self, request_id: str) -> int | None:
        """The request's row in the sums over prompts; None without one, or if its prompt has not been computed."""
        request = self.requests.get(request_id)
        return None if request is None else self._prompt_sums.complete(request_id, request.summed_prompt)

    def _sum_prompt(
        self,
        plan: StepPlan,
        request_id: str,
        request: RequestPlan,
        request_ids: Sequence[str],
        offset: int,
        computed: int,
        scheduled: int,
    ) -> int:
        """The request's row in the sums over prompts, 0 for one without; adds its prompt tokens to those to sum."""
        if not request.summed_prompt:
            return 0
        place, is_new = self._prompt_sums.lend(request_id, request_ids, plan)
        if is_new:  # its entries name another place
            self._rows.release(request_id)
        self._prompt_sums.add(request_id, request.summed_prompt, offset, computed, scheduled, plan)
        return place

    def _free_accumulator(self, request_ids: Sequence[str]) -> int:
        """An accumulator for a request of this step.

        If none is free, it is taken from a request that is not in this step, as in ``EntryRows``. If that request was
        preempted, it starts again anyway; otherwise its readout fails at its next token.
        """
        if not self._free_accumulators:
            for absent in [one for one in self.poolings if one not in request_ids][:1]:
                self._release(absent)
        return self._free_accumulators.pop()

    def _load(self, plan: StepPlan, request_id: str, pooling: Pooling, computed: int, slots: tuple[int, ...]) -> None:
        """Begin a readout within its span."""
        state = self.poolings[request_id]
        state.num_starts += 1
        state.next_position, state.drafts, state.num_unread = computed, range(0), 0
        state.num_tokens = (computed if pooling.end is None else min(computed, pooling.end)) - pooling.first
        plan.loaded.append((state.accumulator, tuple(self._num_accumulators + slot for slot in slots)))

    def _release(self, request_id: str) -> None:
        state = self.poolings.pop(request_id, None)
        if state is not None:
            self._free_accumulators.append(state.accumulator)

    def _pool(
        self,
        plan: StepPlan,
        reads: _Reads,
        request_id: str,
        pooling: Pooling,
        offset: int,
        computed: int,
        scheduled: int,
        num_drafts: int,
    ) -> None:
        state = self.poolings[request_id]
        if computed <= pooling.first:  # at a start, the prefix cache may have some of the tokens before the span
            state.num_starts += computed < state.next_position or not state.num_starts
            state.next_position, state.num_tokens, state.drafts, state.num_unread = computed, 0, range(0), 0
        num_accepted = computed - state.next_position
        if not 0 <= num_accepted <= state.num_unread + len(state.drafts) and state.failure is None:
            state.failure = (
                f"the engine went on at token {computed} where token {state.next_position} was due, so the activations "
                "in between were not seen"
            )
        if state.failure is not None:
            return
        num_read = max(num_accepted - state.num_unread, 0)
        if not pooling.stores_rows:
            plan.accepted.extend((state.accumulator, draft) for draft in state.drafts[:num_read])
        state.num_tokens += num_read
        first_draft = self.max_requests + state.accumulator * self.max_drafts
        state.next_position = computed + scheduled - num_drafts
        # A span with an end ends within the prompt, so no draft is in it.
        unread = pooling.first - state.next_position if pooling.end is None else num_drafts
        state.num_unread = min(max(unread, 0), num_drafts)
        state.drafts = range(first_draft, first_draft + num_drafts - state.num_unread)
        start = max(computed, pooling.first)
        end = computed + scheduled if pooling.end is None else min(state.next_position, pooling.end)
        if start >= end:
            reads.passing.append(state)
            return
        reads.growing.append(state)
        if start == pooling.first:
            plan.keep_A[state.accumulator] = 0
            state.num_tokens = 0
        known = max(min(end, state.next_position) - start, 0)  # the tokens after them are drafts
        token = offset + start - computed
        state.num_tokens += known
        if pooling.stores_rows:
            plan.stored.append(TracedTokens(request_id, token, start, end - start, end - start - known))
            plan.flags_L3[list(pooling.layer_indices), TRACE] |= ROWS
        else:
            reads.layers.add(pooling.layer_indices)
            if known > 0:
                reads.segments[state.accumulator] = token, known
            if end > state.next_position:
                first = token + known
                reads.segments.update({draft: (first + index, 1) for index, draft in enumerate(state.drafts)})
                plan.keep_A[state.drafts] = 0
        if (pooling.trace or pooling.held) and request_id in self.columns:
            plan.traced.append(TracedTokens(request_id, token, start, end - start, end - start - known))
            plan.flags_L3[[layer_index for layer_index, _ in pooling.trace], TRACE] |= TRACED


def _watch(
    plan: StepPlan, request_id: str, pooling: Pooling, offset: int, computed: int, scheduled: int, num_drafts: int
) -> None:
    """Note the tokens of a step that a request watches."""
    start, end = max(computed, pooling.watch_first), computed + scheduled
    if start < end:
        token, count = offset + start - computed, end - start
        plan.watched.append(TracedTokens(request_id, token, start, count, min(num_drafts, count)))
        plan.flags_L3[[layer_index for layer_index, _ in pooling.watch], TRACE] |= TRACED
