"""Engines with several worker processes: every rank steers the same stream, and readouts are complete."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm import LLM
from vllm.engine.arg_utils import EngineArgs

from tests.engine.conftest import OpenEngine
from tests.support.hf_reference import Reference, ReferenceRun
from tests.support.mixed_batch import (
    Request,
    as_directions,
    check_against_reference,
    mixed_batch,
    random_prompts,
    references,
    run,
    unit_vectors,
)
from tests.support.tiny_models import HIDDEN_SIZE, NUM_LAYERS, VOCAB_SIZE
from vllm_steer import register_directions, steer_config
from vllm_steer.engine.startup_checks import check
from vllm_steer.errors import BadCondition, BadReadout, UnsupportedFeature
from vllm_steer.settings import SteerSettings

pytestmark = pytest.mark.engine

LAYERS = [0, 2, NUM_LAYERS - 1]
MAX_TOKENS = 16
RANKS = 2


@dataclass(frozen=True)
class Workload:
    """The mixed batch with the reference's answers."""

    requests: list[Request]
    reference: Reference
    expected: list[ReferenceRun]

    def check(self, llm: LLM) -> None:
        excused = check_against_reference(llm, self.reference, self.requests, self.expected)
        assert excused <= 2  # see test_parity

    def check_stages(self, llm: LLM) -> None:
        """``check`` for pipeline stages, which refuse conditions at an earlier layer and stops."""
        fit = [n for n, request in enumerate(self.requests) if not request.looks_back and not request.has_stop]
        assert any(request.looks_back for request in self.requests)
        assert any(request.has_stop for request in self.requests)
        for request in self.requests:
            if request.looks_back or request.has_stop:
                with pytest.raises(BadCondition if request.looks_back else BadReadout, match="pipeline parallelism"):
                    run(llm, [request], max_tokens=MAX_TOKENS)
        requests, expected = ([given[number] for number in fit] for given in (self.requests, self.expected))
        Workload(requests, self.reference, expected).check(llm)


@pytest.fixture(scope="module")
def workload(reference: Reference) -> Workload:
    prompts = random_prompts(VOCAB_SIZE, lengths=(3, 17, 33, 64, 90), seed=52)
    requests = mixed_batch(unit_vectors(LAYERS, HIDDEN_SIZE, seed=51), prompts)
    return Workload(requests, reference, references(reference, requests, MAX_TOKENS))


@pytest.fixture(autouse=True)
def _one_core_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join(str(core) for core in range(RANKS)))


def state_of_rank(worker: Any) -> dict[str, Any]:
    """Runs on a worker: its hooked layers, its bank, and the sums that its op has made."""
    runner = worker.model_runner
    buffers = runner.vllm_steer.buffers
    return {
        "hooked": runner.vllm_steer.hooked,
        "bank": buffers.bank_SD.numpy(),
        "sums": [sums_AD.numpy() for sums_AD in buffers.sums_L_AD],
    }


@pytest.mark.slow
@pytest.mark.conformance("tensor parallelism (2)", family="llama")
def test_two_tensor_parallel_ranks_answer_as_the_reference_and_hold_the_same_stream(
    workload: Workload, checkpoint: Path, open_engine: OpenEngine
) -> None:
    with open_engine(checkpoint, layers=LAYERS, tensor_parallel_size=RANKS) as llm:
        register_directions(llm, as_directions(workload.requests[0].vectors))
        workload.check(llm)
        ranks = llm.collective_rpc(state_of_rank)
    assert len(ranks) == RANKS
    first, second = ranks
    assert first["hooked"] == second["hooked"] == LAYERS
    assert np.count_nonzero(first["bank"].any(axis=1)) == len(as_directions(workload.requests[0].vectors))
    np.testing.assert_array_equal(first["bank"], second["bank"])
    for seen_by_first, seen_by_second in zip(first["sums"], second["sums"], strict=True):
        assert seen_by_first.any()
        # Both ranks take the result of the same all-reduce, so not even its rounding differs.
        np.testing.assert_array_equal(seen_by_first, seen_by_second)


def as_warm_up_would(worker: Any) -> None:
    """Runs on a worker: allocate the tensors into which a later stage receives.

    Stock vLLM 0.32 does so when it warms up, which its CPU engine skips when eager: the first request then fails an
    assertion (v1/worker/gpu_model_runner.py, sync_and_gather_intermediate_tensors). A compiled engine, which starts two
    minutes slower, does not need this.
    """
    runner = worker.model_runner
    runner.intermediate_tensors = runner.get_model().make_empty_intermediate_tensors(
        batch_size=runner.max_num_tokens, dtype=runner.dtype, device=runner.device
    )


@pytest.mark.slow
@pytest.mark.conformance("pipeline parallelism (2)", family="llama")
def test_two_pipeline_stages_answer_as_the_reference_each_with_its_own_layers(
    workload: Workload, checkpoint: Path, open_engine: OpenEngine
) -> None:
    under_way: list[int] = []
    # Few tokens a step, so that two stages have batches of different requests.
    with open_engine(checkpoint, layers=LAYERS, pipeline_parallel_size=RANKS, max_num_batched_tokens=64) as llm:
        llm.collective_rpc(as_warm_up_would)
        core = llm.llm_engine.engine_core.engine_core
        schedule = core.scheduler.schedule

        def counting(*args: Any, **kwargs: Any) -> Any:
            under_way.append(len(core.batch_queue))
            return schedule(*args, **kwargs)

        core.scheduler.schedule = counting
        register_directions(llm, as_directions(workload.requests[0].vectors))
        workload.check_stages(llm)
        first, second = llm.collective_rpc(state_of_rank)
    assert max(under_way) > 0, "no two batches were ever under way at once"
    # The batch has readouts that span both stages and readouts that one stage holds completely.
    assert (first["hooked"], second["hooked"]) == ([0], [2, 3])
    np.testing.assert_array_equal(first["bank"], second["bank"])
    assert [sums_AD.any() for sums_AD in first["sums"]] == [True, False, False]
    assert [sums_AD.any() for sums_AD in second["sums"]] == [False, True, True]


def asynchronously(config: Any) -> None:
    config.scheduler_config.async_scheduling = True  # the CPU platform switches it off, even if it was asked for


def speculating(config: Any) -> None:
    config.speculative_config = SimpleNamespace(method="ngram")


def with_adapters(config: Any) -> None:
    config.lora_config = SimpleNamespace()


@pytest.mark.parametrize(
    ("change", "feature"),
    [(asynchronously, "asynchronous scheduling"), (speculating, "speculative decoding"), (with_adapters, "LoRA")],
)
def test_what_was_not_compared_with_pipeline_stages_is_refused_beside_them(
    checkpoint: Path, change: Callable[[Any], None], feature: str
) -> None:
    engine = EngineArgs(str(checkpoint), additional_config=steer_config(layers=LAYERS), pipeline_parallel_size=2)
    config = engine.create_engine_config()
    change(config)
    with pytest.raises(UnsupportedFeature, match=f"pipeline parallelism and {feature} at once"):
        check(config, SteerSettings(layers=LAYERS))
