"""The table of the sums of KV blocks in a scheduler: it follows each step, and is emptied with the prefix cache."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_steer.engine import reader_blocks
from vllm_steer.engine.reader_blocks import BLOCK_SUMS, STEP_BLOCKS
from vllm_steer.plan.block_sums import Reader
from vllm_steer.settings import CONFIG_KEY, SteerSettings

BLOCK, PROMPT_LEN = 4, 9


class StandInScheduler:
    """A scheduler of one request, whose wrapped methods are the plugin's."""

    def __init__(self, settings: SteerSettings | None, caching: bool = True, device: str = "cpu") -> None:
        self.vllm_config = SimpleNamespace(
            additional_config={} if settings is None else {CONFIG_KEY: settings.as_config()},
            cache_config=SimpleNamespace(enable_prefix_caching=caching),
            device_config=SimpleNamespace(device_type=device),
            model_config=SimpleNamespace(get_hidden_size=lambda: 8),
        )
        self.kv_cache_manager = SimpleNamespace(block_pool=SimpleNamespace(hash_block_size=BLOCK))
        self.requests = {"one": SimpleNamespace(num_computed_tokens=0)}
        reader_blocks._init(lambda _: None)(self)

    def schedule(self, tokens: int, finished: tuple[str, ...] = ()) -> Any:
        def original(_: Any) -> Any:
            self.requests["one"].num_computed_tokens += tokens
            return SimpleNamespace(num_scheduled_tokens={"one": tokens}, finished_req_ids=set(finished))

        return reader_blocks._schedule(original)(self)


def reader() -> Reader:
    return Reader(["first", "second"], 0, None, PROMPT_LEN, frozenset({0}))


def test_a_step_carries_what_the_workers_do_and_a_reset_forgets_it() -> None:
    scheduler = StandInScheduler(SteerSettings(layers=(1,), block_sums_mib=1))
    sums = BLOCK_SUMS.of(scheduler.kv_cache_manager)
    assert sums is not None
    assert STEP_BLOCKS.of(scheduler.schedule(0)) is None, "nobody reads"
    assert sums.begin("one", reader(), 0)
    told = STEP_BLOCKS.of(scheduler.schedule(PROMPT_LEN))
    assert told is not None
    assert [(first, end) for first, end, _ in told.parts["one"]] == [(0, BLOCK), (BLOCK, 2 * BLOCK)]
    scheduler.schedule(1, finished=("one",))
    assert sums.reach(reader(), PROMPT_LEN) >= 2 * BLOCK
    asked = []
    reader_blocks._reset_prefix_cache(asked.append)(scheduler.kv_cache_manager)
    assert asked == [scheduler.kv_cache_manager], "vLLM's own part ran too"
    assert len(sums) == 0
    assert sums.reach(reader(), PROMPT_LEN) == 0


@pytest.mark.parametrize(
    ("settings", "more"),
    [
        (None, {}),
        (SteerSettings(layers=(1,), block_sums_mib=0), {}),
        (SteerSettings(layers=(1,)), {"caching": False}),
    ],
)
def test_there_is_no_table_where_nothing_is_kept(settings: SteerSettings | None, more: dict[str, Any]) -> None:
    scheduler = StandInScheduler(settings, **more)
    assert BLOCK_SUMS.of(scheduler.kv_cache_manager) is None
    assert STEP_BLOCKS.of(scheduler.schedule(3)) is None
    reader_blocks._reset_prefix_cache(lambda _: None)(scheduler.kv_cache_manager)
