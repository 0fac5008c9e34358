"""The V2 runner: a ``ModelState`` that derives from the one the model would have had, so that vLLM's own stays.

vLLM makes the model state right after loading the weights and before profiling, compiling and capturing (vllm/v1/
worker/gpu/model_runner.py, ``load_model``, 0.32.0), tells it of every request, and asks it for the inputs of every
forward pass, real or dummy. What it asks with is on the host: request ids in batch order, tokens computed before the
step and tokens of the step. Without draft tokens the first of these counts is exact also under asynchronous scheduling,
where a step is prepared before the tokens of the one before it are known.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from vllm.v1.worker.gpu import model_states
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.model_states.interface import ModelState

from vllm_steer.engine.patching import patch
from vllm_steer.engine.worker.worker_steering import WorkerSteering, equip, steering_of
from vllm_steer.settings import SteerSettings


def install() -> None:
    """Install the patches of the V2 runner."""
    RESOLVE_MODEL_STATE.install()
    FINISH_REQUESTS.install()


class SteeringState(ModelState):
    """Put before a model's own ``ModelState`` class: each method does what that class does, and steering's part."""

    def __init__(self, vllm_config: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, model, *args, **kwargs)
        equip(self, model)

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """A request that is new, or back after a preemption: V2 tells the two alike."""
        super().add_request(req_index, new_req_data)
        self._steering.begin(new_req_data.req_id, new_req_data.sampling_params)

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        """The last call before a forward pass, of a real batch or of a dummy one, whose request ids are made up.

        The requests of vLLM's warm-up make real batches, but nobody has begun them: their tokens stay untouched, as
        the padding behind a batch does.
        """
        inputs: dict[str, Any] = super().prepare_inputs(input_batch, req_states)
        if input_batch.req_ids[0] in req_states.req_id_to_index:
            self._steering.prepare(
                input_batch.req_ids,
                input_batch.num_computed_tokens_np.tolist(),
                input_batch.num_scheduled_tokens.tolist(),
                drafts={},  # with drafts num_computed_tokens_np would be an upper bound only: refused at start-up
            )
        else:
            self._steering.silence()
        return inputs

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        """Before a graph is captured, and outside of it."""
        self._steering.silence()
        inputs: dict[str, Any] = super().prepare_dummy_inputs(num_reqs, num_tokens)
        return inputs

    @property
    def _steering(self) -> WorkerSteering:
        steering = steering_of(self)
        assert steering is not None  # the class is only used where the engine is configured for it
        return steering


def _resolve_model_state_cls(original: Any) -> Any:
    def resolve_model_state_cls(vllm_config: Any, model: nn.Module) -> Any:
        own = original(vllm_config, model)
        if SteerSettings.of(vllm_config.additional_config) is None:
            return own
        return type(f"Steering{own.__name__}", (SteeringState, own), {})

    return resolve_model_state_cls


def _finish_requests(original: Any) -> Any:
    def finish_requests(self: Any, scheduler_output: Any) -> None:
        # ModelState.remove_request cannot do this: it hears of finished and preempted requests alike, and of new ones.
        steering = steering_of(self)
        if steering is not None:
            for request_id in scheduler_output.preempted_req_ids or ():
                steering.preempt(request_id)
            for request_id in scheduler_output.finished_req_ids:
                steering.finish(request_id)
        original(self, scheduler_output)

    return finish_requests


_V2 = "workers of an engine with steer_config, V2 runner"
RESOLVE_MODEL_STATE = patch(
    model_states,
    "resolve_model_state_cls",
    _resolve_model_state_cls,
    takes="vllm_config, model",
    why="The V2 runner's extension point, ModelState, is chosen by the model's class, which is vLLM's; whichever class "
    "it chooses gets steering put before it.",
    gone_when="a plugin can name a ModelState.",
    when=_V2,
)
FINISH_REQUESTS = patch(
    GPUModelRunner,
    "finish_requests",
    _finish_requests,
    takes="self, scheduler_output",
    why="ModelState.remove_request is called for finished, preempted and new requests alike.",
    gone_when="it is told which.",
    when=_V2,
)
