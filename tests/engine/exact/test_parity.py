"""A mixed batch equals Hugging Face forward hooks, token for token and vector for vector, in every architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from vllm import LLM

from tests.conformance import EXPERIMENT
from tests.engine.conftest import OpenEngine
from tests.support.architectures import ARCHITECTURES, REPRESENTATIVE
from tests.support.cpu_stand_ins import stand_ins
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
from tests.support.tiny_models import HIDDEN_SIZE, NUM_LAYERS, VOCAB_SIZE
from vllm_steer import model_record, register_directions
from vllm_steer.engine.layer_classes import LAYER_CLASSES

pytestmark = pytest.mark.engine

MAX_TOKENS = 8
LAYERS = [
    0,
    2,
    NUM_LAYERS - 1,
]  # with the first and the last block, whose surroundings differ from those of inner blocks
VECTORS = unit_vectors(LAYERS, HIDDEN_SIZE)
REQUESTS = mixed_batch(VECTORS, random_prompts(VOCAB_SIZE, lengths=(3, 5, 17, 33, 64, 90)))
IN_THE_QUICK_RUN = "LlamaForCausalLM"  # the others take minutes together, and all architectures twenty


def _marks(name: str) -> list[pytest.MarkDecorator]:
    if name == IN_THE_QUICK_RUN:
        return []
    return [pytest.mark.slow] if name in REPRESENTATIVE else [pytest.mark.slow, pytest.mark.breadth]


@pytest.fixture(scope="module", params=[pytest.param(name, marks=_marks(name)) for name in ARCHITECTURES])
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
    row = ARCHITECTURES[family]
    with stand_ins(row.stand_ins), pytest.MonkeyPatch.context() as patch:
        for name, value in row.environment.items():
            patch.setenv(name, value)
        with open_engine(checkpoint, layers=LAYERS, **row.engine) as engine:
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


@pytest.mark.conformance("experiment")
def test_the_experiment_at_start_up_finds_what_the_table_says(
    llm: LLM, family: str, record_property: Callable[[str, object], None]
) -> None:
    record = model_record(llm)
    found = {layer["path"]: layer["convention"] for layer in record["experiment"]["layers"]}
    assert set(found) == set(ARCHITECTURES[family].layer_classes)
    assert found == {path: LAYER_CLASSES[path].convention for path in found}
    assert record["proof"] == "parity"
    record_property(EXPERIMENT, {"family": family, "found": found})


def test_what_is_said_to_be_compared_is_what_is_compared_here() -> None:
    said = {(row.path, name) for row in LAYER_CLASSES.values() for name in row.architectures}
    assert said == {(path, row.name or name) for name, row in ARCHITECTURES.items() for path in row.layer_classes}
