"""Request bodies on their way to vLLM: fields, the wire, aliases, defaults, guard rails."""

from __future__ import annotations

import json
from hashlib import sha256
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.server.stub_openai_app import BASE_MODEL, StubChecker, model_names
from vllm_steer.errors import (
    DirectionNotAllowed,
    LayerNotHooked,
    MalformedSpec,
    MisplacedField,
    NotOnThisRoute,
    SteerError,
    TooManyEntries,
    UnknownField,
)
from vllm_steer.schema.request_spec import RequestSpec
from vllm_steer.schema.steering import Steering
from vllm_steer.server.inbound.bodies import Translated, translate
from vllm_steer.server.inbound.header import steering_header
from vllm_steer.server.inbound.model_names import ModelNames
from vllm_steer.server.inbound.steered_routes import (
    CHAT,
    CHAT_BATCH,
    COMPLETIONS,
    LORA_NAMES,
    NAMING,
    RESPONSES,
    STEERED,
    TOKENS,
)
from vllm_steer.server.outbound.refusals import error_body

KIND, CALM = {"direction": "kind", "alpha": 2.0}, {"direction": "calm", "alpha": 1.0, "layer": 1}
ALIASES = {"served_aliases": {"base-kind": [KIND]}}


def _translate(
    fields: object, checker: StubChecker | None = None, path: str = CHAT, key: str | None = None, header: Any = None
) -> Translated:
    checker = checker or StubChecker()
    return translate(path, json.dumps(fields).encode(), key, checker, model_names(checker), header=header)


def _steering(translated: Translated, checker: StubChecker | None = None) -> tuple[Steering, ...]:
    """The entries that act on the exchange, the server's default included."""
    default = () if checker is None else checker.settings.default_steering
    return (translated.spec or RequestSpec()).with_default(default).entries


def _rest(translated: Translated) -> dict[str, Any]:
    """The body that vLLM gets, which must hold none of the plugin's fields."""
    assert translated.body is not None
    rest: dict[str, Any] = json.loads(translated.body)
    assert not {"steering", "readout"} & set(rest)
    return rest


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{not json",
        b"[1, 2]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"model": "base", "messages": [], "steering": null}',
        b'{"model": ["base-kind"], "vllm_xargs": {"top": 1}}',
    ],
)
def test_a_body_that_asks_nothing_of_the_plugin_stays_as_it_is(body: bytes) -> None:
    translated = translate(CHAT, body, None, StubChecker(**ALIASES), model_names(StubChecker(**ALIASES)))
    assert (translated.body, translated.spec) == (None, None)


def test_fields_are_taken_out_and_everything_else_stays() -> None:
    rest = {"model": "base", "messages": [{"role": "user", "content": "Grüße 😀"}], "vllm_xargs": {"own": 3}}
    translated = _translate({**rest, "n": 3, "steering": [KIND], "readout": {"layers": [2]}})
    assert _rest(translated) == {**rest, "n": 3}
    assert translated.spec is not None
    assert translated.spec.readout is not None
    assert [entry.alpha for entry in translated.spec.entries] == [2.0]
    assert translated.spec.readout.layers == (2,)
    assert translated.choices_per_prompt == 3


def test_the_wire_in_vllm_xargs_says_the_same_as_the_fields() -> None:
    wire = {"v": 1, "steering": [KIND], "readout": {"project": ["kind"]}}
    by_wire = _translate({"vllm_xargs": {"vllm_steer": json.dumps(wire)}})
    assert by_wire.spec == _translate({"steering": [KIND], "readout": {"project": ["kind"]}}).spec


@pytest.mark.parametrize(
    ("readout", "vectors", "layers"),
    [
        ({"layers": [1]}, True, (1,)),
        ({"layers": [1], "project": ["calm"]}, False, (1,)),
        ({"layers": [1], "project": ["calm"], "vectors": True}, True, (1,)),
        ({"layers": [1], "trace": ["calm"], "pool": "rows"}, True, (1,)),
        ({"trace": ["kind"]}, False, (2,)),
        ({"trace": ["kind"], "project": ["calm"]}, False, (1, 2)),  # layer 9 of "calm" is not hooked
    ],
)
def test_a_readout_over_http_moves_vectors_only_when_asked_and_finds_its_layers(
    readout: dict[str, Any], vectors: bool, layers: tuple[int, ...]
) -> None:
    spec = _translate({"readout": readout}).spec
    assert spec is not None
    assert spec.readout is not None
    assert (spec.readout.vectors, spec.readout.layers) == (vectors, layers)


