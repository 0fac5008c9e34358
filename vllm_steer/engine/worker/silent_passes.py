"""Forward passes of a loaded model before its first request, without a cache and without attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import nn
from vllm.distributed import get_pp_group
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.sequence import IntermediateTensors

from vllm_steer.engine.patching import patch

UNCHANGED_TOKENS = 4
"""The fewest tokens of a pass to leave as they are."""
SHALLOW = 9
"""Models of up to so many layers get longer passes, with room for three changes of each layer."""
_TOKENS_SHALLOW, _TOKENS_DEEP = 32, 16
_FIRST_TOKENS = 1000  # random token ids below this one: words, in every vocabulary


class Passes:
    """Forward passes of the same random tokens.

    Attributes:
        num_layers: decoder layers of the whole model.
        hidden_size: elements of the stream.
        num_tokens: tokens of a pass.
        dtype: what the model computes in.
        is_last_stage: whether a pass gives the model's result, and not a stream for another pipeline stage.
    """

    def __init__(self, model: nn.Module, runner: Any) -> None:
        config = runner.vllm_config
        model_config = config.model_config
        self._model, self._config, self.dtype = model, config, model_config.dtype
        self.num_layers, self.hidden_size = model_config.get_total_num_hidden_layers(), model_config.get_hidden_size()
        most = config.scheduler_config.max_num_batched_tokens
        wanted = _TOKENS_SHALLOW if self.num_layers <= SHALLOW else _TOKENS_DEEP
        self.num_tokens = max(UNCHANGED_TOKENS + 1, min(most, wanted))
        self.is_last_stage = get_pp_group().is_last_rank
        self._random = torch.Generator().manual_seed(0)  # on the host, so that all ranks draw the same
        self._device = runner.device
        words = min(_FIRST_TOKENS, model_config.get_vocab_size())
        self._ids = torch.randint(words, (self.num_tokens,), generator=self._random).to(self._device)
        positions = torch.arange(self.num_tokens) % model_config.max_model_len
        self._positions = positions.repeat(model_config.mrope_num_dims, 1) if model_config.uses_mrope else positions
        self._positions = self._positions.to(self._device)
        noise = self.random(self.hidden_size, dtype=torch.float32)
        self.noise_D = noise / noise.norm()
        self._before = None if get_pp_group().is_first_rank else self._from_another_stage()
        if config.lora_config is not None:
            runner._set_active_loras((0,) * self.num_tokens, (0,) * self.num_tokens, set())  # no adapter

    def run(self) -> torch.Tensor:
        """One pass; float32 (T, ...), the model's result or what it hands to the next pipeline stage."""
        with set_forward_context(None, self._config, num_tokens=self.num_tokens, skip_compiled=True):
            result = self._model(
                input_ids=self._ids,
                positions=self._positions,
                intermediate_tensors=self._before,
                inputs_embeds=None,
            )
        parts = [part.reshape(self.num_tokens, -1).float() for part in _tensors(result)]
        return torch.cat(parts, dim=1)

    def random(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Normal random numbers on the model's device."""
        return torch.randn(shape, generator=self._random).to(self._device, dtype)

    def _from_another_stage(self) -> Any:
        make_empty: Any = self._model.make_empty_intermediate_tensors
        empty = make_empty(batch_size=self.num_tokens, dtype=self.dtype, device=self._device)
        return IntermediateTensors({name: self.random(*one.shape, dtype=one.dtype) for name, one in empty.items()})


def _tensors(result: Any) -> Iterator[torch.Tensor]:
    """The tensors in a model's result: one, several, or those for the next pipeline stage."""
    if isinstance(result, torch.Tensor):
        yield result
    else:
        values = result.tensors.values() if isinstance(result, IntermediateTensors) else result
        for one in values:
            yield from _tensors(one)


@contextmanager
def without_attention(model: nn.Module) -> Iterator[None]:
    """Let attention and state-space layers return zeros. Without a cache they would leave their results as they were.

    The change is on each instance, because Hugging Face's modules call ``forward`` past any hook.
    """
    silent = [module for module in model.modules() if isinstance(module, AttentionLayerBase)]
    for module in silent:
        SILENT_ATTENTION.install_on(module)
    try:
        yield
    finally:
        for module in silent:
            SILENT_ATTENTION.remove_from(module)


def _silenced(forward: Any) -> Any:
    parameters = signature(forward)

    def silent(*args: Any, **kwargs: Any) -> Any:
        buffer = parameters.bind(*args, **kwargs).arguments.get("output")
        if buffer is not None:
            return buffer.zero_()
        result = forward(*args, **kwargs)
        return torch.zeros_like(result) if isinstance(result, torch.Tensor) else result

    return silent


SILENT_ATTENTION = patch(
    (Attention, MLAAttention),
    "forward",
    _silenced,
    takes=None,
    why="Without a cache, attention leaves its results as they were; the experiment needs the same ones each time.",
    gone_when="vLLM says of a decoder layer how it returns the residual stream.",
    when="each attention or state-space layer of an engine with steer_config, while the experiment at start-up runs",
)
