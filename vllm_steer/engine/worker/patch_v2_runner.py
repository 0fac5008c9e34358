"""The V2 runner: a ``ModelState`` that derives from the model's own one, so vLLM's part stays in effect.

vLLM makes the model state right after loading the weights and before profiling, compiling and capturing (vllm/v1/
worker/gpu/model_runner.py, ``load_model``, 0.32.0). It passes every request to the state, and asks it for the inputs of
every forward pass, real or dummy. The arguments are on the host: request ids in batch order, numbers of tokens computed
before the step and scheduled in it. Without draft tokens the number of computed tokens is exact even under asynchronous
scheduling, where a step is prepared before the tokens of the previous step are known.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from vllm.v1.worker.gpu import model_states
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.model_states.interface import ModelState

from vllm_steer.engine.patching import patch
from vllm_steer.engine.reader_blocks import STEP_BLOCKS
from vllm_steer.engine.worker.worker_steering import WorkerSteering, equip, steering_of
from vllm_steer.settings import SteerSettings


def install() -> None:
    """Install the patches of the V2 runner."""
    RESOLVE_MODEL_STATE.install()
    FINISH_REQUESTS.install()


class SteeringState(ModelState):
    """Base that precedes a model's own ``ModelState`` class: each method calls that class and adds the steering."""

    def __init__(self, vllm_config: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, model, *args, **kwargs)
        equip(self, model)

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """Begin a new request, or resume one after a preemption: V2 makes the same call for both."""
        super().add_request(req_index, new_req_data)
        self._steering.begin(new_req_data.req_id, new_req_data.sampling_params)

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        """Update the steering buffers for a forward pass; this is vLLM's last call before it.

        A dummy batch has invented request ids. The requests of vLLM's warm-up form real batches but carry no steering:
        their tokens stay untouched, like the padding after a batch.

        Returns:
            The inputs of the model's own class.
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
        """Mark every token untouched. vLLM calls this before it captures a graph, outside the capture."""
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
        # ModelState.remove_request cannot do this: vLLM calls it for finished, preempted and new requests alike.
        steering = steering_of(self)
        if steering is not None:
            for request_id in scheduler_output.preempted_req_ids or ():
                steering.preempt(request_id)
            for request_id in scheduler_output.finished_req_ids:
                steering.finish(request_id)
            steering.blocks = STEP_BLOCKS.of(scheduler_output)
        original(self, scheduler_output)

    return finish_requests


_V2 = "workers of an engine with steer_config, V2 runner"
RESOLVE_MODEL_STATE = patch(
    model_states,
    "resolve_model_state_cls",
    _resolve_model_state_cls,
    takes="vllm_config, model",
    why="vLLM chooses the ModelState class, the V2 runner's extension point, by the model's class. The plugin derives "
    "its own from the chosen one.",
    gone_when="a plugin can name a ModelState.",
    when=_V2,
)
FINISH_REQUESTS = patch(
    GPUModelRunner,
    "finish_requests",
    _finish_requests,
    takes="self, scheduler_output",
    why="ModelState.remove_request is called for finished, preempted and new requests alike.",
    gone_when="that method learns which of the three applies.",
    when=_V2,
)
