"""Every fault of a request or a start is refused by name before anything runs, and the engine goes on serving."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm import LLM, SamplingParams

from tests.engine.conftest import OpenEngine
from tests.support.mixed_batch import unit_vectors
from tests.support.tiny_models import HIDDEN_SIZE
from vllm_steer import Direction, Readout, Steering, errors, register_directions, steer_config, steered
from vllm_steer.engine.layer_classes import refuse_architecture

pytestmark = pytest.mark.engine

LAYER = 1
OTHER_HOOKED_LAYER = 2
MAX_ALPHA = 50.0
MAX_ENTRIES = 3
MAX_DIRECTIONS = 4
PROMPT = {"prompt_token_ids": [10, 20, 30, 40, 50]}
VECTOR = unit_vectors([LAYER], HIDDEN_SIZE, seed=41)["calm", LAYER]


@pytest.fixture(scope="module")
def llm(tiny_model: Callable[[str], Path], open_engine: OpenEngine) -> Iterator[LLM]:
    limits = {"max_alpha": MAX_ALPHA, "max_entries": MAX_ENTRIES, "max_directions": MAX_DIRECTIONS}
    with open_engine(tiny_model("llama"), layers=[LAYER, OTHER_HOOKED_LAYER], config=limits) as engine:
        long = Direction("long", LAYER, 3.0 * VECTOR)
        register_directions(engine, [Direction("calm", LAYER, VECTOR), long])
        register_directions(engine, [Direction("twofold", layer, VECTOR) for layer in (LAYER, OTHER_HOOKED_LAYER)])
        yield engine


@pytest.fixture(scope="module")
def usual_answer(llm: LLM) -> list[int]:
    return generate(llm, good())


@pytest.fixture(autouse=True)
def _engine_goes_on_serving(llm: LLM, usual_answer: list[int]) -> Iterator[None]:
    """After every refusal: nothing was left in the scheduler, and the next request is answered as usual."""
    yield
    assert not llm.llm_engine.has_unfinished_requests()
    assert generate(llm, good()) == usual_answer


def good() -> SamplingParams:
    return steered(SamplingParams(temperature=0.0, max_tokens=3), [Steering("calm", alpha=9.0)])


def wired(wire: object) -> SamplingParams:
    """Parameters that carry `wire` as a client of the HTTP server could send it, past the typed constructors."""
    text = wire if isinstance(wire, str) else json.dumps(wire)
    return SamplingParams(temperature=0.0, max_tokens=3, extra_args={"vllm_steer": text})


def entry(**fields: Any) -> dict[str, Any]:
    return {"direction": "calm", "alpha": 1.0} | fields


def generate(llm: LLM, params: SamplingParams) -> list[int]:
    (out,) = llm.generate([PROMPT], params, use_tqdm=False)
    return list(out.outputs[0].token_ids)


def named_class(refusal: errors.SteerError) -> type:
    """The most specific class of the public exception tree; admission raises it mixed with vLLM's HTTP error."""
    return next(base for base in type(refusal).__mro__ if getattr(errors, base.__name__, None) is base)


