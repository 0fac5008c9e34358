"""Two data-parallel engines behind one front end: directions reach both, and readouts come from both."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm import RequestOutput
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

from tests.engine.conftest import BLOCK_SIZE, KV_BYTES
from tests.support.hf_reference import Reference
from tests.support.mixed_batch import (
    Request,
    as_directions,
    check_answers,
    mixed_batch,
    random_prompts,
    references,
    unit_vectors,
)
from tests.support.tiny_models import HIDDEN_SIZE, NUM_LAYERS, VOCAB_SIZE
from vllm_steer import collect_readouts_async, register_directions_async, steer_config
from vllm_steer.engine.front.admission import admission_of
from vllm_steer.engine.front.all_engines import call_workers
from vllm_steer.engine.startup_checks import check
from vllm_steer.errors import UnsupportedFeature
from vllm_steer.settings import SteerSettings

pytestmark = [pytest.mark.engine, pytest.mark.slow]

RANKS = 2
MAX_TOKENS = 8
LAYERS = [0, 2, NUM_LAYERS - 1]
VECTORS = unit_vectors(LAYERS, HIDDEN_SIZE, seed=91)
REQUESTS = mixed_batch(VECTORS, random_prompts(VOCAB_SIZE, lengths=(3, 31, 32, 70), seed=92))


class Bed:
    """The front end and its event loop."""

    def __init__(self, engine: AsyncLLM, loop: asyncio.Runner) -> None:
        self.engine, self.loop = engine, loop

    async def ask(self, number: int, request: Request) -> RequestOutput:
        """Run one request on the engine whose turn it is."""
        params = request.params(max_tokens=MAX_TOKENS)
        prompt: Any = {"prompt_token_ids": request.prompt_ids}
        outputs = self.engine.generate(prompt, params, f"r{number}", data_parallel_rank=number % RANKS)
        async for output in outputs:
            last = output
        return last

    async def run_all(self) -> list[RequestOutput]:
        return await asyncio.gather(*(self.ask(number, request) for number, request in enumerate(REQUESTS)))


@pytest.fixture(scope="module")
def bed(checkpoint: Path) -> Iterator[Bed]:
    arguments = AsyncEngineArgs(
        model=str(checkpoint),
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=32,
        block_size=BLOCK_SIZE,
        kv_cache_memory_bytes=KV_BYTES,
        disable_log_stats=True,
        data_parallel_size=RANKS,
        additional_config=steer_config(layers=LAYERS, max_directions=32, max_rows=4096),
    )
    with pytest.MonkeyPatch.context() as environment, asyncio.Runner() as loop:
        environment.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # this process has threads by now
        environment.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join(str(core) for core in range(RANKS)))

        async def start() -> AsyncLLM:
            return AsyncLLM.from_engine_args(arguments)

        engine = loop.run(start())
        try:
            loop.run(register_directions_async(engine, as_directions(VECTORS)))
            yield Bed(engine, loop)
        finally:
            engine.shutdown()


@pytest.mark.breadth  # two engines that start: three minutes
@pytest.mark.conformance("data parallelism (2)", family="llama")
def test_both_engines_steer_and_read_as_the_reference(bed: Bed, reference: Reference) -> None:
    async def answers() -> tuple[list[RequestOutput], list[Any]]:
        outputs = await bed.run_all()
        return outputs, [read for (read,) in await collect_readouts_async(bed.engine, outputs)]

    outputs, reads = bed.loop.run(answers())
    expected = references(reference, REQUESTS, MAX_TOKENS)
    assert check_answers(reference, REQUESTS, expected, outputs, reads) <= 1


@pytest.mark.breadth
def test_each_engine_holds_the_readouts_of_its_own_requests(bed: Bed) -> None:
    async def who_knows() -> list[list[bool]]:
        outputs = await bed.run_all()
        asked = admission_of(bed.engine.input_processor).asked
        ends = [len(request.prompt_ids) + MAX_TOKENS - 1 for request in REQUESTS]
        samples = [
            (asked[output.request_id].key, 0, end)
            for output, end in zip(outputs, ends, strict=True)
            if output.request_id in asked
        ]
        engines = await call_workers(bed.engine, "vllm_steer_collect", samples)
        return [[answer is not None for answer in workers[0]] for workers in engines]

    first, second = bed.loop.run(who_knows())
    ranks = [number % RANKS for number, request in enumerate(REQUESTS) if request.readout is not None]
    assert first == [rank == 0 for rank in ranks]
    assert second == [rank == 1 for rank in ranks]


@pytest.mark.conformance("data parallelism, a front end for each rank", family="llama", refused=True)
def test_front_ends_of_their_own_are_refused_at_start(checkpoint: Path) -> None:
    config = EngineArgs(str(checkpoint), additional_config=steer_config(layers=LAYERS)).create_engine_config()
    config.parallel_config.data_parallel_external_lb = True  # vLLM takes it for models with experts only
    with pytest.raises(UnsupportedFeature, match=r"a front end for each rank .*one front end serve all ranks"):
        check(config, SteerSettings(layers=tuple(LAYERS)))
