"""Ends requests whose steered stream was cut off, with the reason, and keeps their KV out of the prefix cache.

The op cuts a float16 stream off at its limit and marks the request's row (``ops.reference``). The worker returns the
marks with the output of the same step (``worker.cut_off_marks``). The scheduler patch in this module ends those
requests before their tokens are emitted.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import RequestStatus

from vllm_steer.engine.patching import Attribute, patch
from vllm_steer.engine.resolved_spec import RESOLVED_KEY
from vllm_steer.ops.stream_range import FLOAT16_LIMIT

REASON_PREFIX = "vllm_steer: "
_REASON = (
    f"{REASON_PREFIX}steering pushed the residual stream beyond ±{FLOAT16_LIMIT:g}, the limit in float16, so the "
    "request was ended; allowed: additions that stay within the limit. Use smaller alphas, or start the engine with "
    "dtype='bfloat16'."
)


def install() -> None:
    """Install the patch of the scheduler."""
    UPDATE_FROM_OUTPUT.install()


def _update_from_output(original: Any) -> Any:
    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        cut_off = CUT_OFF.of(model_runner_output) or ()
        failed = [one for one in cut_off if one in self.requests and not self.requests[one].is_finished()]
        if not failed:
            return original(self, scheduler_output, model_runner_output)
        failed += _sharing(self, failed)
        for request_id in failed:  # drop their tokens, which could end them for another reason
            if model_runner_output.sampled_token_ids and request_id in model_runner_output.req_id_to_index:
                model_runner_output.sampled_token_ids[model_runner_output.req_id_to_index[request_id]] = []
        outputs = original(self, scheduler_output, model_runner_output)
        for request_id in failed:
            _end(self, self.requests[request_id], outputs)
        return outputs

    return update_from_output


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
    extra = (request.sampling_params.extra_args if request.sampling_params is not None else None) or {}
    resolved = extra.get(RESOLVED_KEY)
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


def _end(scheduler: Any, request: Any, outputs: Any) -> None:
    """End a request with the reason, and evict its steered KV from the prefix cache."""
    scheduler.kv_cache_manager.evict_blocks(_steered_blocks(scheduler, request))
    scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ERROR)
    told = EngineCoreOutput(
        request_id=request.request_id, new_token_ids=[], finish_reason=FinishReason.ERROR, stop_reason=_REASON
    )
    if request.client_index in outputs:
        outputs[request.client_index].outputs.append(told)
    else:
        outputs[request.client_index] = EngineCoreOutputs(outputs=[told])


_GONE = "a worker can fail one request."
UPDATE_FROM_OUTPUT = patch(
    Scheduler,
    "update_from_output",
    _update_from_output,
    takes="self, scheduler_output, model_runner_output",
    why="A request whose steered stream was cut off must end with an error before its tokens are emitted, and its "
    "blocks must leave the prefix cache.",
    gone_when=_GONE,
)
CUT_OFF: Attribute[list[str]] = Attribute(
    "ModelRunnerOutput",
    "vllm_steer_cut_off",
    why="The internal ids of requests whose steered stream was cut off in the step.",
    gone_when=_GONE,
)