def test_layers_are_never_guessed_to_be_others_than_the_directions_own() -> None:
    with pytest.raises(LayerNotHooked):
        _translate({"readout": {"trace": ["far"]}})


def test_an_alias_steers_before_what_the_request_adds() -> None:
    translated = _translate({"model": "base-kind", "steering": [CALM]}, StubChecker(**ALIASES))
    assert [entry.direction for entry in _steering(translated)] == ["kind", "calm"]
    assert _rest(translated)["model"] == BASE_MODEL


def test_an_alias_cannot_be_unsteered() -> None:
    translated = _translate({"model": "base-kind", "steering": []}, StubChecker(**ALIASES))
    assert [entry.direction for entry in _steering(translated)] == ["kind"]


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({}, ["kind"]),
        ({"readout": {"layers": [1]}}, ["kind"]),
        ({"vllm_xargs": {"vllm_steer": '{"readout": {"layers": [1]}}'}}, ["kind"]),
        ({"steering": [CALM]}, ["calm"]),
    ],
)
def test_default_steering_is_for_requests_that_say_nothing_of_steering(
    fields: dict[str, Any], names: list[str]
) -> None:
    checker = StubChecker(default_steering=[KIND])
    assert [entry.direction for entry in _steering(_translate(fields, checker), checker)] == names


@pytest.mark.parametrize("fields", [{"steering": []}, {"vllm_xargs": {"vllm_steer": '{"steering": []}'}}])
def test_an_empty_list_is_unsteered_in_spite_of_a_default(fields: dict[str, Any]) -> None:
    checker = StubChecker(default_steering=[KIND])
    translated = _translate(fields, checker)
    assert translated.spec == RequestSpec(())
    assert _steering(translated, checker) == ()
    assert not _rest(translated).get("vllm_xargs")


