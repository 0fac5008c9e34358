"""Seeded requests on the CPU engine.

A request samples once per step even while its prompt is still being prefilled. vLLM discards that sample and rewinds
the request's generator with ``Generator.set_offset``, which only CUDA generators have. On a CPU the call raises and
takes the engine down (vllm/v1/worker/gpu_model_runner.py, ``_bookkeeping_sync``, 0.32.0). This module saves the
generator's state before such a step and restores it afterwards, so chunking a prompt changes no sample.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_steer.engine.patching import Attribute, patch
from vllm_steer.engine.worker.worker_steering import steering_of


def install() -> None:
    """Install the patches of seeded requests on CPU runners."""
    KEEP_STATES.install()
    RESTORE_STATES.install()


def _prepare_inputs(original: Any) -> Any:
    def _prepare_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = original(self, *args, **kwargs)
        if self.device.type == "cpu" and steering_of(self) is not None:
            GENERATOR_STATES.put(self, _states_to_restore(self))
        return prepared

    return _prepare_inputs


def _bookkeeping_sync(original: Any) -> Any:
    def _bookkeeping_sync(self: Any, *args: Any, **kwargs: Any) -> Any:
        states = GENERATOR_STATES.of(self) or {}
        generators = self.input_batch.generators
        for index, (generator, state) in states.items():
            generator.set_state(state)
            generators.pop(index, None)
        try:
            return original(self, *args, **kwargs)
        finally:
            generators.update({index: generator for index, (generator, _) in states.items()})
            states.clear()

    return _bookkeeping_sync


def _states_to_restore(runner: Any) -> dict[int, tuple[torch.Generator, torch.Tensor]]:
    """Batch index -> (generator, state) of seeded requests whose sample of this step will be discarded."""
    discarded = runner.discard_request_mask.np
    return {
        index: (generator, generator.get_state())
        for index, generator in runner.input_batch.generators.items()
        if index < runner.input_batch.num_reqs and discarded[index]
    }


_WHY = (
    "vLLM calls set_offset to rewind the generator of a seeded request whose prompt is not finished. CPU generators "
    "have no set_offset, so the engine dies."
)
_GONE = "vLLM rewinds CPU generators."
_WHEN = "workers of an engine with steer_config, classic runner, on a CPU"
KEEP_STATES = patch(
    GPUModelRunner,
    "_prepare_inputs",
    _prepare_inputs,
    takes="self, ...",
    why=_WHY,
    gone_when=_GONE,
    when=_WHEN,
)
RESTORE_STATES = patch(
    GPUModelRunner,
    "_bookkeeping_sync",
    _bookkeeping_sync,
    takes="self, ...",
    contains="set_offset",  # once it is gone, this module can be removed
    why=_WHY,
    gone_when=_GONE,
    when=_WHEN,
)
GENERATOR_STATES: Attribute[dict[int, tuple[torch.Generator, torch.Tensor]]] = Attribute(
    "GPUModelRunner", "vllm_steer_generator_states", why=_WHY, gone_when=_GONE
)
