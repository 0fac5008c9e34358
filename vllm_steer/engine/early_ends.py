"""Ends requests early, by what a step has shown of their stream: it left its range, or a watch of theirs holds.

The worker returns what it saw with the output of the same step (``worker.step_marks``). The scheduler patch in this
module ends those requests before tokens are emitted that they must not show.

* The op cuts a float16 stream off at its limit and marks the request's row (``ops.reference``). The request ends with
  an error, and its KV stays out of the prefix cache.
* The projections of generated tokens onto the direction of ``Readout.stop`` come as numbers. The step that computes a
  token also samples the next one, which is dropped when the watch holds. So the request ends with the token that made
  it hold, whatever else was under way.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import RequestStatus

from vllm_steer.engine.patching import Attribute, patch
from vllm_steer.engine.resolved_spec import ResolvedReadout, Watched, resolved_of
from vllm_steer.errors import NoTraceColumn, SteerError, StreamOverflow
from vllm_steer.ops.stream_range import FLOAT16_LIMIT
from vllm_steer.plan.watch_run import WatchRun
from vllm_steer.schema.readout import stop_reason

_PREFIX = "vllm_steer: "
CUT_OFF_REASON = (
    f"{_PREFIX}steering pushed the residual stream beyond ±{FLOAT16_LIMIT:g}, the limit in float16, so the "
    "request was ended; allowed: additions that stay within the limit. Use smaller alphas, or start the engine with "
    "dtype='bfloat16'."
)
UNWATCHED_REASON = (
    f"{_PREFIX}all trace columns were taken by other requests, so the stop of this one could not be watched and it "
    "was ended; allowed: as many directions at a time as there are columns. Send it again later, or start the engine "
    "with steer_config(trace_columns=...) larger."
)
_REFUSALS: dict[str, type[SteerError]] = {CUT_OFF_REASON: StreamOverflow, UNWATCHED_REASON: NoTraceColumn}


@dataclass(frozen=True, slots=True)
class Watching:
    """Projections of consecutive tokens of a request with a stop onto its direction.

    Attributes:
        request_id: the internal id.
        position: position of the first of these tokens.
        values: one for each token; those of rejected draft tokens come last.
    """

    request_id: str
    position: int
    values: list[float]


@dataclass(frozen=True, slots=True)
class StepMarks:
    """What a step has shown of requests that may have to end, by internal id.

    Attributes:
        cut_off: requests whose stream was cut off.
        unwatched: requests with a stop for which no trace column was free.
        watching: the new projections of those with a stop.
    """

    cut_off: list[str] = field(default_factory=list)
    unwatched: list[str] = field(default_factory=list)
    watching: list[Watching] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.cut_off or self.unwatched or self.watching)


def install() -> None:
    """Install the patch of the scheduler."""
    UPDATE_FROM_OUTPUT.install()


def refusal(reason: object) -> SteerError | None:
    """The error that ended a sample with this ``stop_reason``; None if it was none of ours."""
    kind = _REFUSALS.get(reason) if isinstance(reason, str) else None
    return None if kind is None else kind(str(reason).removeprefix(_PREFIX))


def _update_from_output(original: Any) -> Any:
    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        marks = MARKS.of(model_runner_output)
        if marks is None:
            return original(self, scheduler_output, model_runner_output)
        cut_off = [one for one in marks.cut_off if _is_live(self, one)]
        if cut_off:
            cut_off += _sharing(self, cut_off)
        failed = dict.fromkeys(cut_off, CUT_OFF_REASON)
        failed |= {one: UNWATCHED_REASON for one in marks.unwatched if _is_live(self, one) and one not in failed}
        for request_id in failed:  # drop their tokens, which could end them for another reason
            _keep_tokens(model_runner_output, request_id, 0)
        stopped = []
        for one in marks.watching:
            if one.request_id not in failed and _is_live(self, one.request_id):
                shown = _shown(self.requests[one.request_id], one, model_runner_output)
                if shown is not None:
                    _keep_tokens(model_runner_output, one.request_id, shown)
                    stopped.append(one.request_id)
        outputs = original(self, scheduler_output, model_runner_output)
        for request_id in cut_off:
            self.kv_cache_manager.evict_blocks(_steered_blocks(self, self.requests[request_id]))
        for request_id, reason in failed.items():
            _end(self, request_id, RequestStatus.FINISHED_ERROR, FinishReason.ERROR, reason, outputs)
        for request_id in stopped:
            if _is_live(self, request_id):  # an end of sequence can come before the stop
                reason = stop_reason(_stop_of(self.requests[request_id]).name)
                _end(self, request_id, RequestStatus.FINISHED_STOPPED, FinishReason.STOP, reason, outputs)
        return outputs

    return update_from_output


def _is_live(scheduler: Any, request_id: str) -> bool:
    return request_id in scheduler.requests and not scheduler.requests[request_id].is_finished()


def _shown(request: Any, watching: Watching, output: Any) -> int | None:
    """How many of a step's sampled tokens a request shows if its stop holds; None while it does not hold."""
    if request.num_stale_output_tokens and request.drop_stale_output:  # the scheduler drops the step's tokens
        return None
    run = WATCH_RUN.of(request)
    if run is None:
        run = WatchRun(_stop_of(request), first=request.num_prompt_tokens)
        WATCH_RUN.put(request, run)
    # The step's input is the last token so far and its drafts, of which one less was accepted than was sampled.
    sampled = _tokens(output, watching.request_id)
    num_real = request.num_tokens + max(len(sampled) - 1, 0) - watching.position
    held = run.see(watching.position, watching.values[: max(num_real, 0)])
    return None if held is None else max(held + 1 - request.num_tokens, 0)


