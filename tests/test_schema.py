"""The wire format loses nothing, and each fault in it is refused with a class and a message of its own."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_steer.errors import (
    BadAlpha,
    BadCondition,
    BadOp,
    BadReadout,
    BadSpan,
    MalformedSpec,
    SteerError,
    UnknownField,
)
from vllm_steer.schema.conditions import Watch, When
from vllm_steer.schema.readout import Readout
from vllm_steer.schema.request_spec import RequestSpec
from vllm_steer.schema.steering import OPS, Steering

ENTRY = {"direction": "kind", "alpha": 1.0}

SPANS = ("prompt", "generated", "response", "all", "prompt[-5:]", "generated[64:]+prompt[0]")

numbers = st.floats(allow_nan=False, allow_infinity=False)
names = st.text(min_size=1)
layers = st.integers(min_value=0, max_value=1 << 40)


@st.composite
def steerings(draw: st.DrawFn) -> Steering:
    op = draw(st.sampled_from(OPS))
    alpha = draw(numbers | st.integers(-1000, 1000))
    fields: dict[str, Any] = {"alpha": alpha}
    if op == "ablate":
        fields = {"alpha": draw(st.none() | st.just(1) | st.floats(0, 2, exclude_min=True))}
    if op == "clamp":
        fields = draw(st.sampled_from([{"low": alpha}, {"high": alpha}, {"low": -abs(alpha), "high": abs(alpha)}]))
    if op in ("add", "set", "clamp"):
        fields["relative"] = draw(st.booleans())
    fields["keep_norm"] = draw(st.booleans())
    if draw(st.booleans()):
        bound = draw(st.sampled_from([{"above": 0.5}, {"below": -3}, {"above": 0, "layer": 4}]))
        fields["when"] = When(draw(names), **bound, over=draw(st.sampled_from(["token", "prompt"])))
    layer, span = draw(st.none() | layers), draw(st.sampled_from(SPANS))
    if "when" in fields and fields["when"].over == "prompt":
        span = draw(st.sampled_from(["generated", "response", "generated[2:5]"]))
    return Steering(draw(names), layer=layer, op=op, span=span, **fields)


@st.composite
def readouts(draw: st.DrawFn) -> Readout:
    span, project = draw(st.sampled_from(SPANS)), draw(st.lists(names))
    trace = draw(st.lists(names, unique=True))
    return Readout(
        layers=draw(st.lists(layers, min_size=1)),
        span=span,
        project=project,
        vectors=draw(st.booleans()) if project or trace else True,
        skip_first=0 if span not in ("prompt", "all") else draw(st.integers(0, 10)),
        trace=trace,
        pool=draw(st.sampled_from(["mean", "last", "max"] if project or trace else ["mean", "last", "rows"])),
    )


@given(st.builds(RequestSpec, st.lists(steerings()).map(tuple), st.none() | readouts()))
def test_the_wire_loses_nothing(spec: RequestSpec) -> None:
    assert RequestSpec.loads(spec.dumps()) == spec
    wire: dict[str, Any] = {"v": spec.version}
    if spec.steering is not None:
        wire["steering"] = [one.to_json() for one in spec.steering]
    if spec.readout is not None:
        wire["readout"] = spec.readout.to_json()
    assert spec.dumps() == json.dumps(wire, separators=(",", ":"))


def test_a_spec_says_the_oldest_version_that_has_what_it_uses() -> None:
    old = RequestSpec((Steering("kind", 1.0, span="generated"),), Readout([1], span="all", skip_first=2))
    assert json.loads(old.dumps())["v"] == 1
    for new in (
        RequestSpec((Steering("kind", 1.0, span="response"),)),
        RequestSpec(None, Readout([1], "prompt[1:]")),
        RequestSpec(None, Readout([1], pool="last")),
        RequestSpec(None, Readout([1], pool="rows")),
    ):
        assert json.loads(new.dumps())["v"] == 2
        assert RequestSpec.from_json({**json.loads(new.dumps()), "v": 2}) == new


@pytest.mark.parametrize(
    ("fields", "version"),
    [
        ({"alpha": 1.0}, 1),
        ({"alpha": 1.0, "relative": False, "keep_norm": False}, 1),
        ({"alpha": 3.0, "op": "set"}, 1),
        ({"op": "ablate"}, 1),
        ({"op": "ablate", "alpha": 0.5}, 2),
        ({"alpha": 1.0, "relative": True}, 2),
        ({"alpha": 1.0, "keep_norm": True}, 2),
        ({"op": "scale", "alpha": 1.0}, 2),
        ({"op": "clamp", "low": 0.0}, 2),
        ({"alpha": 1.0, "span": "response"}, 2),
        ({"alpha": 1.0, "when": When("kind", above=1.0)}, 2),
    ],
)
def test_an_entry_in_version_1_has_the_fields_of_version_1(fields: dict[str, Any], version: int) -> None:
    entry = Steering("kind", **fields)
    assert entry.version == version
    of_v1 = {"direction", "alpha", "layer", "op", "span"}
    assert (set(entry.to_json()) == of_v1) or version == 2
    assert Steering.from_json(entry.to_json()) == entry


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(["direction", "layers"]), inner),
    max_leaves=12,
)
# Objects with the wire's own keys; with others, fuzzing would stop at the first unknown field.
entries = st.fixed_dictionaries(
    {"direction": st.just("kind") | json_values},
    optional=dict.fromkeys(
        ("alpha", "layer", "op", "span", "relative", "keep_norm", "low", "high", "when"), json_values
    ),
)
readings = st.fixed_dictionaries(
    {"layers": st.just([3]) | json_values},
    optional=dict.fromkeys(("span", "project", "vectors", "skip_first", "trace", "pool"), json_values),
)
wires = st.fixed_dictionaries(
    {}, optional={"v": st.just(1) | json_values, "steering": st.lists(entries) | json_values, "readout": readings}
)


@given((wires | json_values).map(json.dumps) | st.text())
@example("1" * 5000)
@example('{"steering": [{"direction": "kind", "alpha": 1' + "0" * 400 + "}]}")
@example("[" * 100_000)
@example('{"steering": [{"direction": "kind", "alpha": NaN}]}')
@example('"\\ud800"')
def test_whatever_comes_over_the_wire_is_read_or_refused(text: str) -> None:
    try:
        spec = RequestSpec.loads(text)
    except SteerError:
        return
    assert RequestSpec.loads(spec.dumps()) == spec


REFUSED_WIRES: list[tuple[object, type[SteerError], str]] = [
    (None, MalformedSpec, "NoneType"),
    ({"v": 1}, MalformedSpec, "dict"),
    ("{", MalformedSpec, "not JSON"),
    ("[]", MalformedSpec, "JSON array"),
    ('{"v": 3}', MalformedSpec, "3"),
    ('{"v": true}', MalformedSpec, "version true"),
    ('{"v": 1, "steering": [{"direction": "kind", "alpha": 1, "span": "response"}]}', MalformedSpec, "version 2"),
    ('{"v": 1, "readout": {"layers": [1], "span": "all[2:]"}}', MalformedSpec, "version 2"),
    ('{"v": 1, "steering": [{"direction": "kind", "alpha": 1, "op": "scale"}]}', MalformedSpec, "version 2"),
    ('{"sterring": []}', UnknownField, "sterring"),
    ('{"steering": {}}', MalformedSpec, "JSON object"),
    ('{"steering": [3]}', MalformedSpec, "JSON number"),
    ('{"steering": [{"alpha": 1}]}', MalformedSpec, "direction"),
    ('{"steering": [{"direction": "kind", "alhpa": 1}]}', UnknownField, "alhpa"),
    ('{"readout": []}', MalformedSpec, "JSON array"),
    ('{"readout": {}}', MalformedSpec, "layers"),
    ('{"readout": {"layers": [1], "skip": 1}}', UnknownField, "skip"),
]


@pytest.mark.parametrize(("wire", "refusal", "named"), REFUSED_WIRES)
def test_a_malformed_wire_is_refused_by_name(wire: object, refusal: type[SteerError], named: str) -> None:
    with pytest.raises(SteerError) as caught:
        RequestSpec.loads(wire)
    assert type(caught.value) is refusal
    assert named in str(caught.value)
    assert "allowed" in str(caught.value)


REFUSED_STEERINGS: list[tuple[dict[str, Any], type[SteerError], str]] = [
    ({"direction": ""}, MalformedSpec, "''"),
    ({"direction": 3}, MalformedSpec, "3"),
    ({"layer": -1}, MalformedSpec, "-1"),
    ({"layer": True}, MalformedSpec, "layer is true"),
    ({"layer": 1.5}, MalformedSpec, "1.5"),
    ({"alpha": None}, BadAlpha, "without alpha"),
    ({"alpha": None, "op": "set"}, BadAlpha, "without alpha"),
    ({"alpha": float("nan")}, BadAlpha, "nan"),
    ({"alpha": float("-inf")}, BadAlpha, "-inf"),
    ({"alpha": 10**400}, BadAlpha, "inf"),
    ({"alpha": "5"}, BadAlpha, "'5'"),
    ({"alpha": True}, BadAlpha, "alpha is true"),
    ({"alpha": 0.0, "op": "ablate"}, BadAlpha, "0.0"),
    ({"alpha": 2.5, "op": "ablate"}, BadAlpha, "2.5"),
    ({"alpha": None, "op": "scale"}, BadAlpha, "without alpha"),
    ({"when": {"direction": "kind", "above": 1}}, MalformedSpec, "Give When"),
    ({"op": "scale", "relative": True}, BadOp, "'scale' came with relative"),
    ({"op": "ablate", "relative": True}, BadOp, "'ablate' came with relative"),
    ({"relative": 1}, MalformedSpec, "relative is 1"),
    ({"keep_norm": "yes"}, MalformedSpec, "keep_norm is 'yes'"),
    ({"low": 1.0}, BadOp, "'add' came with low or high"),
    ({"op": "clamp", "low": 1.0}, BadAlpha, "'clamp' came with alpha 1.0"),
    ({"op": "clamp", "alpha": None}, BadAlpha, "without bounds"),
    ({"op": "clamp", "alpha": None, "low": 2.0, "high": 1.0}, BadAlpha, "low is 2 and high is 1"),
    ({"op": "clamp", "alpha": None, "high": float("inf")}, BadAlpha, "high is inf"),
    ({"op": "clamp", "alpha": None, "low": "1"}, BadAlpha, "low is '1'"),
    ({"op": "multiply"}, BadOp, "multiply"),
    ({"op": ["add"]}, BadOp, "add"),
    ({"span": "decode"}, BadSpan, "decode"),
    ({"span": None}, BadSpan, "span is null"),
]


@pytest.mark.parametrize(("fields", "refusal", "named"), REFUSED_STEERINGS)
def test_a_wrong_entry_is_refused_with_its_own_class(
    fields: dict[str, Any], refusal: type[SteerError], named: str
) -> None:
    with pytest.raises(SteerError) as caught:
        Steering(**{**ENTRY, **fields})
    assert type(caught.value) is refusal
    assert named in str(caught.value)
    assert isinstance(caught.value, ValueError)  # what vLLM's front ends turn into a client error


REFUSED_CONDITIONS: list[tuple[dict[str, Any], type[SteerError], str]] = [
    ({"above": 1.0, "direction": ""}, MalformedSpec, "''"),
    ({}, BadCondition, "both or none"),
    ({"above": 1.0, "below": 2.0}, BadCondition, "both or none"),
    ({"above": "1"}, BadCondition, "above of when is '1'"),
    ({"below": float("nan")}, BadCondition, "below of when is nan"),
    ({"above": 1e39}, BadCondition, "1e+39"),
    ({"above": 1.0, "layer": -1}, MalformedSpec, "-1"),
    ({"above": 1.0, "over": "answer"}, BadCondition, "'answer'; allowed: token, prompt"),
    ({"above": 1.0, "over": None}, BadCondition, "over is null; allowed: token, prompt"),
]


@pytest.mark.parametrize(("fields", "refusal", "named"), REFUSED_CONDITIONS)
def test_a_wrong_condition_is_refused_with_its_own_class(
    fields: dict[str, Any], refusal: type[SteerError], named: str
) -> None:
    with pytest.raises(refusal) as caught:
        When(**{"direction": "harm", **fields})
    assert type(caught.value) is refusal
    assert named in str(caught.value)
    with pytest.raises(SteerError):
        Steering.from_json({**ENTRY, "when": {"direction": "harm", **fields}})


@pytest.mark.parametrize("span", ["generated", "generated[3:9]", "response", "prompt[-1]", "prompt[-1:] + generated"])
def test_a_condition_over_the_prompt_takes_spans_behind_it_and_says_so_on_the_wire(span: str) -> None:
    entry = Steering("kind", 1.0, span=span, when=When("harm", above=1, over="prompt"))
    assert entry.to_json()["when"] == {"direction": "harm", "above": 1.0, "over": "prompt"}
    assert Steering.from_json(entry.to_json()) == entry
    assert entry.version == 2
    assert "over" not in When("harm", above=1).to_json()


@pytest.mark.parametrize(
    "span",
    ["all", "prompt", "prompt[-2:]", "prompt[:-1]", "prompt[-5:3]", "all[40:]", "prompt[3]", "generated+prompt[0]"],
)
def test_a_condition_over_the_prompt_is_refused_on_tokens_that_come_before_it_is_known(span: str) -> None:
    with pytest.raises(BadCondition, match="allowed: generated, its slices") as caught:
        Steering("kind", 1.0, span=span, when=When("harm", above=1, over="prompt"))
    assert repr(span) in str(caught.value)
    Steering("kind", 1.0, span=span, when=When("harm", above=1))


def test_a_readout_tells_of_conditions_when_it_is_asked_to() -> None:
    asked = Readout([1], held=True)
    assert asked.version == 2
    assert asked.to_json()["held"] is True
    assert Readout.from_json(asked.to_json()) == asked
    assert "held" not in Readout([1]).to_json()
    assert Readout([1], vectors=False, held=True).held
    watching = Readout(stop=Watch("kind", above=1.0), held=True)
    assert (watching.version, watching.names, watching.vectors) == (2, ("kind",), False)
    assert Readout.from_json(watching.to_json()) == watching
    assert Readout([1], pool="rows", held=True).held
    with pytest.raises(MalformedSpec, match="readout held is 1; allowed: true or false"):
        Readout([1], held=1)  # type: ignore[arg-type]


REFUSED_READOUTS: list[tuple[dict[str, Any], type[SteerError], str]] = [
    ({"layers": []}, BadReadout, "empty"),
    ({"layers": "12"}, MalformedSpec, "'12'"),
    ({"layers": 12}, MalformedSpec, "12"),
    ({"layers": [True]}, MalformedSpec, "true"),
    ({"layers": [-1]}, MalformedSpec, "-1"),
    ({"span": "decode"}, BadSpan, "decode"),
    ({"project": "kind"}, MalformedSpec, "'kind'"),
    ({"project": [""]}, MalformedSpec, "''"),
    ({"vectors": 1}, MalformedSpec, "1"),
    ({"pool": "median"}, BadReadout, "'median'"),
    ({"pool": None}, BadReadout, "pool is null"),
    ({"pool": "max"}, BadReadout, "'max' came without project and trace"),
    ({"pool": "rows", "project": ["kind"]}, BadReadout, "'rows' came with project"),
    ({"pool": "rows", "vectors": False, "trace": ["kind"]}, BadReadout, "'rows' came with vectors false"),
    ({"vectors": False}, BadReadout, "project is empty and trace is empty"),
    ({"trace": "kind"}, MalformedSpec, "readout trace is 'kind'"),
    ({"trace": None}, MalformedSpec, "readout trace is null"),
    ({"trace": ["kind", ""]}, MalformedSpec, "''"),
    ({"trace": [["kind"]]}, MalformedSpec, "['kind']"),
    ({"trace": ["kind", "cold", "kind"]}, BadReadout, "each name once"),
    ({"skip_first": -1}, BadReadout, "-1"),
    ({"skip_first": True}, BadReadout, "skip_first is true"),
    ({"skip_first": 1, "span": "generated"}, BadReadout, "generated"),
    ({"skip_first": 1, "span": "response"}, BadReadout, "response"),
    ({"span": "generated[3:3]"}, BadSpan, "generated[3:3]"),
]


@pytest.mark.parametrize(("fields", "refusal", "named"), REFUSED_READOUTS)
def test_a_wrong_readout_is_refused_with_its_own_class(
    fields: dict[str, Any], refusal: type[SteerError], named: str
) -> None:
    with pytest.raises(SteerError) as caught:
        Readout(**{"layers": [3], **fields})
    assert type(caught.value) is refusal
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("steering", "formula"),
    [
        (Steering("d", 2.5), lambda p: 2.5),
        (Steering("d", op="ablate"), lambda p: -p),
        (Steering("d", 2.5, op="set"), lambda p: 2.5 - p),
    ],
    ids=["add", "ablate", "set"],
)
def test_coefficients_express_each_op_in_the_shared_form(steering: Steering, formula: Any) -> None:
    a, b = steering.coefficients
    for projection in (-3.0, 0.0, 0.75):
        assert a + b * projection == formula(projection)


def test_numpy_numbers_are_alphas_and_become_plain_floats() -> None:
    assert type(Steering("d", np.float32(0.5)).alpha) is float
    assert RequestSpec.loads(RequestSpec((Steering("d", np.int64(2)),)).dumps()).steering[0].alpha == 2.0


def test_readout_keeps_each_layer_once_in_order_and_each_name_once_as_given() -> None:
    readout = Readout([12, 8, 12], project=["b", "a", "b"])
    assert (readout.layers, readout.project) == ((8, 12), ("b", "a"))


def test_left_out_fields_take_their_defaults() -> None:
    spec = RequestSpec.loads('{"steering": [{"direction": "kind", "alpha": 1}], "readout": {"layers": [3]}}')
    assert spec == RequestSpec((Steering("kind", 1.0, None, "add", "all"),), Readout([3], "prompt", (), True, 0, ()))
    assert RequestSpec.loads("{}") == RequestSpec()


def test_watches_make_version_2_and_come_back_as_they_were() -> None:
    readout = Readout(stop=Watch("harm", above=3, patience=2), flag=[Watch("calm", below=-1.5, layer=4)])
    told = json.loads(RequestSpec((), readout).dumps())
    assert told["v"] == 2
    assert told["readout"]["stop"] == {"direction": "harm", "above": 3.0, "patience": 2}
    assert told["readout"]["flag"] == [{"direction": "calm", "below": -1.5, "layer": 4}]
    assert RequestSpec.loads(json.dumps(told)).readout == readout
    assert readout.vectors is False, "nothing is pooled without layers"
    assert RequestSpec((), readout).names == ("harm", "calm")
    with pytest.raises(MalformedSpec, match="version 1"):
        RequestSpec.loads(json.dumps(told | {"v": 1}))
    assert readout.is_stopped_by("vllm_steer:harm")
    assert not readout.is_stopped_by("vllm_steer:calm")
    assert not Readout([1]).is_stopped_by("vllm_steer:harm")


@pytest.mark.parametrize(
    ("fields", "refusal", "message"),
    [
        ({"direction": "harm"}, BadCondition, "both or none"),
        ({"direction": "harm", "above": 1, "below": 2}, BadCondition, "both or none"),
        ({"direction": "harm", "above": 1e39}, BadCondition, "float32"),
        ({"direction": "harm", "above": 1, "patience": 0}, BadCondition, "patience is 0"),
        ({"direction": "harm", "above": 1, "patience": True}, BadCondition, "patience is true"),
        ({"direction": "harm", "above": 1, "layer": -1}, MalformedSpec, "layer"),
        ({"direction": "", "above": 1}, MalformedSpec, "direction"),
        ({"direction": "harm", "above": 1, "over": "token"}, UnknownField, "over"),
    ],
)
def test_a_watch_that_makes_no_sense_is_refused(
    fields: dict[str, Any], refusal: type[SteerError], message: str
) -> None:
    with pytest.raises(refusal, match=message):
        Readout.from_json({"stop": fields})
    with pytest.raises(refusal, match=message):
        Readout.from_json({"flag": [fields]})


def test_a_watch_is_what_stop_and_flag_take() -> None:
    watch = Watch("harm", above=1.0)
    for wrong in ({"stop": "harm"}, {"flag": watch}, {"flag": ["harm"]}):
        with pytest.raises(MalformedSpec, match="stop or flag"):
            Readout([1], **wrong)  # type: ignore[arg-type]
    with pytest.raises(MalformedSpec, match="flag is a JSON object"):
        Readout.from_json({"layers": [1], "flag": {"direction": "harm", "above": 1}})
    with pytest.raises(BadReadout, match="layers is empty and project"):
        Readout(stop=watch, project=["harm"])
    with pytest.raises(BadReadout, match="layers is empty;"):
        Readout()
