"""What an engine goes through besides requests: new weights, sleep, an engine beside it, the death of a process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from vllm import LLM, RequestOutput, SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from tests.engine.conftest import KV_BYTES, OpenEngine
from tests.support.hf_reference import Reference
from tests.support.mixed_batch import (
    Request,
    Vectors,
    as_directions,
    check_against_reference,
    check_answers,
    is_same_output,
    mixed_batch,
    random_prompts,
    references,
    run,
    unit_vectors,
)
from tests.support.tiny_models import HIDDEN_SIZE, VOCAB_SIZE, save_tiny_model
from vllm_steer import Direction, Readout, close_llm, collect_readouts, register_directions, steer_config, steered
from vllm_steer.engine.startup_checks import check
from vllm_steer.errors import UnsupportedFeature
from vllm_steer.settings import SteerSettings

pytestmark = pytest.mark.engine

LAYERS = [0, 1, 3]
MAX_TOKENS = 8


@pytest.fixture(scope="module")
def vectors() -> Vectors:
    return unit_vectors(LAYERS, HIDDEN_SIZE, seed=71)


@pytest.fixture(scope="module")
def requests(vectors: Vectors) -> list[Request]:
    return mixed_batch(vectors, random_prompts(VOCAB_SIZE, lengths=(3, 17, 33, 64), seed=72))


@pytest.fixture(scope="class")
def llm(checkpoint: Path, open_engine: OpenEngine, vectors: Vectors) -> Iterator[LLM]:
    with open_engine(checkpoint, layers=LAYERS) as engine:
        register_directions(engine, as_directions(vectors))
        yield engine


@pytest.fixture(scope="class")
def other_checkpoint(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", demo_model, tmp_path_factory.mktemp("other") / "llama", seed=73)


class TestOneEngine:
    """An engine that is changed under its hooks; each test leaves it as it was."""

    @pytest.mark.conformance("weight reload", family="llama")
    def test_hooks_and_directions_survive_a_reload_of_the_weights(
        self, llm: LLM, checkpoint: Path, other_checkpoint: Path, requests: list[Request]
    ) -> None:
        for path in (other_checkpoint, checkpoint):
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})
            llm.reset_prefix_cache()  # what was computed with the old weights is the caller's to forget
            reference = Reference(path)
            expected = references(reference, requests, MAX_TOKENS)
            assert check_against_reference(llm, reference, requests, expected) <= 2  # see test_parity

    def test_an_engine_that_has_slept_answers_as_before(
        self, llm: LLM, reference: Reference, requests: list[Request]
    ) -> None:
        # vLLM's CPU worker keeps its memory; what this shows is the scheduler's pause and the loss of all cached KV.
        few = requests[:8]
        expected = references(reference, few, MAX_TOKENS)
        for level in (1, 2):
            check_against_reference(llm, reference, few, expected)
            llm.sleep(level=level)
            assert llm.llm_engine.is_sleeping()
            llm.wake_up()
            outs, _ = run(llm, few, max_tokens=MAX_TOKENS)
            assert outs[0].num_cached_tokens == 0
            assert all(is_same_output(out, truth, "awake") for out, truth in zip(outs, expected, strict=True))


@pytest.mark.conformance("sleep and wake", family="llama", refused=True)
def test_sleep_that_gives_memory_back_is_refused_at_start(checkpoint: Path) -> None:
    config = EngineArgs(str(checkpoint), additional_config=steer_config(layers=LAYERS)).create_engine_config()
    config.model_config.enable_sleep_mode = True  # vLLM refuses it itself where there is no GPU
    with pytest.raises(UnsupportedFeature, match="sleep mode"):
        check(config, SteerSettings(layers=LAYERS))


def answered_in_turns(engines: Sequence[tuple[LLM, Sequence[Request]]]) -> list[list[RequestOutput]]:
    """The outputs of each engine's requests. The engines take a step each in turn and share their request ids."""
    finished: list[dict[str, RequestOutput]] = [{} for _ in engines]
    for llm, requests in engines:
        for number, request in enumerate(requests):
            prompt = {"prompt_token_ids": request.prompt_ids}
            llm.llm_engine.add_request(str(number), prompt, request.params(max_tokens=MAX_TOKENS))
    while any(llm.llm_engine.has_unfinished_requests() for llm, _ in engines):
        for (llm, _), outs in zip(engines, finished, strict=True):
            outs.update({out.request_id: out for out in llm.llm_engine.step() if out.finished})
    return [[outs[str(number)] for number in range(len(outs))] for outs in finished]