# Steering, the class of its refusal, and parts of the message: what was got and what is allowed.
REFUSED_STEERING: dict[str, tuple[list[Any], type[errors.SteerError], tuple[str, ...]]] = {
    "unknown direction": ([entry(direction="nobody")], errors.UnknownDirection, ("'nobody'", "calm")),
    "layer not hooked": ([entry(layer=3)], errors.LayerNotHooked, ("layer 3", "[1, 2]")),
    "layer beyond the model": ([entry(layer=400)], errors.LayerNotHooked, ("layer 400", "[1, 2]")),
    "negative layer": ([entry(layer=-1)], errors.MalformedSpec, ("-1",)),
    "name at two layers, none given": ([entry(direction="twofold")], errors.AmbiguousDirection, ("[1, 2]",)),
    "alpha beyond the bound": ([entry(alpha=50.5)], errors.BadAlpha, ("50.5", "50")),
    "negative alpha beyond the bound": ([entry(alpha=-51)], errors.BadAlpha, ("-51", "up to 50")),
    "alpha NaN": ([entry(alpha=math.nan)], errors.BadAlpha, ("nan", "finite")),
    "alpha infinite": ([entry(alpha=-math.inf)], errors.BadAlpha, ("inf", "finite")),
    "alpha a string": ([entry(alpha="5")], errors.BadAlpha, ("'5'", "finite number")),
    "alpha a boolean": ([entry(alpha=True)], errors.BadAlpha, ("true", "finite number")),
    "alpha missing": ([{"direction": "calm"}], errors.BadAlpha, ("alpha",)),
    "alpha with ablate": ([entry(op="ablate", alpha=2.5)], errors.BadAlpha, ("2.5", "up to 2")),
    "bad span": ([entry(span="middle")], errors.BadSpan, ("'middle'", "prompt, generated")),
    "span a list": ([entry(span=["all"])], errors.BadSpan, ("prompt, generated",)),
    "bad op": ([entry(op="multiply")], errors.BadOp, ("'multiply'", "add, ablate, set, scale, clamp")),
    "op that needs a unit vector": ([entry(direction="long", op="set")], errors.BadOp, ("'long'", "unit")),
    "clamp with alpha": ([entry(op="clamp")], errors.BadAlpha, ("1.0", "low and high")),
    "bounds without clamp": ([entry(low=1.0)], errors.BadOp, ("'add'", "clamp")),
    "relative scale": ([entry(op="scale", relative=True)], errors.BadOp, ("'scale'", "relative")),
    "a condition that looks ahead": (
        [entry(layer=1, when={"direction": "calm", "above": 1, "layer": 2})],
        errors.BadCondition,
        ("layer 2", "layer 1"),
    ),
    "a condition over the prompt on prompt tokens": (
        [entry(span="all", when={"direction": "calm", "above": 1, "over": "prompt"})],
        errors.BadCondition,
        ("'all'", "generated"),
    ),
    "a condition over the prompt at the layer of its last token": (
        [entry(span="response", when={"direction": "calm", "above": 1, "over": "prompt"})],
        errors.BadCondition,
        ("'response'", "earlier hooked layer"),
    ),
    "a condition without a bound": ([entry(when={"direction": "calm"})], errors.BadCondition, ("above", "below")),
    "unknown field": ([entry(strength=3)], errors.UnknownField, ("'strength'", "alpha")),
    "direction missing": ([{"alpha": 1.0}], errors.MalformedSpec, ("'direction'",)),
    "direction not a string": ([entry(direction=7)], errors.MalformedSpec, ("7",)),
    "entry not an object": (["calm"], errors.MalformedSpec, ("JSON string", "object")),
    "too many entries": ([entry()] * (MAX_ENTRIES + 1), errors.TooManyEntries, ("4 entries", "3")),
}
REFUSED_READOUTS: dict[str, tuple[Any, type[errors.SteerError], tuple[str, ...]]] = {
    "layer not hooked": ({"layers": [1, 3]}, errors.LayerNotHooked, ("layer 3", "[1, 2]")),
    "no layers": ({"layers": []}, errors.BadReadout, ("empty",)),
    "layers missing": ({"span": "all"}, errors.MalformedSpec, ("'layers'",)),
    "layers a number": ({"layers": 1}, errors.MalformedSpec, ("1", "list")),
    "bad span": ({"layers": [1], "span": "both"}, errors.BadSpan, ("'both'", "prompt, generated")),
    "unknown projection": ({"layers": [1], "project": ["nobody"]}, errors.UnknownDirection, ("'nobody'", "calm")),
    "projection at no read layer": ({"layers": [2], "project": ["calm"]}, errors.BadReadout, ("'calm'", "[1]", "[2]")),
    "unknown field": ({"layers": [1], "pooling": "max"}, errors.UnknownField, ("'pooling'", "skip_first")),
    "bad pool": ({"layers": [1], "pool": "median"}, errors.BadReadout, ("'median'", "mean, last, max")),
    "negative skip_first": ({"layers": [1], "skip_first": -1}, errors.BadReadout, ("-1",)),
    "skip_first of the whole prompt": ({"layers": [1], "skip_first": 5}, errors.BadReadout, ("5",)),
    "skip_first with span generated": (
        {"layers": [1], "span": "generated", "skip_first": 1},
        errors.BadReadout,
        ("generated",),
    ),
    "nothing asked": ({"layers": [1], "vectors": False}, errors.BadReadout, ("project",)),
    "not an object": ([1], errors.MalformedSpec, ("JSON array", "object")),
}
REFUSED_WIRES: dict[str, tuple[Any, type[errors.SteerError], tuple[str, ...]]] = {
    "malformed JSON": ('{"steering": [', errors.MalformedSpec, ("not JSON", "allowed")),
    "empty string": ("", errors.MalformedSpec, ("not JSON",)),
    "JSON of another type": ("[]", errors.MalformedSpec, ("JSON array", "object")),
    "unknown top-level field": ({"steer": []}, errors.UnknownField, ("steer", "readout")),
    "another version": ({"v": 99, "steering": []}, errors.MalformedSpec, ("99", "1")),
    "steering an object": ({"steering": {"direction": "calm"}}, errors.MalformedSpec, ("JSON object", "list")),
    "nested too deep": ("[" * 100_000, errors.MalformedSpec, ("not JSON",)),
}
REFUSED = {
    **{f"steering: {name}": ({"steering": s}, kind, say) for name, (s, kind, say) in REFUSED_STEERING.items()},
    **{f"readout: {name}": ({"readout": r}, kind, say) for name, (r, kind, say) in REFUSED_READOUTS.items()},
    **{f"wire: {name}": case for name, case in REFUSED_WIRES.items()},
}


