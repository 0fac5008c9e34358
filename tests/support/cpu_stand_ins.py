"""Stand-ins, in tests only, for what vLLM's CPU build lacks and single architectures need.

None of them touches a decoder layer's return value, which is what steering works on:

``gated delta rule``: the linear attention of Qwen3-Next and Qwen3.5, which exists in bfloat16 only on a CPU, where it
    could not be compared as exactly as the others.
``sigmoid router``: routing by sigmoid without groups, which vLLM's router for CPUs refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F


@contextmanager
def stand_ins(names: Sequence[str]) -> Iterator[None]:
    """The stand-ins of these names; on exit everything is as it was."""
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(_STAND_INS[name]())
        yield


@contextmanager
def _sigmoid_router() -> Iterator[None]:
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    routing = CPURouter._compute_routing

    def with_one_group(router: Any, *args: Any, **kwargs: Any) -> Any:
        if router.scoring_func == "sigmoid" and router.custom_routing_function is None and not router.use_grouped_topk:
            router.use_grouped_topk, router.num_expert_group, router.topk_group = True, 1, 1
        return routing(router, *args, **kwargs)

    with mock.patch.object(CPURouter, "_compute_routing", with_one_group):
        yield


@contextmanager
def _gated_delta_rule() -> Iterator[None]:
    from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention

    gdn_attention.register_cpu_gdn_attention_ops()
    with mock.patch.object(torch.ops.vllm, "cpu_gdn_attention_core", _gated_delta_rule_in_float32):
        yield


def _gated_delta_rule_in_float32(
    mixed_qkv: torch.Tensor, b: torch.Tensor, a: torch.Tensor, core_attn_out: torch.Tensor, layer_name: Any
) -> None:
    """In place of the operator `cpu_gdn_attention_core`, a token at a time, with the states in vLLM's own cache."""
    from vllm.forward_context import get_forward_context
    from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first
    from vllm.utils.torch_utils import _resolve_layer_name

    context = get_forward_context()
    layer = context.no_compile_layers[_resolve_layer_name(layer_name)]
    if context.attn_metadata is None:
        return
    metadata = context.attn_metadata[layer.prefix]
    tails, states = layer.kv_cache  # (places, width - 1, channels), (places, heads, value size, key size)
    if is_conv_state_dim_first():
        tails = tails.mT
    kernel = getattr(layer.conv1d, "_cpu_unpacked_conv_weight", layer.conv1d.weight).flatten(1)
    width, key_heads, heads = kernel.shape[1], layer.num_k_heads, layer.num_v_heads
    key_size, size = layer.head_k_dim, layer.head_v_dim
    for i in range(metadata.num_decodes + metadata.num_prefills):
        start, end = metadata.non_spec_query_start_loc[i : i + 2].tolist()
        place = int(metadata.non_spec_state_indices_tensor[i])
        goes_on = i < metadata.num_decodes or bool(metadata.has_initial_state[i])
        tail = tails[place] if goes_on else torch.zeros(width - 1, len(kernel))
        state = states[place].mT if goes_on else torch.zeros(heads, key_size, size)
        rows = torch.cat([tail, mixed_qkv[start:end]])
        mixed = F.silu(F.conv1d(rows.T[None], kernel[:, None], groups=len(kernel))[0].T)
        query, key, value = mixed.split([key_heads * key_size, key_heads * key_size, heads * size], dim=-1)
        query = _unit(query.view(-1, key_heads, key_size)).repeat_interleave(heads // key_heads, 1) * key_size**-0.5
        key = _unit(key.view(-1, key_heads, key_size)).repeat_interleave(heads // key_heads, 1)
        value = value.view(-1, heads, size)
        decay = (-layer.A_log.exp() * F.softplus(a[start:end] + layer.dt_bias)).exp()
        for t, beta in enumerate(b[start:end].sigmoid()):
            state = state * decay[t][:, None, None]
            known = (state * key[t][:, :, None]).sum(1)
            state = state + key[t][:, :, None] * ((value[t] - known) * beta[:, None])[:, None]
            core_attn_out[start + t] = (state * query[t][:, :, None]).sum(1)
        tails[place], states[place] = rows[1 - width :], state.mT


def _unit(rows: torch.Tensor) -> torch.Tensor:
    return rows * torch.rsqrt((rows * rows).sum(-1, keepdim=True) + 1e-6)


_STAND_INS: dict[str, Callable[[], Any]] = {
    "gated delta rule": _gated_delta_rule,
    "sigmoid router": _sigmoid_router,
}
