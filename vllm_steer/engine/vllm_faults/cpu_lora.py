"""LoRA on the CPU engine: a token without an adapter gets none.

A token's adapter is the number of a slot, -1 where it has none. vLLM's CPU operations index the slots with it, and -1
finds the last one: beside a request with an adapter, one without runs with whatever adapter sits there (vllm/lora/ops/
torch_ops/lora_ops.py, 0.32.0; vLLM's pull requests 48421 and 49656). Here the rows of such tokens are zero before any
adapter's weights see them, so what is added to their outputs is zero too.
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
    """``x`` as (N, D), with zeros for what has no adapter."""
    return x.reshape(-1, x.shape[-1]).masked_fill((slot_N < 0)[:, None], 0.0)


_WHY = (
    "Beside a request with an adapter, vLLM's CPU operations put the adapter of the last slot on one without: "
    "they index with its mark for none, -1."
)
_GONE = "they leave such tokens alone (vLLM's pull requests 48421, 49656)."
_WHEN = "workers of an engine with steer_config, classic runner, with LoRA"
ADD_SHRINK, ADD_EMBEDDING, ADD_LOGITS = (
    patch(PunicaWrapperCPU, name, wrap, takes="self, y, x, ...", why=_WHY, gone_when=_GONE, when=_WHEN)
    for name, wrap in (
        ("add_shrink", _for_tokens),
        ("add_lora_embedding", _for_tokens),
        ("add_lora_logits", _for_logits),
    )
)