@pytest.mark.parametrize(
    ("fields", "path", "error"),
    [
        ({"steering": [KIND], "vllm_xargs": {"vllm_steer": "{}"}}, CHAT, MalformedSpec),
        ({"steering": KIND}, CHAT, MalformedSpec),
        ({"steering": [{**KIND, "strength": 1}]}, CHAT, UnknownField),
        ({"vllm_xargs": {"vllm_steer": "null"}}, CHAT, MalformedSpec),
        ({"vllm_xargs": {"vllm_steer": "{"}}, CHAT, MalformedSpec),
        ({"vllm_xargs": {"vllm_steer": {"steering": [KIND]}}}, CHAT, MalformedSpec),
        ({"vllm_xargs": {"vllm_steering": "[]"}}, CHAT, MisplacedField),
        ({"steering": [KIND], "use_beam_search": True}, COMPLETIONS, MalformedSpec),
        ({"readout": {"layers": [1]}, "background": True}, RESPONSES, MalformedSpec),
        ({"model": "base-kind", "background": True}, RESPONSES, MalformedSpec),
    ],
)
def test_what_would_be_ignored_or_is_ambiguous_is_refused(
    fields: dict[str, Any], path: str, error: type[SteerError]
) -> None:
    with pytest.raises(error):
        _translate(fields, StubChecker(**ALIASES), path)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(["kind", "calm"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["direction", "alpha", "layer", "op", "span", "layers", "project", "trace", "vllm_steer"])
            | st.text(max_size=3),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(
    st.dictionaries(st.sampled_from(["steering", "readout", "vllm_xargs", "model", "n", "background"]), _JSON),
    st.sampled_from([CHAT, COMPLETIONS, RESPONSES]),
    st.booleans(),
)
def test_whatever_the_fields_hold_is_translated_or_refused_and_never_crashes(
    fields: dict[str, Any], path: str, has_default: bool
) -> None:
    checker = StubChecker(**ALIASES, default_steering=[KIND] if has_default else [])
    try:
        translated = _translate(fields, checker, path, "key")
    except SteerError:
        return
    if translated.body is not None:
        assert "vllm_steer" not in json.dumps(list(_rest(translated).get("vllm_xargs") or ()))


def _caller(key: str) -> str:
    return "key:" + sha256(key.encode()).hexdigest()[:12]


@pytest.mark.parametrize(
    ("fields", "key", "is_allowed"),
    [
        ({"steering": [CALM]}, "free", True),
        ({"steering": [CALM]}, None, True),
        ({"steering": [KIND]}, "tied", True),
        ({"steering": [CALM]}, "tied", False),
        ({"steering": [{**KIND, "when": {"direction": "kind", "above": 0}}]}, "tied", True),
        ({"steering": [{**KIND, "when": {"direction": "calm", "above": 0}}]}, "tied", False),
        ({"readout": {"layers": [1], "project": ["calm"]}}, "tied", False),
        ({"readout": {"trace": ["calm"]}}, "tied", False),
        ({"readout": {"stop": {"direction": "calm", "above": 0}}}, "tied", False),
        ({"readout": {"flag": [{"direction": "calm", "above": 0}]}}, "tied", False),
        ({"readout": {"stop": {"direction": "kind", "above": 0}}}, "tied", True),
        ({"model": "base-kind"}, "barred", True),  # the alias's own entries are the operator's
        ({"model": "base-kind", "steering": [KIND]}, "barred", False),
        ({"model": "base-kind", "steering": [CALM]}, "free", True),
        ({"model": "base-kind", "steering": [KIND]}, "free", False),
        ({"model": "base-kind", "steering": [CALM]}, "tied", False),  # open to the alias, not to the key
    ],
)
def test_a_caller_names_only_directions_that_are_open_to_its_key_and_its_alias(
    fields: dict[str, Any], key: str | None, is_allowed: bool
) -> None:
    allowed = {_caller("tied"): ["kind"], _caller("barred"): [], "base-kind": ["calm"]}
    checker = StubChecker(**ALIASES, allowed_directions=allowed)
    if is_allowed:
        assert _translate(fields, checker, key=key).spec is not None
    else:
        with pytest.raises(DirectionNotAllowed):
            _translate(fields, checker, key=key)


MISPLACED: list[dict[str, Any]] = [
    {"steer": [KIND]},
    {"Steering": [KIND]},
    {"steering_vectors": []},
    {"vllm_steer": "{}"},
    {"readouts": {}},
    {"read_out": {}},
    {"extra_body": {"steering": [KIND]}},
    {"extra_body": {"readout": {"layers": [1]}}},
    {"extra_args": {"vllm_steer": "{}"}},
    {"sampling_params": {"steering": [KIND]}},
    {"metadata": {"steering": [KIND]}},
    {"chat_template_kwargs": {"steering": [KIND]}},
    {"vllm_xargs": {"steering": "[]"}},
    {"vllm_xargs": {"vllm_steer_resolved": 1}},
    {"messages": [[{"role": "user", "content": "y", "steering": [KIND]}]]},
    {"input": [{"role": "user", "content": [{"type": "input_text", "text": "x", "steering": [KIND]}]}]},
    {"tools": [{"type": "function", "steering": [KIND], "function": {"name": "f"}}]},
    {"extra_body": {"extra_body": {"readout": {"span": "all"}}}},
    {"extra_body": {"vllm_xargs": {"vllm_steer": {"steering": [KIND]}}}},
    {"foo": [[{"steering": [KIND]}]]},
    {'{"steering": [{"direction": "kind"': ' "alpha": 5}]}'},  # JSON that a client has split at its comma
    {'{"readout": {"span": "all"': ' "vectors": true}}'},
    {"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y", "steering": [KIND]}]},
]


@pytest.mark.parametrize("fields", MISPLACED, ids=str)
@pytest.mark.parametrize("path", STEERED)
def test_steering_in_the_wrong_place_is_refused_with_the_right_one(path: str, fields: dict[str, Any]) -> None:
    with pytest.raises(MisplacedField, match="allowed: 'steering' and 'readout' at the top of the body"):
        _translate(fields, path=path)


