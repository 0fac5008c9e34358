"""LoRA on the CPU engine: a token without an adapter gets none.

A token's adapter is the number of a slot, -1 where it has none. vLLM's CPU operations index the slots with it, and -1
finds the last one: beside a request with an adapter, one without runs with whatever adapter sits there (vllm/lora/ops/
torch_ops/lora_ops.py, 0.32.0; vLLM's pull requests 48421 and 49656). Here the rows of such tokens are zero before any
adapter's weights see them, so what is added to their outputs is zero too.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

_installed = False


def install() -> None:
    """Wrap the entrances of ``PunicaWrapperCPU`` (see ``vllm_steer.engine``). Idempotent."""
    global _installed
    if _installed:
        return
    PunicaWrapperCPU.add_shrink = _for_tokens(PunicaWrapperCPU.add_shrink)
    PunicaWrapperCPU.add_lora_embedding = _for_tokens(PunicaWrapperCPU.add_lora_embedding)
    PunicaWrapperCPU.add_lora_logits = _for_logits(PunicaWrapperCPU.add_lora_logits)
    _installed = True


def _for_tokens(original: Any) -> Any:
    @functools.wraps(original)
    def add(self: Any, y: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(self, y, _with_adapter(x, self.token_lora_indices), *args, **kwargs)

    return add


def _for_logits(original: Any) -> Any:
    @functools.wraps(original)
    def add(self: Any, y: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(self, y, _with_adapter(x, self.sampler_indices), *args, **kwargs)

    return add


def _with_adapter(x: torch.Tensor, slot_N: torch.Tensor) -> torch.Tensor:
    """``x`` as (N, D), with zeros for what has no adapter."""
    return x.reshape(-1, x.shape[-1]).masked_fill((slot_N < 0)[:, None], 0.0)
