"""Speculative decoding on the CPU engine, in batches with a request that samples.

To verify drafts, vLLM repeats the temperature, top-k and top-p of each request for each of its drafts. Its CPU
operation writes them to a copy and returns memory that was never written (vllm/utils/cpu_triton_utils.py,
``_expand_kernel_impl``, 0.32.0). So the drafts of all requests in the batch, greedy ones too, are verified at random
temperatures, and top-k can end the engine; it also ends where no request has a draft. This module repeats the values
itself.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.sample import rejection_sampler

from vllm_steer.engine.patching import patch


def install() -> None:
    """Install the patches of speculative decoding on the CPU."""
    REPEAT.install()
    CONSTRAIN.install()


def _expand_batch_to_tokens(original: Any) -> Any:
    def expand_batch_to_tokens(
        x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
    ) -> torch.Tensor:
        if x.device.type != "cpu":
            expanded: torch.Tensor = original(x, cu_num_tokens, num_tokens, replace_from, replace_to)
            return expanded
        counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
        return x.masked_fill(x == replace_from, replace_to).repeat_interleave(counts)

    return expand_batch_to_tokens


def _apply_sampling_constraints(original: Any) -> Any:
    def apply_sampling_constraints(logits: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if logits.device.type == "cpu" and not len(logits):
            return logits
        constrained: torch.Tensor = original(logits, *args, **kwargs)
        return constrained

    return apply_sampling_constraints


_WHEN = "workers of an engine with steer_config, classic runner, with speculative decoding on a CPU"
REPEAT = patch(
    rejection_sampler,
    "expand_batch_to_tokens",
    _expand_batch_to_tokens,
    takes="x, cu_num_tokens, num_tokens, replace_from, replace_to",
    why="In a batch with a request that samples, vLLM's CPU operation returns memory that was never written as the "
    "temperatures of all drafts, so greedy requests get other tokens too.",
    gone_when="vLLM's CPU operation writes to its result.",
    when=_WHEN,
)
CONSTRAIN = patch(
    rejection_sampler,
    "apply_sampling_constraints",
    _apply_sampling_constraints,
    takes="logits, ...",
    why="Top-k ends the CPU engine in a step without drafts.",
    gone_when="vLLM's top-k takes a batch of no rows on a CPU.",
    when=_WHEN,
)
