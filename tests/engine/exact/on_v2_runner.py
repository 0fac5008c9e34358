"""The classic runner's tests for vLLM's V2 runner: started by `test_runner_v2`, or by hand with
``pytest -p tests.support.interpreted_triton tests/engine/exact/on_v2_runner.py``; on an accelerator without the ``-p``.

The vocabulary is small because interpreted sampling kernels take time for each block of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams
from vllm.config import CompilationMode
from vllm.platforms import current_platform
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.warmup import run_mixed_prefill_decode_warmup

from tests.engine.conftest import OpenEngine
from tests.support.hf_reference import Entry, Reference, ReferenceRun
from tests.support.mixed_batch import (
    READOUT_TOLERANCE,
    Request,
    Vectors,
    as_directions,
    check_against_reference,
    check_readout,
    check_trace,
    is_same_output,
    mixed_batch,
    random_prompts,
    references,
    run,
    unit_vectors,
)
from tests.support.tiny_models import HIDDEN_SIZE, INIT_STD, MAX_POSITIONS, NUM_HEADS, NUM_KV_HEADS, NUM_LAYERS
from tests.support.worker_state import state_held
from vllm_steer import collect_readouts, register_directions
from vllm_steer.engine.worker.readout_store import FinishedReadout
from vllm_steer.engine.worker.worker_steering import WorkerSteering, steering_of

pytestmark = pytest.mark.engine

LAYERS = [0, 2, NUM_LAYERS - 1]
VOCAB_SIZE = 512
MAX_TOKENS = 10


@dataclass(frozen=True)
class Workload:
    """The mixed batch over a checkpoint, with the reference's answers."""

    checkpoint: Path
    reference: Reference
    vectors: Vectors
    requests: list[Request]
    expected: list[ReferenceRun]

    def check(self, llm: LLM) -> None:
        """Assert that `llm` answers all requests as the reference does, and keeps nothing of them."""
        register_directions(llm, as_directions(self.vectors))
        assert check_against_reference(llm, self.reference, self.requests, self.expected) <= 2  # as in test_parity
        # The runner hears of the last finished requests only with the next step.
        llm.generate([{"prompt_token_ids": [7, 8]}], SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False)
        assert not any(state_held(worker_of(llm)).values())

    def check_ends_that_nobody_foresees(self, llm: LLM) -> None:
        """Do the same for requests that end at a token, of which an asynchronous scheduler learns one step late."""
        ended = [
            (one, answer.first(answer.tokens.index(answer.tokens[4]) + 1))
            for one, answer in zip(self.requests, self.expected, strict=True)
            if not one.has_stop  # their stop may come first
        ]
        outs = llm.generate(
            [{"prompt_token_ids": request.prompt_ids} for request, _ in ended],
            [request.params(max_tokens=MAX_TOKENS, stop_token_ids=answer.tokens[-1:]) for request, answer in ended],
            use_tqdm=False,
        )
        for (request, answer), out, (read,) in zip(ended, outs, collect_readouts(llm, outs), strict=True):
            assert is_same_output(out, answer, request.label)
            check_readout(read, request.readout, answer, request.label)
            check_trace(read, request, answer)


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    checkpoint = tmp_path_factory.mktemp("checkpoint")
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=2 * HIDDEN_SIZE,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=INIT_STD,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(checkpoint)
    vectors = unit_vectors(LAYERS, HIDDEN_SIZE, seed=21)
    # Lengths on both sides of the ends of blocks (32) and chunks (40).
    requests = mixed_batch(vectors, random_prompts(VOCAB_SIZE, lengths=(3, 31, 32, 33, 48, 79), seed=22))
    reference = Reference(checkpoint)
    return Workload(checkpoint, reference, vectors, requests, references(reference, requests, MAX_TOKENS))


@pytest.fixture
def open_v2(workload: Workload, open_engine: OpenEngine) -> Iterator[Callable[..., LLM]]:
    """Start an engine over the workload's checkpoint, and check that it has the V2 runner."""
    engines = []

    def start(**engine_args: Any) -> LLM:
        arguments = {"max_num_batched_tokens": 40, "max_num_seqs": 12, "skip_tokenizer_init": True} | engine_args
        engines.append(open_engine(workload.checkpoint, layers=LAYERS, **arguments))
        llm: LLM = engines[-1].__enter__()
        runner = worker_of(llm).model_runner
        assert isinstance(runner, GPUModelRunner)
        assert type(runner.model_state).__name__ == "SteeringDefaultModelState"
        return llm

    yield start
    for engine in engines:
        engine.__exit__(None, None, None)


def worker_of(llm: LLM) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker


def steering(llm: LLM) -> WorkerSteering:
    found = steering_of(worker_of(llm).model_runner)
    assert found is not None
    return found


