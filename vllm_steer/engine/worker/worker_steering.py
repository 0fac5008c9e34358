"""The worker's side of the plugin: planner, buffers, traces and finished readouts of one model runner."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from vllm_steer.device.buffers import SteerBuffers
from vllm_steer.directions import Direction
from vllm_steer.directions.direction import content_hash
from vllm_steer.engine.early_ends import StepMarks, Watching
from vllm_steer.engine.layer_classes import LAYER_CLASSES, refuse_rescaled
from vllm_steer.engine.log import logger
from vllm_steer.engine.patching import Attribute
from vllm_steer.engine.reader_blocks import kept_blocks
from vllm_steer.engine.registry import DirectionRegistry, bank_writes, configured_directions
from vllm_steer.engine.resolved_spec import RESOLVED_KEY, Resolved
from vllm_steer.engine.worker.hooked_layers import conventions, put_hooks
from vllm_steer.engine.worker.layer_experiment import examine
from vllm_steer.engine.worker.readout_copies import ReadoutFlow, Summed
from vllm_steer.engine.worker.readout_store import FinishedReadout, ReadoutStore
from vllm_steer.engine.worker.rows import RowFlow, rows_of
from vllm_steer.engine.worker.tail_rows import TailRows
from vllm_steer.engine.worker.traces import Trace, TraceFlow, TraceRows, start_copy
from vllm_steer.errors import DirectionError, MalformedSpec
from vllm_steer.ops.dispatch import why_not_native
from vllm_steer.plan.batch_plan import BatchPlanner
from vllm_steer.plan.block_sums import StepBlocks
from vllm_steer.plan.step_plan import STEER, TracedTokens
from vllm_steer.schema.wire import WIRE_KEY
from vllm_steer.settings import SteerSettings

SampleKey = tuple[str, int]
"""(``Resolved.key`` of the request, sample index)."""


class WorkerSteering:
    """The steering of one runner, which reports its requests and steps here.

    Args:
        settings: the engine's settings.
        runner: the classic runner or the V2 runner's model state; its ``vllm_config`` and ``device`` are read.
        model: the runner's model, loaded and not yet called.

    Raises:
        UnsupportedModel: the layers were not compared with Hugging Face, or are not what they were then.
        LayerNotHooked: the model has no such layer.
    """

    def __init__(self, settings: SteerSettings, runner: Any, model: nn.Module) -> None:
        config = runner.vllm_config
        blocks, self.findings = examine(model, runner)
        how, self.proof = conventions(self.findings, allow_unproven=settings.unproven_model == "experiment")
        refuse_rescaled(self.findings.classes, config.model_config.dtype)
        if self.proof == "experiment":
            logger.warning(
                "steering of %s rests on the experiment at start-up alone: %s was never compared with Hugging Face.",
                config.model_config.architectures[0],
                ", ".join(sorted(self.findings.classes - LAYER_CLASSES.keys())),
            )
        hidden_size = config.model_config.get_hidden_size()
        max_requests, max_drafts = config.scheduler_config.max_num_seqs, config.num_speculative_tokens
        self.settings = settings
        self.model = model
        self.planner = BatchPlanner(
            len(settings.layers),
            max_requests,
            settings.max_entries,
            settings.trace_columns,
            max_drafts,
            settings.max_windows,
        )
        self.buffers = SteerBuffers(
            num_layers=len(settings.layers),
            hidden_size=hidden_size,
            max_tokens=_most_tokens(config),
            max_requests=max_requests,
            max_entries=settings.max_entries,
            max_directions=settings.max_directions,
            trace_columns=settings.trace_columns,
            device=runner.device,
            max_drafts=max_drafts,
            max_windows=settings.max_windows,
            can_cut=config.model_config.dtype == torch.float16,
            has_rows=settings.max_rows > 0,
            num_blocks=kept_blocks(config, settings),
        )
        if runner.device.type == "cpu" and (why := why_not_native()) is not None:
            logger.warning("steering and reading run in Python, several times slower than compiled: %s", why)
        self.blocks: StepBlocks | None = None  # of the step that is prepared next
        self.store = ReadoutStore(settings.readout_store_mib << 20)
        self._resolved: dict[str, Resolved] = {}
        self._trace_flow, self._readout_flow = TraceFlow(self.buffers.trace_TK), ReadoutFlow(self.buffers)
        self._traces: dict[str, Trace] = {}
        self._watched: dict[str, Trace] = {}  # of live requests with watches
        self._unwatched: set[str] = set()  # live requests with a stop and without a trace column
        self._row_flow, self._stored = RowFlow(self.buffers.rows_L_TD), dict[str, Trace]()  # those of live requests
        self._reading: dict[SampleKey, str] = {}  # sample -> internal id, of live requests with a readout
        self._taken: dict[str, FinishedReadout] = {}  # internal id -> last readout taken of a live request
        self._ended: list[tuple[SampleKey, Summed]] = []  # finished requests whose readouts are to be taken
        self._tails = TailRows(self.buffers.last_L_AD)
        # Live requests with a readout up to their end that may end at a stop string, or that read their last token.
        self._need_tails: set[str] = set()
        self.hooked = put_hooks(blocks, how, settings.layers, self.findings.num_layers, self.buffers)
        self._contents: dict[int, str] = {}  # slot -> hash of the vector in it
        self._may_cut = False  # whether the step that was last prepared steers a float16 stream
        # Tokens of that step whose requests have a stop, with the trace column of it.
        self._stops_in_step: list[tuple[TracedTokens, int]] = []
        self._unwatched_in_step: list[str] = []
        self._held = {settings.layers.index(layer) for layer in self.hooked}  # of this pipeline stage
        # The front end registers the same files in the same order, so both assign the same slots without a message.
        self.write_directions(
            DirectionRegistry(settings.max_directions, hidden_size).register(configured_directions(settings))
        )

    def write_directions(self, writes: Sequence[tuple[int, Direction]]) -> None:
        """Write directions to their bank slots."""
        for slots, vectors in bank_writes(writes):
            self.write_vectors(slots, np.frombuffer(vectors, dtype="<f4").reshape(len(slots), -1))

    def write_vectors(self, slots: Sequence[int], vectors_ND: npt.NDArray[np.float32]) -> None:
        """Write (N, D) float32 vectors to their N bank slots."""
        self._take_ended()  # ended requests project onto the present contents
        self.buffers.write_directions(slots, vectors_ND)
        self._contents.update(zip(slots, map(content_hash, vectors_ND), strict=True))

    def begin(self, request_id: str, params: Any) -> None:
        """Start to track a request that has reached the worker with these ``SamplingParams``.

        A request that resumes after a preemption is known already and keeps its prompt, trace and columns.

        Raises:
            MalformedSpec: admission has not resolved the spec, so the request would run unsteered.
            DirectionError: a slot of the request holds another vector. No request can cause either of these errors, so
                the engine stops.
        """
        extra = (params.extra_args if params is not None else None) or {}
        if WIRE_KEY in extra and RESOLVED_KEY not in extra:
            raise MalformedSpec(
                f"request {request_id!r} came to the worker with a steering spec that admission has not resolved; "
                "allowed: requests that passed vLLM's InputProcessor with the plugin loaded. Start the engine again."
            )
        if extra.get(RESOLVED_KEY) is not None and request_id not in self._resolved:
            resolved = Resolved.load(extra[RESOLVED_KEY])
            self._check_bank(resolved)
            self._begin(request_id, resolved)
            readout = self._resolved[request_id].readout
            # The last row of a sum with a surplus token is that of the token before it.
            has_stop = bool(params.stop) or (readout is not None and readout.stop is not None)
            is_open = readout is not None and readout.end is None and readout.pool != "rows"  # rows leave it out
            if readout is not None and is_open and (has_stop or readout.pool == "last"):
                self._need_tails.add(request_id)

    def preempt(self, request_id: str) -> None:
        """Drop the sums of a request that will be computed again from its first token."""
        self.planner.preempt(request_id)
        self._taken.pop(request_id, None)

    def prepare(
        self,
        request_ids: Sequence[str],
        num_computed: Sequence[int],
        num_scheduled: Sequence[int],
        drafts: Mapping[str, Sequence[int]],
    ) -> None:
        """Update the buffers for the step that is about to run. The arguments are those of ``BatchPlanner.build``."""
        self.fetch()
        self._take_ended()  # before their accumulators are reused
        poolings = self.planner.poolings
        self._tails.keep(
            {one: poolings[one] for one in self._need_tails if one in poolings and poolings[one].num_tokens}
        )
        blocks, self.blocks = self.blocks, None
        plan = self.planner.build(request_ids, num_computed, num_scheduled, drafts, blocks)
        self.buffers.write(plan)
        self._may_cut = self.buffers.can_cut and plan is not None and bool(plan.flags_L3[:, STEER].any())
        self._unwatched_in_step = [one for one in request_ids if one in self._unwatched] if self._unwatched else []
        if plan is not None:
            rows = [self._rows(tokens) for tokens in plan.traced]
            self._trace_flow.expect([*rows, *(self._watched_rows(tokens) for tokens in plan.watched)])
            self._stops_in_step = [
                (tokens, column)
                for tokens in plan.watched
                if (column := self._stop_column(tokens.request_id)) is not None
            ]
            self._row_flow.expect([self._stored_rows(tokens) for tokens in plan.stored])

    def start_reading_marks(self) -> Callable[[], StepMarks] | None:
        """Start to read what the step shows of requests that may have to end; call it after each forward pass.

        Returns:
            A function that returns the marks, to be called once the device has finished the pass; None if the step can
            have none.
        """
        cut_R, values_TK, first = None, None, 0
        if self._may_cut:
            cut_R, _ = start_copy(self.buffers.cut_R)
        stops, self._stops_in_step = self._stops_in_step, []
        unwatched, self._unwatched_in_step = self._unwatched_in_step, []
        if stops:
            first, end = min(one.token for one, _ in stops), max(one.token + one.count for one, _ in stops)
            values_TK, _ = start_copy(self.buffers.trace_TK[first:end])
            if self.buffers.trace_TK.device.type == "cpu":  # the marks may be asked for after the next pass
                values_TK = values_TK.clone()
        if cut_R is None and values_TK is None and not unwatched:
            return None
        self._may_cut = False
        rows = {} if cut_R is None else self.planner.rows()

        def marks() -> StepMarks:
            cut_off = [] if cut_R is None else _marked_requests(rows, cut_R)
            watching = []
            for one, column in stops:
                assert values_TK is not None  # there is one if there are stops
                at = one.token - first
                values = values_TK[at : at + one.count, column].tolist()
                watching.append(Watching(one.request_id, one.position, values))
            return StepMarks(cut_off, unwatched, watching)

        return marks

    def silence(self) -> None:
        """Mark every token untouched, for a forward pass that serves no request."""
        self.fetch()  # that pass overwrites the rows of the last one
        self.buffers.silence()

    def fetch(self) -> None:
        """Take in the traces and readouts up to the last forward pass that have arrived; never waits for the device."""
        self._trace_flow.fetch()
        self._row_flow.fetch()
        self._readout_flow.fetch()

    def finish(self, request_id: str) -> None:
        """Forget a finished request. Its readout goes to the store together with the others that end in this step."""
        resolved = self._resolved.get(request_id)
        if resolved is not None and resolved.readout is not None:
            key = sample_key(request_id, resolved)
            summed = self._to_take(request_id)
            if summed is not None:
                self._ended.append((key, summed))
            elif request_id in self._taken:
                self.store.put(*key, self._taken[request_id])
            del self._reading[key]
        self._resolved.pop(request_id, None)
        self._traces.pop(request_id, None)
        self._watched.pop(request_id, None)
        self._unwatched.discard(request_id)
        self._stored.pop(request_id, None)
        self._taken.pop(request_id, None)
        self._need_tails.discard(request_id)
        self.planner.remove(request_id)
        self.buffers.forget(request_id)

    def find(self, samples: Sequence[SampleKey]) -> list[FinishedReadout | None]:
        """The readouts of samples, from the store or of requests that are finished but not yet removed; else None."""
        self._take_ended()
        found = [self.store.get(*key) for key in samples]
        # vLLM reports a finished request to the runner with the next step; after the last step there is none.
        live = [self._reading.get(key, "") for key in samples]
        to_take = {
            request_id: summed
            for request_id, readout in zip(live, found, strict=True)
            if readout is None and (summed := self._to_take(request_id)) is not None
        }
        self._taken.update(zip(to_take, self._readout_flow.take([*to_take.values()]), strict=True))
        return [readout or self._taken.get(request_id) for readout, request_id in zip(found, live, strict=True)]

    def trace(self, key: str, index: int) -> tuple[list[str], Trace] | None:
        """The names of the traced directions, empty for those not to show, and the trace of a running sample.

        None if it has not begun or is over.
        """
        request_id = self._reading.get((key, index))
        if request_id is None:
            return None
        readout = self._resolved[request_id].readout
        assert readout is not None  # only requests with a readout are in _reading
        names = [one.name if one.is_shown else "" for one in readout.trace]
        return [*names, *("" for _ in readout.counted)], self._traces[request_id]

    def _check_bank(self, resolved: Resolved) -> None:
        contents = dict(resolved.contents)
        for slot in resolved.slots:
            if self._contents.get(slot) != contents[slot]:
                raise DirectionError(
                    f"request {resolved.request_id!r} names a direction that is not in slot {slot} of the worker's "
                    "bank: a direction file has changed since the engine started, or a registration has failed; "
                    "allowed: directions that front end and workers both hold. Start the engine again."
                )

    def _begin(self, request_id: str, resolved: Resolved) -> None:
        if resolved.readout is not None:
            own = resolved.readout.on_stage(self._held)
            resolved = resolved if own is resolved.readout else replace(resolved, readout=own)
        self._resolved[request_id] = resolved
        self.planner.add(request_id, resolved.plan())
        if resolved.readout is None:
            return
        self._reading[sample_key(request_id, resolved)] = request_id
        readout, failure = resolved.readout, None
        num_traced = len(readout.trace) + len(readout.counted)
        if (num_traced or readout.watch) and request_id not in self.planner.columns:
            failure = (
                f"all {self.settings.trace_columns} trace columns were taken by other requests; send it again "
                "later, or start the engine with steer_config(trace_columns=...) larger"
            )
            if readout.stop is not None:
                self._unwatched.add(request_id)
        self._traces[request_id] = Trace(num_traced, failure)
        if readout.watch:
            self._watched[request_id] = Trace(len(readout.watch), failure)
        if readout.pool == "rows":
            self._stored[request_id] = rows_of(len(readout.layers), self.buffers.bank_SD.shape[1])

    def _rows(self, traced: TracedTokens) -> TraceRows:
        readout = self._resolved[traced.request_id].readout
        assert readout is not None  # only requests with a readout are traced
        trace = self._traces[traced.request_id]
        columns = self.planner.columns[traced.request_id]
        columns = columns[: len(readout.trace)] + columns[len(readout.trace) + len(readout.watch) :]
        start = traced.position - readout.first
        return TraceRows(trace, columns, traced.token, traced.count, start, traced.num_drafts)

    def _watched_rows(self, tokens: TracedTokens) -> TraceRows:
        readout = self._resolved[tokens.request_id].readout
        assert readout is not None  # only requests with a readout are watched
        columns = self.planner.columns[tokens.request_id][len(readout.trace) :][: len(readout.watch)]
        start = tokens.position - readout.watch_first
        return TraceRows(
            self._watched[tokens.request_id], columns, tokens.token, tokens.count, start, tokens.num_drafts
        )

    def _stop_column(self, request_id: str) -> int | None:
        """The trace column of a request's stop; None if it has no stop."""
        readout = self._resolved[request_id].readout
        stop = None if readout is None else readout.stop
        if readout is None or stop is None:
            return None
        return self.planner.columns[request_id][len(readout.trace) + readout.watch.index(stop)]

    def _stored_rows(self, stored: TracedTokens) -> TraceRows:
        readout = self._resolved[stored.request_id].readout
        assert readout is not None  # only requests with a readout store rows
        rows, start = self._stored[stored.request_id], stored.position - readout.first
        return TraceRows(rows, tuple(readout.layer_indices), stored.token, stored.count, start, stored.num_drafts)

    def _to_take(self, request_id: str) -> Summed | None:
        """The present readout of a request; None if nothing was computed for it since it was last taken."""
        state = self.planner.poolings.get(request_id)
        taken = self._taken.get(request_id)
        if state is None or (taken is not None and taken.state == state):
            return None
        readout = self._resolved[request_id].readout
        assert readout is not None  # only requests with a readout are pooled
        before_last = self._tails.before(request_id, state.next_position - 1) if readout.end is None else []
        place = self.planner.prompt_sums_of(request_id) if any(one.gate >= 0 for one in readout.held) else None
        return Summed(
            readout,
            replace(state),
            self._traces.get(request_id),
            before_last,
            watched=self._watched.get(request_id),
            rows=self._stored.get(request_id),
            prompt_sums_G=None if place is None else start_copy(self.buffers.sums_of_prompt(place))[0],
        )

    def _take_ended(self) -> None:
        """Move the readouts of finished requests to the store."""
        ended, self._ended = self._ended, []
        for (key, _), readout in zip(ended, self._readout_flow.take([summed for _, summed in ended]), strict=True):
            self.store.put(*key, readout)


