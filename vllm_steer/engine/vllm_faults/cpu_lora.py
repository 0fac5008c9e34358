"""LoRA on the CPU engine: keeps adapters off tokens that have none.

A token's adapter is a slot number, or -1 for none. vLLM's CPU operations index the slots with it, and -1 selects the
last slot. So in a batch with an adapter, a request without one runs with the adapter in the last slot (vllm/lora/ops/
torch_ops/lora_ops.py, 0.32.0; vLLM's pull requests 48421 and 49656). This module zeroes the input rows of such tokens
before an adapter's weights are applied, so the values added to their outputs are zero too.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from vllm_steer.engine.patching import patch


def install() -> None:
    """Install the patches of LoRA on the CPU."""
    for one in (ADD_SHRINK, ADD_EMBEDDING, ADD_LOGITS):
        one.install()


def _for_tokens(original: Any) -> Any:
    def add(self: Any, y: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(self, y, _with_adapter(x, self.token_lora_indices), *args, **kwargs)

    return add


def _for_logits(original: Any) -> Any:
    def add(self: Any, y: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(self, y, _with_adapter(x, self.sampler_indices), *args, **kwargs)

    return add


def _with_adapter(x: torch.Tensor, slot_N: torch.Tensor) -> torch.Tensor:
    """``x`` reshaped to (N, D), with zero rows for tokens without an adapter."""
    return x.reshape(-1, x.shape[-1]).masked_fill((slot_N < 0)[:, None], 0.0)


_WHY = (
    "In a batch with an adapter, vLLM's CPU operations apply the adapter of the last slot to requests without one: "
    "they use -1, the mark for no adapter, as an index."
)
_GONE = "they skip tokens without an adapter (vLLM's pull requests 48421, 49656)."
_WHEN = "workers of an engine with steer_config, classic runner, with LoRA"
ADD_SHRINK, ADD_EMBEDDING, ADD_LOGITS = (
    patch(PunicaWrapperCPU, name, wrap, takes="self, y, x, ...", why=_WHY, gone_when=_GONE, when=_WHEN)
    for name, wrap in (
        ("add_shrink", _for_tokens),
        ("add_lora_embedding", _for_tokens),
        ("add_lora_logits", _for_logits),
    )
)
