"""Prefix-cache keys: two requests share a KV block exactly where their steering has the same content.

The KV of a block depends on the steering of every token up to the block's end. The spans of a request's steering cut it
into windows that are steered alike, so the chain of block hashes must contain two things:

* the digest of the first window, from block 0 on: it travels in ``cache_salt``, which vLLM hashes into block 0;
* the digest of each later window, and the place at which it begins, in the block that holds its first token. Earlier
  blocks stay shared; later ones inherit the fork through the chain.

The second needs the patch below. A window can begin at the end of the prompt, and a later request can carry the same
tokens in its prompt, where they are steered as prompt tokens: so the key contains the place.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core import block_pool, kv_cache_utils
from vllm.v1.simple_kv_offload import manager

from vllm_steer.engine.patching import patch
from vllm_steer.engine.resolved_spec import RESOLVED_KEY

_KEY = "vllm_steer"


def install() -> None:
    """Install the patch of the prefix cache's keys."""
    EXTRA_KEYS.install()


def _generate_block_hash_extra_keys(original: Any) -> Any:
    def generate_block_hash_extra_keys(
        request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int
    ) -> tuple[tuple[Any, ...] | None, int]:
        keys, next_mm_idx = original(request, start_token_idx, end_token_idx, start_mm_idx)
        own = fork_key(request, start_token_idx, end_token_idx)
        return (keys if own is None else (*(keys or ()), own)), next_mm_idx

    return generate_block_hash_extra_keys


def fork_key(request: Any, start: int, end: int) -> tuple[str, str] | None:
    """The extra key of the block with tokens [start, end); None unless the steering changes in it.

    Returns:
        ``("vllm_steer", "<digest of the window>@<offset of its first token in the block>,...")``, or None.
    """
    params = request.sampling_params
    resolved = params.extra_args.get(RESOLVED_KEY) if params is not None and params.extra_args else None
    if resolved is None:
        return None
    begun = [f"{digest}@{first - start}" for first, _, digest in resolved["windows"][1:] if start <= first < end]
    return (_KEY, ",".join(begun)) if begun else None


EXTRA_KEYS = patch(
    (kv_cache_utils, block_pool, manager),  # each has its own reference to the function
    "generate_block_hash_extra_keys",
    _generate_block_hash_extra_keys,
    takes="request, start_token_idx, end_token_idx, start_mm_idx",
    why="Steering that starts at the first generated token must fork the chain of block hashes there; cache_salt can "
    "only fork it at block 0.",
    gone_when="requests can carry cache keys per position.",
)