SCHEMA = {"type": "object", "properties": {"steering": {"type": "array"}, "readout": {"type": "object"}}}


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function", "function": {"name": "drive", "parameters": SCHEMA}}]},
        {"tools": [{"name": "drive", "input_schema": SCHEMA}]},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "car", "schema": SCHEMA}}},
        {"messages": [{"content": [{"type": "tool_use", "name": "drive", "input": {"steering": ["left"]}}]}]},
        {"metadata": {"steering": "wheel"}},
    ],
    ids=str,
)
def test_names_of_a_users_own_may_be_ours(fields: dict[str, Any]) -> None:
    assert _translate(fields, path=CHAT).spec is None


@pytest.mark.parametrize(
    "body",
    [
        '{"steering": [{"direction": "kind", "alpha": 1}], "steering": []}',
        '{"steering": [{"direction": "kind", "alpha": 1}], "steering": null}',
        '{"steering": [{"direction": "kind", "alpha": 1, "alpha": 0}]}',
        '{"model": "base-kind", "model": "base"}',
        '{"vllm_xargs": {"vllm_steer": "{\\"steering\\": [], \\"steering\\": []}"}}',
    ],
)
def test_a_name_that_stands_twice_is_refused(body: str) -> None:
    with pytest.raises(MalformedSpec, match="twice"):
        translate(CHAT, body.encode(), None, StubChecker(), model_names(StubChecker()))


def test_a_batch_of_chats_does_not_stream_what_it_steers() -> None:
    with pytest.raises(MalformedSpec, match="stream came to"):
        _translate({"steering": [KIND], "stream": True}, path=CHAT_BATCH)


def test_far_too_many_entries_are_refused_by_their_number_alone() -> None:
    with pytest.raises(TooManyEntries, match="100000 entries in steering"):
        _translate({"steering": [None] * 100_000}, path=CHAT)


def test_a_parameter_of_the_url_does_not_steer() -> None:
    with pytest.raises(MisplacedField, match="the URL's parameter 'steering'"):
        translate(CHAT, b"{}", None, StubChecker(), model_names(StubChecker()), {"steering": "[]"})


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "user", "content": "steering, readout and vllm_steer are words"}]},
        {"metadata": {"steering": "a note"}},
        {"tools": [{"type": "function", "function": {"name": "steer", "parameters": {"steering": {}}}}]},
        {"user": "steering"},
    ],
    ids=str,
)
def test_text_that_only_speaks_of_steering_is_let_through(fields: dict[str, Any]) -> None:
    translated = _translate(fields)
    assert (translated.body, translated.spec) == (None, None)


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions/render", "/v1/embeddings", "/collective_rpc", "/of/a/later/vllm"]
)
@pytest.mark.parametrize(
    "fields", [{"steering": [KIND]}, {"readout": {"layers": [1]}}, {"model": "base-kind"}, *MISPLACED], ids=str
)
def test_a_route_that_cannot_steer_refuses_whatever_asks_for_it(path: str, fields: dict[str, Any]) -> None:
    with pytest.raises(NotOnThisRoute, match=f"came to {path}, which cannot honour it; allowed: {CHAT}"):
        _translate(fields, StubChecker(**ALIASES), path)
    assert _translate({"model": "base", "x": 1}, path=path).body is None


@pytest.mark.parametrize("path", sorted(NAMING))
def test_an_alias_stands_for_its_model_where_text_is_only_counted(path: str) -> None:
    assert _rest(_translate({"model": "base-kind", "prompt": "x"}, StubChecker(**ALIASES), path)) == {
        "model": BASE_MODEL,
        "prompt": "x",
    }
    with pytest.raises(NotOnThisRoute):
        _translate({"model": "base-kind", "steering": []}, StubChecker(**ALIASES), path)


@pytest.mark.parametrize("path", [path for path, route in STEERED.items() if not route.reads])
def test_a_readout_is_refused_where_the_reply_has_no_place_for_it(path: str) -> None:
    with pytest.raises(NotOnThisRoute, match="whose replies have no place for it"):
        _translate({"readout": {"layers": [1]}}, path=path)
    assert _translate({"steering": [KIND]}, path=path).spec == RequestSpec((Steering.from_json(KIND),))


