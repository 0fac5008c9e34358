"""Sums of KV blocks between scheduler and workers: with them a readout takes tokens of its span from the prefix cache.

The scheduler has the table (``plan.block_sums``): ``prefix_cache`` asks it how far a reader's hit may go. With each
step it decides which sums are loaded and which are written, and that travels to the workers with the step. Each engine
of several has a table of its own, beside its own KV cache.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_steer.engine.log import logger
from vllm_steer.engine.patching import Attribute, patch
from vllm_steer.ops.dispatch import is_fast_on
from vllm_steer.plan.block_sums import BlockSums, StepBlocks, num_slots
from vllm_steer.settings import SteerSettings


def install() -> None:
    """Install the patches of the scheduler."""
    for one in (INIT, SCHEDULE, RESET_PREFIX_CACHE):
        one.install()


def kept_blocks(config: Any, settings: SteerSettings) -> int:
    """How many KV blocks an engine keeps sums of; the same number in its scheduler and in its workers."""
    if not config.cache_config.enable_prefix_caching or not is_fast_on(config.device_config.device_type):
        return 0
    return num_slots(settings.block_sums_mib, len(settings.layers), config.model_config.get_hidden_size())


def _init(original: Any) -> Any:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        config = self.vllm_config
        settings = SteerSettings.of(config.additional_config)
        slots = 0 if settings is None else kept_blocks(config, settings)
        if settings is None or not slots:
            return
        block_size = self.kv_cache_manager.block_pool.hash_block_size
        BLOCK_SUMS.put(self.kv_cache_manager, BlockSums(block_size, slots))
        logger.info(
            "block_sums_mib=%d: readouts keep the sums of up to %d KV blocks of %d tokens on the device, so that later "
            "ones find these in the prefix cache.",
            settings.block_sums_mib,
            slots,
            block_size,
        )

    return __init__


def _schedule(original: Any) -> Any:
    def schedule(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        sums = BLOCK_SUMS.of(self.kv_cache_manager)
        followed = sums.followed if sums is not None else ()
        if sums is not None and followed:
            scheduled = output.num_scheduled_tokens
            # The scheduler has counted this step's tokens as computed already.
            spans = {
                one: (self.requests[one].num_computed_tokens - scheduled[one], scheduled[one])
                for one in followed
                if one in scheduled
            }
            blocks = sums.schedule(spans, output.finished_req_ids)
            if blocks is not None:
                STEP_BLOCKS.put(output, blocks)
        return output

    return schedule


def _reset_prefix_cache(original: Any) -> Any:
    def reset_prefix_cache(self: Any) -> Any:
        sums = BLOCK_SUMS.of(self)
        if sums is not None:
            sums.clear()
        return original(self)

    return reset_prefix_cache


_GONE = "KV blocks can carry data of a plugin."
INIT = patch(
    Scheduler,
    "__init__",
    _init,
    takes="self, ...",
    why="The table of the sums of KV blocks belongs to the scheduler.",
    gone_when=_GONE,
)
SCHEDULE = patch(
    Scheduler,
    "schedule",
    _schedule,
    takes="self, ...",
    why="What a step does with the sums of KV blocks is decided once it is known which tokens it computes.",
    gone_when=_GONE,
)
RESET_PREFIX_CACHE = patch(
    KVCacheManager,
    "reset_prefix_cache",
    _reset_prefix_cache,
    takes="self",
    why="The prefix cache is reset when equal tokens no longer have equal activations, as after new weights.",
    gone_when=_GONE,
)
BLOCK_SUMS: Attribute[BlockSums] = Attribute(
    "KVCacheManager", "vllm_steer_block_sums", why="The table of the sums of KV blocks.", gone_when=_GONE
)
STEP_BLOCKS: Attribute[StepBlocks] = Attribute(
    "SchedulerOutput",
    "vllm_steer_blocks",
    why="Tells the workers which sums of KV blocks they load and write in the step.",
    gone_when=_GONE,
)