@pytest.mark.parametrize(("wire", "kind", "says"), REFUSED.values(), ids=REFUSED)
def test_a_bad_request_is_refused_by_name(
    llm: LLM, wire: Any, kind: type[errors.SteerError], says: tuple[str, ...]
) -> None:
    with pytest.raises(kind) as refusal:
        generate(llm, wired(wire))
    assert named_class(refusal.value) is kind
    message = str(refusal.value)
    for part in says:
        assert part in message
    assert "\n" not in message
    assert message.endswith(".")


def test_every_refusal_of_a_request_is_a_client_error() -> None:
    assert {kind.status for _, kind, _ in REFUSED.values()} <= {400, 404, 409, 413}


def test_one_bad_request_among_good_ones_is_refused_before_any_of_them_runs(llm: LLM, usual_answer: list[int]) -> None:
    bad = wired({"steering": [entry(direction="nobody")]})
    with pytest.raises(errors.UnknownDirection):
        llm.generate([PROMPT] * 3, [good(), good(), bad], use_tqdm=False)
    outs = llm.generate([PROMPT] * 2, good(), use_tqdm=False)
    assert [list(out.outputs[0].token_ids) for out in outs] == [usual_answer] * 2


def test_extra_args_cannot_smuggle_in_what_admission_writes(llm: LLM) -> None:
    smuggled = SamplingParams(temperature=0.0, max_tokens=3, extra_args={"vllm_steer_resolved": {"prompt": []}})
    with pytest.raises(errors.UnknownField, match="vllm_steer_resolved"):
        generate(llm, smuggled)


def test_a_cache_salt_cannot_pose_as_that_of_a_steered_request(llm: LLM) -> None:
    with pytest.raises(errors.MalformedSpec, match="cache_salt"):
        llm.generate([PROMPT | {"cache_salt": "vllm_steer:0"}], SamplingParams(max_tokens=1), use_tqdm=False)


@pytest.mark.parametrize("alpha", [MAX_ALPHA, -MAX_ALPHA, 0, np.float32(3.5)])
def test_an_alpha_on_the_bound_is_let_through(llm: LLM, alpha: float) -> None:
    params = steered(SamplingParams(temperature=0.0, max_tokens=2), [Steering("calm", alpha=alpha)])
    assert len(generate(llm, params)) == 2


