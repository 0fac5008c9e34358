"""The prefix cache: who shares a KV block with whom, and how much of it a readout may use.

Two requests share a KV block exactly where their steering has the same content.

The KV of a block depends on the steering of every token up to the block's end. The spans of a request's steering cut it
into windows that are steered alike, so the chain of block hashes must contain two things:

* the digest of the first window, from block 0 on: it travels in ``cache_salt``, which vLLM hashes into block 0;
* the digest of each later window, and the place at which it begins, in the block that holds its first token. Earlier
  blocks stay shared; later ones inherit the fork through the chain.

The second needs the patch below. A window can begin at the end of the prompt, and a later request can carry the same
tokens in its prompt, where they are steered as prompt tokens: so the key contains the place.

A condition over the prompt depends on all of the prompt, which the chain contains, and on where it ends, which the
digest of the windows that it gates contains.

A readout needs the activations of its span, which cached KV does not have. So a request with a readout finds cached
blocks before the span, and in the span as far as there are sums of them that suffice for it (``reader_blocks``). The
same holds when it comes back from a preemption with blocks of its own in the cache.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core import block_pool, kv_cache_utils
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.simple_kv_offload import manager

from vllm_steer.engine.patching import patch
from vllm_steer.engine.reader_blocks import BLOCK_SUMS
from vllm_steer.engine.resolved_spec import resolved_of, sums_suffice
from vllm_steer.plan.block_sums import Reader

_KEY = "vllm_steer"


def install() -> None:
    """Install the patches of the prefix cache's keys and of its lookup."""
    EXTRA_KEYS.install()
    COMPUTED_BLOCKS.install()


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
    resolved = resolved_of(request)
    if resolved is None:
        return None
    begun = [f"{digest}@{first - start}" for first, _, digest in resolved["windows"][1:] if start <= first < end]
    return (_KEY, ",".join(begun)) if begun else None


def _get_computed_blocks(original: Any) -> Any:
    def get_computed_blocks(self: Any, request: Any, *bound: int | None) -> Any:
        resolved = resolved_of(request)
        if resolved is None or resolved["readout"] is None:
            return original(self, request, *bound)
        readout, sums = resolved["readout"], BLOCK_SUMS.of(self)
        first = min(readout["first"], readout["watch_first"]) if readout["watch"] else readout["first"]

        def cached(end: int) -> Any:
            # Since 0.33 a caller can give a bound of its own.
            return original(self, _Beginning(request, end), *(min(one, end) for one in bound if one is not None))

        if sums is None or request.skip_reading_prefix_cache or not sums_suffice(readout):
            return cached(first)
        reader = _reader(request, resolved)
        found = cached(sums.reach(reader, request.num_tokens))
        if not sums.begin(request.request_id, reader, found[1]):  # the hit ends within a block
            found = cached(first)
            sums.begin(request.request_id, reader, found[1])
        return found

    return get_computed_blocks


def _reader(request: Any, resolved: dict[str, Any]) -> Reader:
    readout = resolved["readout"]
    return Reader(
        request.block_hashes,
        readout["first"],
        readout["end"],
        resolved["prompt_len"],
        frozenset(readout["layer_indices"]),
    )


class _Beginning:
    """A request in whose first ``end`` tokens alone cached blocks are looked for."""

    def __init__(self, request: Any, end: int) -> None:
        self._request = request
        self.num_tokens = min(request.num_tokens, end + 1)  # the last token is never taken from the cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)


EXTRA_KEYS = patch(
    (kv_cache_utils, block_pool, manager),  # each has its own reference to the function
    "generate_block_hash_extra_keys",
    _generate_block_hash_extra_keys,
    takes="request, start_token_idx, end_token_idx, start_mm_idx",
    why="Steering that starts at the first generated token must fork the chain of block hashes there; cache_salt can "
    "only fork it at block 0.",
    gone_when="requests can carry cache keys per position.",
)
COMPUTED_BLOCKS = patch(
    KVCacheManager,
    "get_computed_blocks",
    _get_computed_blocks,
    takes="self, request, ...",
    contains="max_cache_hit_length = request.num_tokens - 1",
    why="Cached KV has no activations, so none of a readout's tokens may come from the cache; those before them may.",
    gone_when="requests can bound how many of their tokens come from the prefix cache.",
)