def test_tokens_in_and_out_take_the_wire_where_that_route_has_its_sampling_parameters() -> None:
    wire = json.dumps({"steering": [KIND]})
    body = {"token_ids": [1], "sampling_params": {"n": 2, "extra_args": {"vllm_steer": wire, "own": 1}}}
    translated = _translate(body, path=TOKENS)
    assert translated.spec == RequestSpec((Steering.from_json(KIND),))
    assert _rest(translated) == {"token_ids": [1], "sampling_params": {"n": 2, "extra_args": {"own": 1}}}


@pytest.mark.parametrize(("path", "field"), LORA_NAMES.items())
def test_a_lora_module_cannot_take_the_name_of_an_alias(path: str, field: str) -> None:
    with pytest.raises(MalformedSpec, match=f"{field} is 'base-kind', which is a steered alias"):
        _translate({field: "base-kind", "lora_path": "/x"}, StubChecker(**ALIASES), path)
    assert _translate({field: "other"}, StubChecker(**ALIASES), path).body is None


SAYS = {"steering_in_model_names": True, **ALIASES}


@pytest.mark.parametrize(
    ("model", "served", "entries"),
    [
        ("base@kind:3", "base", [{"direction": "kind", "alpha": 3.0}]),
        ("base@kind:3@1;span=response", "base", [{"direction": "kind", "alpha": 3.0, "layer": 1, "span": "response"}]),
        ("base@kind:3,calm:1@1", "base", [{"direction": "kind", "alpha": 3.0}, CALM]),
        ("base-kind@calm:1@1", "base", [KIND, CALM]),
        ("tuned@kind:3", "tuned", [{"direction": "kind", "alpha": 3.0}]),
    ],
)
def test_a_model_name_can_say_its_entries(model: str, served: str, entries: list[dict[str, Any]]) -> None:
    translated = _translate({"model": model, "messages": []}, StubChecker(**SAYS))
    assert _rest(translated) == {"model": served, "messages": []}
    assert list(_steering(translated)) == [Steering.from_json(one) for one in entries]
    assert translated.alias == ("base-kind" if model.startswith("base-kind") else None)


def test_a_model_name_says_nothing_unless_the_operator_allows_it() -> None:
    translated = _translate({"model": "base@kind:3"}, StubChecker(**ALIASES))
    assert (translated.body, translated.spec) == (None, None)  # vLLM knows no such model


def test_a_served_name_with_an_at_sign_stays_a_name() -> None:
    names = ModelNames("base@2", {"base@2@soft": (Steering("kind", 1.0),)}, say_steering=True)
    assert names.read("base@2").name == "base@2"
    assert names.read("base@2@soft").aliased == (Steering("kind", 1.0),)
    assert names.read("base@2@kind:3").asked == (Steering("kind", 3.0),)
    assert names.read("base@2@soft@kind:3").aliased == (Steering("kind", 1.0),)


def test_entries_in_a_model_name_are_the_clients_own() -> None:
    """So the operator's lists and bounds hold for them."""
    checker = StubChecker(**SAYS, allowed_directions={f"key:{sha256(b'k').hexdigest()[:12]}": ["calm"]})
    with pytest.raises(DirectionNotAllowed):
        _translate({"model": "base@kind:3"}, checker, key="k")
    assert _translate({"model": "base-kind"}, checker, key="k").spec is not None  # the operator's


def test_a_model_name_with_bad_entries_is_refused() -> None:
    for model in ("base@", "base@kind", "base@kind:x", "tuned@kind"):
        with pytest.raises(SteerError):
            _translate({"model": model}, StubChecker(**SAYS))
    with pytest.raises(NotOnThisRoute, match="steered alias 'base@kind:3'"):
        _translate({"model": "base@kind:3"}, StubChecker(**SAYS), "/v1/embeddings")
    for path in NAMING:
        assert _rest(_translate({"model": "base@kind:3"}, StubChecker(**SAYS), path)) == {"model": "base"}


@pytest.mark.parametrize(
    "header",
    [
        "kind:2",
        '[{"direction": "kind", "alpha": 2.0}]',
        '{"steering": [{"direction": "kind", "alpha": 2}]}',
    ],
)
def test_the_header_steers(header: str) -> None:
    wire = steering_header([(b"x-steering", header.encode())])
    translated = _translate({"messages": []}, header=wire)
    assert _rest(translated) == {"messages": []}
    assert _steering(translated) == (Steering.from_json(KIND),)