def test_as_many_entries_as_there_is_room_for_are_let_through(llm: LLM) -> None:
    at_each = [Steering("calm", layer=layer, alpha=1.0) for layer in (LAYER, OTHER_HOOKED_LAYER)]
    params = steered(SamplingParams(temperature=0.0, max_tokens=2), at_each * MAX_ENTRIES)
    assert len(generate(llm, params)) == 2


def test_a_vector_of_another_length_is_refused_at_registration(llm: LLM) -> None:
    with pytest.raises(errors.WrongDimension, match=rf"{HIDDEN_SIZE + 1} elements; allowed: {HIDDEN_SIZE}"):
        register_directions(llm, [Direction("wide", LAYER, np.ones(HIDDEN_SIZE + 1))])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_vector_that_is_not_finite_is_refused(value: float) -> None:
    vector = VECTOR.copy()
    vector[5] = value
    with pytest.raises(errors.BadVector, match="1 values that are NaN or infinite"):
        Direction("broken", LAYER, vector)


def test_a_full_bank_refuses_all_of_a_registration_and_keeps_what_it_has(llm: LLM) -> None:
    with pytest.raises(errors.BankFull, match=rf"0 of {MAX_DIRECTIONS} slots"):
        register_directions(llm, [Direction("extra", LAYER, VECTOR)])
    with pytest.raises(errors.UnknownDirection):
        generate(llm, wired({"steering": [entry(direction="extra")]}))


def test_a_direction_registered_for_a_layer_that_cannot_be_hooked_is_refused_when_used(llm: LLM) -> None:
    with pytest.raises(errors.LayerNotHooked, match=re.escape("[1, 2]")):
        generate(llm, steered(SamplingParams(max_tokens=1), [Steering("calm", layer=0, alpha=1.0)]))


def test_a_readout_of_an_unhooked_layer_is_refused(llm: LLM) -> None:
    with pytest.raises(errors.LayerNotHooked):
        generate(llm, steered(SamplingParams(max_tokens=1), readout=Readout(layers=[0])))


class TestAtStart:
    """Refusals of an engine's start, before weights are loaded. The running engine of this module is not disturbed."""

    @pytest.mark.parametrize(
        ("architecture", "ranks", "reason"),
        [
            ("DeepseekV4ForCausalLM", 1, "several residual streams"),
            ("Gemma3nForConditionalGeneration", 1, "several residual streams"),
            ("InklingForCausalLM", 1, "no layer returns the complete stream"),
            ("IQuestLoopCoderForCausalLM", 1, "run more than once"),
            ("WhisperForConditionalGeneration", 1, "does not generate text"),
            ("DeepseekV32ForCausalLM", 2, "leave the sum over the ranks to the next layer"),
        ],
    )
    def test_an_architecture_that_cannot_be_exact_is_refused_with_the_reason(
        self, architecture: str, ranks: int, reason: str
    ) -> None:
        with pytest.raises(errors.UnsupportedModel, match=rf"{architecture}.*: .*{re.escape(reason)}"):
            refuse_architecture(architecture, ranks)

    def test_partial_sums_are_only_a_matter_of_tensor_parallelism(self) -> None:
        refuse_architecture("DeepseekV32ForCausalLM", 1)

    def test_a_layer_that_the_model_lacks_is_refused(self, tiny_model: Callable[[str], Path]) -> None:
        with pytest.raises(errors.LayerNotHooked, match=r"layer 4; .* has layers 0 to 3"):
            LLM(str(tiny_model("llama")), additional_config=steer_config(layers=[LAYER, 4]))

    @pytest.mark.parametrize(
        "settings",
        [
            {"layers": []},
            {"layers": [-1]},
            {"layers": [1], "max_entries": 0},
            {"layers": [1], "colour": "blue"},
        ],
        ids=str,
    )
    def test_settings_that_make_no_sense_are_refused(self, settings: dict[str, Any]) -> None:
        with pytest.raises(errors.SettingsError):
            steer_config(**settings)