def _stop_of(request: Any) -> Watched:
    resolved = resolved_of(request)
    stop = None if resolved is None else ResolvedReadout.load(resolved["readout"]).stop
    assert stop is not None  # or it would not be watched
    return stop


def _tokens(output: Any, request_id: str) -> list[int]:
    """The tokens that the step sampled for a request."""
    at = output.req_id_to_index.get(request_id)
    return [] if at is None or not output.sampled_token_ids else list(output.sampled_token_ids[at])


def _keep_tokens(output: Any, request_id: str, count: int) -> None:
    """Drop the tokens that the step sampled for a request, but for the first ``count``."""
    sampled = _tokens(output, request_id)
    if sampled:
        output.sampled_token_ids[output.req_id_to_index[request_id]] = sampled[:count]


def _sharing(scheduler: Any, failed: list[str]) -> list[str]:
    """Running requests that read steered KV of the failed ones from the prefix cache before its eviction."""
    own = set().union(*(_steered_blocks(scheduler, scheduler.requests[one]) for one in failed))
    return [
        request.request_id
        for request in scheduler.running
        if request.request_id not in failed and not own.isdisjoint(_steered_blocks(scheduler, request))
    ]


def _steered_blocks(scheduler: Any, request: Any) -> set[int]:
    """Ids of the request's blocks from its first steered token on."""
    resolved = resolved_of(request)
    steered = [] if resolved is None else [start for start, entries, _ in resolved["windows"] if entries]
    if not steered:
        return set()
    first = steered[0]
    manager = scheduler.kv_cache_manager
    groups = manager.kv_cache_config.kv_cache_groups
    blocks: set[int] = set()
    for group, ids in zip(groups, manager.get_block_ids(request.request_id), strict=True):
        blocks.update(ids[first // group.kv_cache_spec.block_size :])
    return blocks - {manager.block_pool.null_block.block_id}


def _end(
    scheduler: Any, request_id: str, status: RequestStatus, finish: FinishReason, reason: str, outputs: Any
) -> None:
    """End a request and say so to its front end."""
    request = scheduler.requests[request_id]
    scheduler.finish_requests(request_id, status)
    told = EngineCoreOutput(request_id=request_id, new_token_ids=[], finish_reason=finish, stop_reason=reason)
    if request.client_index in outputs:
        outputs[request.client_index].outputs.append(told)
    else:
        outputs[request.client_index] = EngineCoreOutputs(outputs=[told])


_GONE = "a worker can end one request."
UPDATE_FROM_OUTPUT = patch(
    Scheduler,
    "update_from_output",
    _update_from_output,
    takes="self, scheduler_output, model_runner_output",
    why="A request whose steered stream was cut off must end with an error before its tokens are emitted, and its "
    "blocks must leave the prefix cache; one whose stop holds must end before the next token is emitted.",
    gone_when=_GONE,
)
MARKS: Attribute[StepMarks] = Attribute(
    "ModelRunnerOutput",
    "vllm_steer_marks",
    why="What the step has shown of requests that may have to end.",
    gone_when=_GONE,
)
WATCH_RUN: Attribute[WatchRun] = Attribute(
    "Request",
    "vllm_steer_watch_run",
    why="How many tokens in a row a request's stop has held for.",
    gone_when=_GONE,
)
