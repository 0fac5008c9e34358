"""``default_steering`` acts on every request, whichever way it comes in, and an empty list switches it off."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm import LLM, RequestOutput, SamplingParams
from vllm.sampling_params import BeamSearchParams
from vllm.v1.engine import EngineCoreRequest

from tests.engine.conftest import OpenEngine
from tests.support.hf_reference import Entry, Reference
from tests.support.mixed_batch import Vectors, as_directions, is_same_output, random_prompts, unit_vectors
from tests.support.tiny_models import HIDDEN_SIZE, NUM_LAYERS, VOCAB_SIZE
from vllm_steer import Readout, Steering, collect_readouts, errors, save_directions, steered
from vllm_steer.engine.front.admission import admission_of

pytestmark = pytest.mark.engine

LAYERS = [0, 2, NUM_LAYERS - 1]
MAX_TOKENS = 12
VECTORS: Vectors = unit_vectors(LAYERS, HIDDEN_SIZE, seed=81)
DEFAULT: list[Entry] = [
    {"name": "calm", "layer": 2, "vector": VECTORS["calm", 2], "alpha": 15.0, "op": "add", "span": "generated"},
    {"name": "bold", "layer": 0, "vector": VECTORS["bold", 0], "alpha": -8.0, "op": "add", "span": "all"},
]
OWN: list[Entry] = [
    {"name": "bold", "layer": 2, "vector": VECTORS["bold", 2], "alpha": 12.0, "op": "add", "span": "all"}
]
PROMPT = random_prompts(VOCAB_SIZE, lengths=(37,), seed=82)[0]
FIELDS: dict[str, Any] = {"temperature": 0.0, "max_tokens": MAX_TOKENS, "ignore_eos": True, "logprobs": 0}


def entries_of(asked: list[Entry]) -> list[Steering]:
    return [Steering(one["name"], one["alpha"], one["layer"], one["op"], one["span"]) for one in asked]


@pytest.fixture(scope="module")
def llm(checkpoint: Path, open_engine: OpenEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    file = tmp_path_factory.mktemp("default") / "all.safetensors"
    save_directions(file, as_directions(VECTORS))
    default = [one.to_json() for one in entries_of(DEFAULT)]
    with open_engine(checkpoint, layers=LAYERS, config={"directions": file, "default_steering": default}) as engine:
        yield engine


def check(out: RequestOutput, reference: Reference, steering: list[Entry]) -> None:
    truth = reference.generate(PROMPT, MAX_TOKENS, steering=steering)
    assert is_same_output(out, truth, f"steered by {[one['name'] for one in steering]}")


def generate(llm: LLM, params: SamplingParams) -> RequestOutput:
    (out,) = llm.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False)
    return out


def test_a_request_that_says_nothing_is_steered_by_the_default(llm: LLM, reference: Reference) -> None:
    params = SamplingParams(**FIELDS)
    check(generate(llm, params), reference, DEFAULT)
    assert params.extra_args is None, "the caller's parameters are the caller's"
    check(generate(llm, steered(FIELDS)), reference, DEFAULT)
    check(generate(llm, SamplingParams(**FIELDS, extra_args={"own": 1})), reference, DEFAULT)


def test_an_empty_list_asks_for_none(llm: LLM, reference: Reference) -> None:
    check(generate(llm, steered(FIELDS, [])), reference, [])
    check(generate(llm, SamplingParams(**FIELDS, extra_args={"vllm_steer": '{"steering": []}'})), reference, [])


def test_steering_of_its_own_takes_the_default_s_place(llm: LLM, reference: Reference) -> None:
    check(generate(llm, steered(FIELDS, entries_of(OWN))), reference, OWN)


def test_a_readout_that_says_nothing_of_steering_reads_the_default(llm: LLM, reference: Reference) -> None:
    for steering, expected in ((None, DEFAULT), ([], [])):
        readout = Readout([2], "all", ["calm"])
        out = generate(llm, steered(FIELDS, steering, readout))
        check(out, reference, expected)
        ((read,),) = collect_readouts(llm, [out])
        assert read is not None
        truth = reference.generate(PROMPT, MAX_TOKENS, steering=expected).streams[2].mean(axis=0)
        # float32 sums of some 50 rows in another order; one default entry more or less is off by far more
        np.testing.assert_allclose(read.mean[2], truth, rtol=1e-4, atol=1e-4)


def test_every_call_of_vllms_own_is_steered(llm: LLM) -> None:
    """Also the calls of a library that knows nothing of this plugin, such as an evaluation harness."""
    said = llm.chat([{"role": "user", "content": "Tell me a story"}], SamplingParams(**FIELDS), use_tqdm=False)
    plain = llm.chat([{"role": "user", "content": "Tell me a story"}], steered(FIELDS, []), use_tqdm=False)
    assert said[0].outputs[0].token_ids != plain[0].outputs[0].token_ids
    scored = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
    with_default, without = (
        llm.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False)[0].prompt_logprobs
        for params in (scored, steered(scored, []))
    )
    assert with_default is not None
    assert without is not None
    last = PROMPT[-1]
    # the entry over all tokens moves the prompt's own log-probabilities, by far more than rounding
    assert abs(with_default[-1][last].logprob - without[-1][last].logprob) > 1e-2  # type: ignore[index]


def test_the_default_and_none_share_no_block_of_the_cache_that_they_must_not(llm: LLM, reference: Reference) -> None:
    for params, expected in (
        (SamplingParams(**FIELDS), DEFAULT),
        (steered(FIELDS, []), []),
        (steered(FIELDS), DEFAULT),
    ):
        check(generate(llm, params), reference, expected)


def test_beam_search_is_refused_on_an_engine_with_a_default(llm: LLM) -> None:
    with pytest.raises(errors.MalformedSpec, match="beam_search was called on an engine with default_steering"):
        llm.beam_search([{"prompt_token_ids": PROMPT}], BeamSearchParams(beam_width=2, max_tokens=4))
    assert not llm.llm_engine.has_unfinished_requests()


def test_a_request_made_by_hand_is_refused_because_nothing_has_steered_it(llm: LLM) -> None:
    by_hand = EngineCoreRequest(
        request_id="by hand",
        prompt_token_ids=PROMPT,
        mm_features=None,
        sampling_params=SamplingParams(**FIELDS),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    with pytest.raises(errors.MalformedSpec, match="made by hand"):
        llm.llm_engine.add_request("by hand", by_hand, by_hand.sampling_params)
    assert not llm.llm_engine.has_unfinished_requests()


def test_a_request_is_refused_while_the_default_s_direction_is_not_registered(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not run unsteered."""
    registry = admission_of(llm.llm_engine.input_processor).registry
    monkeypatch.delitem(registry._by_name, "calm")
    monkeypatch.setattr(registry, "state", object())  # as after any change
    with pytest.raises(errors.UnknownDirection, match="no direction is named 'calm'"):
        generate(llm, SamplingParams(**FIELDS))
    generate(llm, steered(FIELDS, []))
