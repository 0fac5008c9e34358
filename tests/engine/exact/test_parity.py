"""A mixed batch equals Hugging Face forward hooks, token for token and vector for vector, in every family."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from vllm import LLM

from tests.engine.conftest import OpenEngine
from tests.support.hf_reference import Reference, ReferenceRun
from tests.support.mixed_batch import (
    as_directions,
    check_against_reference,
    mixed_batch,
    random_prompts,
    references,
    share_changed_by_steering,
    unit_vectors,
)
from tests.support.tiny_models import HIDDEN_SIZE, NUM_LAYERS, SUPPORTED_FAMILIES, VOCAB_SIZE
from vllm_steer import register_directions

pytestmark = pytest.mark.engine

MAX_TOKENS = 8
LAYERS = [
    0,
    2,
    NUM_LAYERS - 1,
]  # with the first and the last block, whose surroundings differ from those of inner blocks
VECTORS = unit_vectors(LAYERS, HIDDEN_SIZE)
REQUESTS = mixed_batch(VECTORS, random_prompts(VOCAB_SIZE, lengths=(3, 5, 17, 33, 64, 90)))
# Of vLLM's two CPU kernels for latent attention, one is inexact in float32 and one refuses float32.
ENVIRONMENT = {"deepseekv2": {"VLLM_MLA_DISABLE": "1"}}


@pytest.fixture(
    scope="module",
    # One family stays in the quick run; together the others take minutes.
    params=[pytest.param(name, marks=[] if name == "llama" else pytest.mark.slow) for name in SUPPORTED_FAMILIES],
)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def checkpoint(family: str, tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model(family)


@pytest.fixture(scope="module")
def expected(reference: Reference) -> list[ReferenceRun]:
    return references(reference, REQUESTS, MAX_TOKENS)


@pytest.fixture(scope="module")
def llm(family: str, checkpoint: Path, expected: list[ReferenceRun], open_engine: OpenEngine) -> Iterator[LLM]:
    # After the reference: an engine that runs Hugging Face's class changes it, so no other model of it can be built.
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.get(family, {}).items():
            patch.setenv(name, value)
        with open_engine(checkpoint, layers=LAYERS) as engine:
            register_directions(engine, as_directions(VECTORS))
            yield engine


@pytest.mark.conformance("steering")
@pytest.mark.conformance("readout")
def test_a_mixed_batch_equals_hugging_face_hooks(
    llm: LLM, reference: Reference, expected: list[ReferenceRun], capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(REQUESTS) >= 24
    excused = check_against_reference(llm, reference, REQUESTS, expected)
    with capsys.disabled():
        print(f" [{len(REQUESTS)} requests, {excused} near ties excused]", end="")
    # More than a few excused near ties would mean that the cause is not rounding.
    assert excused <= 2


def test_the_batch_is_worth_comparing_because_most_steering_changes_the_output(
    reference: Reference, expected: list[ReferenceRun]
) -> None:
    assert share_changed_by_steering(reference, REQUESTS, expected) > 0.5