def _marked_requests(rows: Mapping[str, Sequence[int]], cut_R: torch.Tensor) -> list[str]:
    """The requests with a mark at one of their rows."""
    marked = set(cut_R.nonzero()[:, 0].tolist())
    return [one for one, own in rows.items() if not marked.isdisjoint(own)] if marked else []


def sample_key(request_id: str, resolved: Resolved) -> SampleKey:
    """The key of the sample with this internal request id.

    vLLM 0.32 names the only sample of a request ``<external>-<random>``, and sample i of several
    ``<i>_<external>-<random>`` (vllm/v1/engine/input_processor.py, parallel_sampling.py).
    """
    if request_id == resolved.request_id or request_id.startswith(f"{resolved.request_id}-"):
        return resolved.key, 0
    index, _, _ = request_id.partition("_")
    return resolved.key, int(index)


def steering_of(runner: Any) -> WorkerSteering | None:
    """The steering of a runner; None if its engine is not configured for it.

    It is an attribute of the classic runner, or of the V2 runner's model state.
    """
    return STEERING.of(getattr(runner, "model_state", runner))


def equip(runner: Any, model: nn.Module) -> None:
    """Attach steering to a runner or model state whose model has just been loaded, if its engine is configured."""
    settings = SteerSettings.of(runner.vllm_config.additional_config)
    if settings is not None:
        with torch.inference_mode(False):
            STEERING.put(runner, WorkerSteering(settings, runner, model))


def _most_tokens(config: Any) -> int:
    """The maximum number of token rows in one forward pass, graph padding included."""
    captured = config.compilation_config.cudagraph_capture_sizes or [0]
    return int(max(config.scheduler_config.max_num_batched_tokens, max(captured)))


STEERING: Attribute[WorkerSteering] = Attribute(
    "GPUModelRunner, or the V2 runner's ModelState",
    "vllm_steer",
    why="The steering of a runner's model.",
    gone_when="a plugin can add its own part to a runner.",
)
