"""A model whose layers were never compared starts only with leave, and then says so wherever it is asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
from vllm import LLM

from tests.engine.conftest import OpenEngine
from tests.support.hf_reference import Reference
from tests.support.mixed_batch import (
    as_directions,
    check_against_reference,
    mixed_batch,
    random_prompts,
    references,
    run,
    unit_vectors,
)
from tests.support.tiny_models import HIDDEN_SIZE, NUM_LAYERS, REFUSED_FAMILIES, VOCAB_SIZE
from vllm_steer import model_record, register_directions
from vllm_steer.engine.worker import worker_steering
from vllm_steer.errors import UnsupportedModel

pytestmark = [pytest.mark.engine, pytest.mark.slow]

# transformers has it and vLLM has no class for it, so vLLM runs transformers' modules.
UNPROVEN = "helium"
LAYERS = [0, 2, NUM_LAYERS - 1]
VECTORS = unit_vectors(LAYERS, HIDDEN_SIZE)
REQUESTS = mixed_batch(VECTORS, random_prompts(VOCAB_SIZE, lengths=(3, 17, 40)))


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model(UNPROVEN)


class TestWithLeave:
    @pytest.fixture(scope="class")
    def said(self) -> list[str]:
        """What the plugin has logged as a warning."""
        return []

    @pytest.fixture(scope="class")
    def llm(self, checkpoint: Path, reference: Reference, open_engine: OpenEngine, said: list[str]) -> Iterator[LLM]:
        # After the reference: an engine that runs Hugging Face's class changes it.
        def keep(message: str, *values: object) -> None:
            said.append(message % values)

        with (
            mock.patch.object(worker_steering.logger, "warning", keep),
            open_engine(checkpoint, layers=LAYERS, config={"unproven_model": "experiment"}) as engine,
        ):
            register_directions(engine, as_directions(VECTORS))
            yield engine

    def test_the_log_the_record_and_every_readout_say_that_only_the_experiment_speaks_for_it(
        self, llm: LLM, said: list[str]
    ) -> None:
        assert any("rests on the experiment at start-up alone: transformers.models.helium" in line for line in said)
        record = model_record(llm)
        assert record["proof"] == "experiment"
        assert [layer["convention"] for layer in record["experiment"]["layers"]] == ["batched"] * NUM_LAYERS
        assert json.loads(json.dumps(record)) == record
        _, reads = run(llm, REQUESTS, max_tokens=4)
        assert {read.proof for (read,) in reads if read is not None} == {"experiment"}

    def test_what_the_experiment_found_is_right(self, llm: LLM, reference: Reference) -> None:
        assert check_against_reference(llm, reference, REQUESTS, references(reference, REQUESTS, 6)) <= 1


# Last: an engine that runs Hugging Face's class changes it, so no reference of it can be made afterwards.
@pytest.mark.conformance("steering", refused=True)
@pytest.mark.conformance("readout", refused=True)
@pytest.mark.parametrize("family", REFUSED_FAMILIES)
def test_without_leave_it_is_refused_once_it_is_loaded(
    family: str, tiny_model: Callable[[str], Path], open_engine: OpenEngine
) -> None:
    with (
        pytest.raises(
            UnsupportedModel,
            match=r"(Bloom|Helium).*, .* never compared .*'(single|batched)'.*unproven_model='experiment'",
        ),
        open_engine(tiny_model(family), layers=LAYERS),
    ):
        pass