@pytest.mark.slow
@pytest.mark.conformance("two engines in one process", family="llama")
def test_engines_in_one_process_that_take_their_steps_in_turn_do_not_meet(
    checkpoint: Path, open_engine: OpenEngine, reference: Reference
) -> None:
    prompts = random_prompts(VOCAB_SIZE, lengths=(3, 17, 33, 64), seed=74)
    batches = [mixed_batch(unit_vectors(layers, HIDDEN_SIZE, seed=75), prompts) for layers in (LAYERS, [1, 2, 3])]
    plain = [Request(request.prompt_ids, [], None) for request in batches[0][:8]]
    with (
        open_engine(checkpoint, layers=LAYERS) as first,
        open_engine(checkpoint, layers=[1, 2, 3]) as second,  # other layers, other vectors of the same names
        open_engine(checkpoint) as unconfigured,
    ):
        for llm, requests in zip((first, second), batches, strict=True):
            register_directions(llm, as_directions(requests[0].vectors))
        engines = list(zip((first, second, unconfigured), (*batches, plain), strict=True))
        for (llm, requests), outs in zip(engines, answered_in_turns(engines), strict=True):
            reads = [[None]] * len(outs) if llm is unconfigured else collect_readouts(llm, outs)
            expected = references(reference, requests, MAX_TOKENS)
            assert check_answers(reference, requests, expected, outs, [read for (read,) in reads]) <= 2


class Mortal:
    """The processes of an engine that has just been started: its core, and the worker below it."""

    def __init__(self) -> None:
        (self.core,) = [child for child in psutil.Process().children() if "EngineCore" in child.cmdline()[0]]
        (self.worker,) = [child for child in self.core.children() if "Worker" in child.cmdline()[0]]

    def check_gone(self) -> None:
        _, alive = psutil.wait_procs([self.core, self.worker], timeout=60)
        for process in alive:
            process.kill()
        assert not alive, f"left behind: {alive}"


@pytest.fixture
def in_processes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments of an engine whose core and worker are processes of their own."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0")
    return {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "kv_cache_memory_bytes": KV_BYTES,
        "disable_log_stats": True,
        "additional_config": steer_config(layers=LAYERS),
    }


READ = steered(SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True), readout=Readout(layers=LAYERS))
PROMPT = {"prompt_token_ids": [10, 20, 30]}


@pytest.mark.slow
@pytest.mark.timeout(600)  # so that waiting for ever is a failure
def test_all_that_waits_for_an_engine_core_that_is_killed_mid_batch_is_told(
    checkpoint: Path, in_processes: dict[str, Any]
) -> None:
    llm = LLM(str(checkpoint), **in_processes)
    try:
        mortal = Mortal()
        earlier = llm.generate([PROMPT], READ.clone(), use_tqdm=False)
        client = llm.llm_engine.engine_core
        collecting: list[Future[Any]] = []
        step, steps = llm.llm_engine.step, 0

        def step_and_kill() -> Any:
            """After a few tokens: stop the core, so that one more question is left waiting, and then kill it."""
            nonlocal steps
            steps += 1
            if steps == 3:
                mortal.core.suspend()
                collecting.append(pool.submit(collect_readouts, llm, earlier))
                while not client.utility_results:
                    time.sleep(0.01)
                mortal.core.kill()
            return step()

        with ThreadPoolExecutor() as pool:
            llm.llm_engine.step = step_and_kill
            with pytest.raises(EngineDeadError):
                llm.generate([PROMPT] * 4, READ.clone(), use_tqdm=False)
            with pytest.raises(EngineDeadError):
                collecting[0].result()
        for ask in (
            lambda: llm.generate([PROMPT], READ.clone(), use_tqdm=False),
            lambda: collect_readouts(llm, earlier),
            lambda: register_directions(llm, [Direction("late", 1, np.ones(HIDDEN_SIZE))]),
        ):
            with pytest.raises(EngineDeadError):
                ask()
        mortal.check_gone()
    finally:
        close_llm(llm)


@pytest.mark.slow
@pytest.mark.breadth
@pytest.mark.timeout(600)
def test_streams_and_readouts_of_an_engine_whose_worker_is_killed_end_with_an_error(
    checkpoint: Path, in_processes: dict[str, Any]
) -> None:
    async def run() -> int:
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(str(checkpoint), **in_processes))
        mortal, streamed = Mortal(), 0

        async def stream(name: str) -> None:
            nonlocal streamed
            async for _ in engine.generate(PROMPT, READ.clone(), name):
                streamed += 1
                if streamed == 12:
                    mortal.worker.kill()

        try:
            ends = await asyncio.gather(*(stream(str(number)) for number in range(4)), return_exceptions=True)
            assert [type(end) for end in ends] == [EngineDeadError] * 4
            with pytest.raises(EngineDeadError):
                await engine.collective_rpc("vllm_steer_collect", args=([("0", 0, 3)],))
        finally:
            engine.shutdown()
        mortal.check_gone()
        return streamed

    assert asyncio.run(run()) >= 12
