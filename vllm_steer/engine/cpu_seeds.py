"""Seeded requests on the CPU engine.

A request samples once a step even while its prompt is still being prefilled; vLLM throws that sample away and turns the
request's generator back with ``Generator.set_offset``, which exists for CUDA generators only. On CPU that raises and
takes the engine down (vllm/v1/worker/gpu_model_runner.py, ``_bookkeeping_sync``, 0.32.0). Here the generator's state is
kept before such a step and put back after it, so chunking a prompt changes no sample.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_steer.engine.worker_steering import steering_of

_ATTRIBUTE = "vllm_steer_generator_states"
_installed = False


def install() -> None:
    """Wrap ``_prepare_inputs`` and ``_bookkeeping_sync`` of CPU runners (see ``vllm_steer.engine``). Idempotent."""
    global _installed
    if _installed:
        return
    prepare, bookkeeping = GPUModelRunner._prepare_inputs, GPUModelRunner._bookkeeping_sync

    @functools.wraps(prepare)
    def _prepare_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = prepare(self, *args, **kwargs)
        if self.device.type == "cpu" and steering_of(self) is not None:
            setattr(self, _ATTRIBUTE, _states_to_restore(self))
        return prepared

    @functools.wraps(bookkeeping)
    def _bookkeeping_sync(self: Any, *args: Any, **kwargs: Any) -> Any:
        states: dict[int, tuple[torch.Generator, torch.Tensor]] = getattr(self, _ATTRIBUTE, {})
        generators = self.input_batch.generators
        for index, (generator, state) in states.items():
            generator.set_state(state)
            generators.pop(index, None)
        try:
            return bookkeeping(self, *args, **kwargs)
        finally:
            generators.update({index: generator for index, (generator, _) in states.items()})
            states.clear()

    GPUModelRunner._prepare_inputs = _prepare_inputs
    GPUModelRunner._bookkeeping_sync = _bookkeeping_sync
    _installed = True


def _states_to_restore(runner: Any) -> dict[int, tuple[torch.Generator, torch.Tensor]]:
    """Batch index -> generator and its state, of seeded requests whose sample of this step will be thrown away."""
    discarded = runner.discard_request_mask.np
    return {
        index: (generator, generator.get_state())
        for index, generator in runner.input_batch.generators.items()
        if index < runner.input_batch.num_reqs and discarded[index]
    }
