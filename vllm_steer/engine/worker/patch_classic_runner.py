"""The classic runner: wrappers for GPUModelRunner and for CPUModelRunner, which derives from it."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_steer.engine.patching import patch
from vllm_steer.engine.reader_blocks import STEP_BLOCKS
from vllm_steer.engine.worker.worker_steering import equip, steering_of
from vllm_steer.errors import UnsupportedFeature


def install() -> None:
    """Install the patches of the classic runner."""
    for one in (LOAD_MODEL, PREPARE_INPUTS, REQUEST_STATE_REMOVED, DUMMY_RUN):
        one.install()


def _load_model(original: Any) -> Any:
    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        equip(self, self.get_model())

    return load_model


def _prepare_inputs(original: Any) -> Any:
    def _prepare_inputs(self: Any, scheduler_output: Any, num_scheduled_tokens: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = original(self, scheduler_output, num_scheduled_tokens, *args, **kwargs)
        steering = steering_of(self)
        if steering is not None:
            if self.get_model() is not steering.model:
                raise UnsupportedFeature(
                    "the runner's model was replaced after the hooks were put on it, so nothing would be steered; "
                    "allowed: new weights in the model that was loaded. Start the engine again."
                )
            for request_id in scheduler_output.preempted_req_ids or ():
                steering.preempt(request_id)
            for new in scheduler_output.scheduled_new_reqs:
                steering.begin(new.req_id, new.sampling_params)
            steering.blocks = STEP_BLOCKS.of(scheduler_output)
            batch, count = self.input_batch, self.input_batch.num_reqs
            steering.prepare(
                batch.req_ids[:count],
                batch.num_computed_tokens_cpu[:count].tolist(),
                num_scheduled_tokens[:count].tolist(),
                scheduler_output.scheduled_spec_decode_tokens,
            )
        return prepared

    return _prepare_inputs


def _on_request_state_removed(original: Any) -> Any:
    def _on_request_state_removed(self: Any, req_id: str, req_state: Any) -> None:
        original(self, req_id, req_state)
        steering = steering_of(self)
        if steering is not None:
            steering.finish(req_id)

    return _on_request_state_removed


def _dummy_run(original: Any) -> Any:
    def _dummy_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        steering = steering_of(self)
        if steering is not None:
            steering.silence()
        return original(self, *args, **kwargs)

    return _dummy_run


_CLASSIC = "workers of an engine with steer_config, classic runner"
LOAD_MODEL = patch(
    (GPUModelRunner, CPUModelRunner),
    "load_model",
    _load_model,
    takes="self, ...",
    why="Hooks must be registered after the weights are loaded and before the first call, which is traced.",
    gone_when="a plugin is called with the loaded model.",
    when=_CLASSIC,
)
PREPARE_INPUTS = patch(
    GPUModelRunner,
    "_prepare_inputs",
    _prepare_inputs,
    takes="self, scheduler_output, num_scheduled_tokens, ...",
    why="Here the order and the token spans of the batch are final, and no part of the step has run yet.",
    gone_when="the classic runner is gone, or has an extension point like the V2 runner's ModelState.",
    when=_CLASSIC,
)
REQUEST_STATE_REMOVED = patch(
    GPUModelRunner,
    "_on_request_state_removed",
    _on_request_state_removed,
    takes="self, req_id, req_state",
    why="vLLM's own hook for platform runners, called when a request has finished; plugins cannot subclass the runner.",
    gone_when="the classic runner is gone, or has an extension point like the V2 runner's ModelState.",
    when=_CLASSIC,
)
DUMMY_RUN = patch(
    GPUModelRunner,
    "_dummy_run",
    _dummy_run,
    takes="self, ...",
    why="Warm-up, profiling and graph capture must see an untouched token map.",
    gone_when="the classic runner is gone, or has an extension point like the V2 runner's ModelState.",
    when=_CLASSIC,
)