def test_the_header_reads() -> None:
    wire = steering_header([(b"x-steering", b'{"readout": {"project": ["kind"]}}')])
    spec = _translate({"steering": [KIND]}, header=wire).spec
    assert spec is not None
    assert spec.readout is not None
    assert (spec.readout.project, spec.readout.layers) == (("kind",), (2,))
    assert spec.entries == (Steering.from_json(KIND),)


def test_two_places_for_one_field_are_refused() -> None:
    wire = steering_header([(b"x-steering", b"kind:2")])
    with pytest.raises(MalformedSpec, match="'steering' came both in the body and in the header X-Steering"):
        _translate({"steering": [KIND]}, header=wire)
    with pytest.raises(MalformedSpec, match="'steering' came both in the header X-Steering and in the model's name"):
        _translate({"model": "base@kind:2"}, StubChecker(**SAYS), header=wire)
    assert len(_steering(_translate({"model": "base-kind"}, StubChecker(**ALIASES), header=wire))) == 2


@pytest.mark.parametrize("headers", [["kind:2"] * 2, ["{"], ['{"steering": [], "steering": []}'], ["kind"], [""]])
def test_a_wrong_header_is_refused(headers: list[str]) -> None:
    with pytest.raises(SteerError):
        steering_header([(b"x-steering", one.encode()) for one in headers])


@pytest.mark.parametrize(
    "readout",
    [{"project": "kind"}, {"trace": "kind"}, {"project": {"kind": 1}}, {"trace": 3}, {"project": None}],
    ids=str,
)
def test_names_that_are_no_list_are_told_before_lacking_layers(readout: dict[str, Any]) -> None:
    (where,) = readout
    with pytest.raises(MalformedSpec, match=f"^readout {where} is .*; allowed: a list of names") as caught:
        _translate({"readout": readout})
    assert "layers" not in str(caught.value)


@pytest.mark.parametrize("name", [b"x-steer", b"steering", b"x-vllm-steering", b"x-readout", b"x-steering-vector"])
def test_a_header_with_a_similar_name_is_refused(name: bytes) -> None:
    with pytest.raises(MisplacedField, match="X-Steering"):
        steering_header([(name, b"kind:2")])
    assert steering_header([(b"x-request-id", b"steering"), (b"x-vllm-steer", b"1")]) is None


def test_the_header_on_a_route_that_cannot_honour_it_is_refused() -> None:
    wire = {"steering": [KIND]}
    for path in ("/v1/embeddings", "/v1/chat/completions/render"):
        with pytest.raises(NotOnThisRoute, match="X-Steering"):
            _translate({}, path=path, header=wire)
    for path in NAMING:
        assert _translate({}, path=path, header=wire).body is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"steering": [KIND, {**KIND, "alfa": 1}]}, "steering[1]"),
        ({"steering": [KIND, {"direction": "kind", "alpha": True}]}, "steering[1]"),
        ({"readout": {"layers": [2], "pool": "least"}}, "readout"),
        ({"steering": {}}, None),
    ],
)
def test_a_refusal_names_the_place_in_the_body(fields: dict[str, Any], param: str | None) -> None:
    with pytest.raises(SteerError) as refused:
        _translate(fields)
    assert refused.value.param == param
    assert error_body(refused.value)["error"]["param"] == param


def test_a_refusal_speaks_the_words_of_json_and_names_the_nearest_field() -> None:
    for fields, told in (
        ({"steering": {}}, "steering is a JSON object; allowed"),
        ({"steering": [KIND | {"alpha": True}]}, "alpha is true; allowed"),
        ({"steering": [KIND | {"layer": False}]}, "layer is false; allowed"),
        ({"steering": [{"direction": None, "alpha": 1}]}, "direction is null; allowed"),
        ({"steering": [{"direction": "kind", "alpa": 1}]}, "Perhaps you mean 'alpha'"),
        ({"readout": {"project": ["kind"], "spans": "all"}}, "Perhaps you mean 'span'"),
    ):
        with pytest.raises(SteerError, match=told):
            _translate(fields)