def test_a_mixed_batch_in_chunks_with_dummy_runs_between_its_steps(
    workload: Workload, open_v2: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = open_v2()
    runner = worker_of(llm).model_runner
    execute, counted = runner.execute_model, Counter[str]()

    def with_dummy_runs(*args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("dummy_run"):
            counted["real"] += 1
            if counted["real"] % 4 == 0:
                counted["dummy"] += 1
                runner._dummy_run(num_tokens=17)
        return execute(*args, **kwargs)

    monkeypatch.setattr(runner, "execute_model", with_dummy_runs)
    workload.check(llm)
    assert counted["dummy"] > 5


def test_the_compiled_path(workload: Workload, open_v2: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled by Inductor into C++; only the runner's own Triton kernels are interpreted."""
    # Inductor hashes Triton's backend into the key of what it compiles, and the interpreter has none.
    monkeypatch.setattr("torch.utils._triton.triton_hash_with_backend", lambda: "interpreted")
    llm = open_v2(enforce_eager=False)
    compiled = llm.llm_engine.vllm_config.compilation_config
    assert (compiled.backend, compiled.mode != CompilationMode.NONE) == ("inductor", True)
    workload.check(llm)


def test_a_warm_up_with_made_up_requests_leaves_no_trace(open_v2: Callable[..., LLM]) -> None:
    llm = open_v2()
    worker, buffers = worker_of(llm), steering(llm).buffers
    # As `warmup_kernels`, whose grammar kernel the interpreter cannot run.
    assert run_mixed_prefill_decode_warmup(
        worker.model_runner, worker.execute_model, worker.sample_tokens, num_tokens=12
    )
    assert bool((buffers.row_of_token == -1).all())
    assert not buffers.segment_A2.any()
    assert not any(bool(sums.any()) for sums in buffers.sums_L_AD)
    assert not any(state_held(worker).values())


def test_rows_and_sums_from_the_prefix_cache(workload: Workload, open_v2: Callable[..., LLM]) -> None:
    """Each token's row; and a second reading whose blocks are not computed but added up from sums of the first."""
    llm = open_v2(enable_prefix_caching=True, config={"max_rows": 1000, "block_sums_mib": 1})
    register_directions(llm, as_directions(workload.vectors))
    prompt = random_prompts(VOCAB_SIZE, lengths=(79,), seed=23)[0]
    name, layer = "calm", LAYERS[0]
    entries: list[list[Entry]] = [
        [],
        [
            {
                "name": name,
                "layer": layer,
                "vector": workload.vectors[name, layer],
                "alpha": 9.0,
                "op": "add",
                "span": "all",
            }
        ],
    ]
    for steering in entries:
        expected = workload.reference.generate(prompt, MAX_TOKENS, steering)
        for pool, cached in (("mean", 0), ("mean", 64), ("rows", 0)):
            request = Request(prompt, steering, {"layers": LAYERS, "span": "all", "pool": pool})
            (out,), ((read,),) = run(llm, [request], max_tokens=MAX_TOKENS)
            assert read is not None
            assert is_same_output(out, expected, request.label)
            assert out.num_cached_tokens == cached  # rows take nothing from the cache
            assert read.num_tokens == len(prompt) + MAX_TOKENS - 1
            for at in LAYERS:
                rows = expected.rows(at, "all")
                ours, theirs = (read.rows[at], rows) if pool == "rows" else (read.mean[at], rows.mean(axis=0))
                assert ours.shape == theirs.shape
                distance = np.linalg.norm(ours - theirs, axis=-1)
                assert (distance < READOUT_TOLERANCE * np.linalg.norm(theirs, axis=-1)).all()


def test_asynchronous_scheduling_and_preemption(
    workload: Workload, open_v2: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counter[str]()
    preempt, answer = Scheduler._preempt_request, FinishedReadout.answer
    configure = type(current_platform).check_and_update_config

    def counting_preempt(self: Scheduler, request: Any, *args: Any, **kwargs: Any) -> None:
        counted["preempted"] += 1
        counted["preempted while generating"] += request.num_output_tokens > 0
        preempt(self, request, *args, **kwargs)

    def counting_answer(self: FinishedReadout, computed_end: int) -> Any:
        counted["one token too many"] += self.spec.end is None and self.state.next_position == computed_end + 1
        return answer(self, computed_end)

    def asynchronous(vllm_config: Any) -> None:
        configure(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True  # the CPU platform has switched it off

    monkeypatch.setattr(Scheduler, "_preempt_request", counting_preempt)
    monkeypatch.setattr(FinishedReadout, "answer", counting_answer)
    monkeypatch.setattr(type(current_platform), "check_and_update_config", staticmethod(asynchronous))
    # Blocks for about four requests, whose prompts all fit into one step: they grow at the same time.
    llm = open_v2(num_gpu_blocks_override=9, max_model_len=128, max_num_batched_tokens=256)
    assert isinstance(llm.llm_engine.engine_core.engine_core.scheduler, AsyncScheduler)
    workload.check(llm)
    workload.check_ends_that_nobody_foresees(llm)
    assert counted["preempted while generating"] > 0
    assert counted["one token too many"] > 0
