"""Each form of each operation over spans of each kind equals Hugging Face forward hooks, however the engine runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM

from tests.engine.conftest import BLOCK_SIZE, OpenEngine
from tests.support.hf_reference import Reference, ReferenceRun
from tests.support.mixed_batch import (
    as_directions,
    check_against_reference,
    every_operation,
    is_same_output,
    random_prompts,
    references,
    run,
    share_changed_by_steering,
    unit_vectors,
)
from tests.support.tiny_models import HIDDEN_SIZE, NUM_LAYERS, VOCAB_SIZE
from vllm_steer import register_directions

pytestmark = [pytest.mark.engine, pytest.mark.slow]

MAX_TOKENS = 6
LAYERS = [0, 2, NUM_LAYERS - 1]
VECTORS = unit_vectors(LAYERS, HIDDEN_SIZE, seed=31)
# Two share their first block, and two are longer than the chunks of the chunked engine.
PROMPTS = random_prompts(VOCAB_SIZE, lengths=(3, 5, BLOCK_SIZE + 1, 40), seed=32)
REQUESTS = every_operation(VECTORS, [*PROMPTS, PROMPTS[3][: BLOCK_SIZE + 4]])
BREADTH = pytest.mark.breadth


def _case(family: str, *marks: pytest.MarkDecorator, **engine: Any) -> Any:
    mode = ", ".join(engine) or "eager"
    claim = pytest.mark.conformance("operations", family=family)
    return pytest.param((family, engine), id=f"{family}-{mode}", marks=(claim, *marks))


CASES = [
    _case("llama"),
    _case("llama", max_num_batched_tokens=16, max_num_seqs=8),
    _case("llama", BREADTH, enforce_eager=False),
    _case("qwen2", BREADTH),
    _case("gpt2", BREADTH),
    _case("gemma2"),
    _case("mixtral", BREADTH),
]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    chosen: tuple[str, dict[str, Any]] = request.param
    return chosen


@pytest.fixture(scope="module")
def checkpoint(case: tuple[str, dict[str, Any]], tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model(case[0])


@pytest.fixture(scope="module")
def expected(reference: Reference) -> list[ReferenceRun]:
    return references(reference, REQUESTS, MAX_TOKENS)


@pytest.fixture(scope="module")
def llm(case: tuple[str, dict[str, Any]], checkpoint: Path, open_engine: OpenEngine) -> Iterator[LLM]:
    with open_engine(checkpoint, layers=LAYERS, **case[1]) as engine:
        register_directions(engine, as_directions(VECTORS))
        yield engine


def test_every_operation_equals_hugging_face_hooks_and_again_from_the_prefix_cache(
    llm: LLM, reference: Reference, expected: list[ReferenceRun]
) -> None:
    assert len(REQUESTS) >= 64
    over_prompt = [one for one in REQUESTS if "over" in one.steering[0].get("when", {})]
    num_held = sum(len(reference.decided(one.prompt_ids, one.steering)) for one in over_prompt)
    assert 5 < num_held < len(over_prompt) - 5, "hardly any condition over the prompt holds, or hardly any fails"
    acting = [(one, truth) for one, truth in zip(REQUESTS, expected, strict=True) if all(truth.held)]
    assert share_changed_by_steering(reference, *zip(*acting, strict=True)) > 0.5, "few change the output"
    assert check_against_reference(llm, reference, REQUESTS, expected) <= 3  # near ties, see test_parity
    plain = [request for request in REQUESTS if request.readout is None]
    truths = [truth for request, truth in zip(REQUESTS, expected, strict=True) if request.readout is None]
    outs, _ = run(llm, plain, max_tokens=MAX_TOKENS)
    assert any(out.num_cached_tokens for out in outs), "nothing came from the cache, so this shows nothing of it"
    same = [is_same_output(out, truth, request.label) for out, truth, request in zip(outs, truths, plain, strict=True)]
    assert same.count(False) <= 2
