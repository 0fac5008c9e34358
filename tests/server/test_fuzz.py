"""Whatever a client sends, the server answers with a reply or with a client error, and goes on as before."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error

from tests.server.conftest import ADMIN_KEY, ALIAS, API_KEY, KIND_LAYER, OTHER_LAYER, ServedModel
from tests.support.tiny_models import HIDDEN_SIZE

pytestmark = [pytest.mark.slow, pytest.mark.server]

# The same examples in every run: a red build is about the change under test. No database, no `explain`: a failure is
# shrunk once, with requests that take tens of milliseconds each.
REPEATABLE = settings(
    derandomize=True,
    deadline=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

ROUTES = {
    "GET /v1/steering",
    "GET /v1/steering/directions",
    "GET /v1/steering/directions/{name}",
    "PUT /v1/steering/directions/{name}",
    "DELETE /v1/steering/directions/{name}",
    "GET /v1/steering/aliases",
    "PUT /v1/steering/aliases/{alias}",
    "DELETE /v1/steering/aliases/{alias}",
    "GET /v1/steering/readouts/{reply_id}",
}
DIRECTIONS = "/v1/steering/directions"
ADMIN = {"X-Admin-Key": ADMIN_KEY}
OWN = "fuzz-"  # names that may come and go; the others belong to the tests that share the server
OWN_NAME = f"{OWN}one"
VECTOR = np.ones(HIDDEN_SIZE, "<f4").tobytes()
UPLOADS = [b"", b"junk", bytes(4 * HIDDEN_SIZE), b"\xff" * 4 * HIDDEN_SIZE, VECTOR, VECTOR[::-1], VECTOR]

PROMPT = "Once upon a time there was"
PROMPTS = {
    "/v1/completions": {"prompt": PROMPT},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": PROMPT}]},
}


def _nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


# Values that json.dumps can write. Half a surrogate pair is JSON that has no UTF-8; 10**400 is beyond floats.
ODD_VALUES = [
    None, True, 0, 1, -1, 0.5, 1e308, 10**30, 10**400, float("nan"), float("-inf"), "", "kind", "nobody", "NaN", "1",
    "\ud800", "k" * 10_000, [], [[]], ["kind"], [1], {}, {"": None}, {"direction": "kind"}, _nested(300),
]  # fmt: skip
ODD_NAMES = ["", "alpha", "layers", "direction", "vllm_steer", "vllm_steer_resolved", "__class__", "\ud800"]
# Texts that it cannot write: numbers with more digits, or more levels, than Python reads, or no JSON at all.
ODD_TEXTS = [
    "1" * 5000,
    "-1e999",
    "[" * 20_000 + "]" * 20_000,
    '{"a":' * 20_000 + "1" + "}" * 20_000,
    "{",
    "'kind'",
    "",
]
PLACE_OF_TEXT = "here stands an odd text"
# FastAPI's own answer to a body that Python cannot read; it does not pass vLLM's error handlers.
UNREADABLE = '{"detail":"There was an error parsing the body"}'

names = st.sampled_from(["kind", "other", "kind", "other", "kind", "other", "nobody"])
entries = st.one_of(
    st.fixed_dictionaries(
        {"direction": names, "alpha": st.floats(-1000, 1000) | st.integers(-50, 50)},
        optional={
            "op": st.sampled_from(["add", "set"]),
            "span": st.sampled_from(["prompt", "generated", "all"]),
            "layer": st.sampled_from([OTHER_LAYER, KIND_LAYER, OTHER_LAYER, KIND_LAYER, 0]),
        },
    ),
    st.fixed_dictionaries({"direction": names, "op": st.just("ablate")}),
)
readouts = st.fixed_dictionaries(
    {"layers": st.just([OTHER_LAYER, KIND_LAYER])},
    optional={
        "span": st.sampled_from(["prompt", "generated", "all"]),
        "project": st.lists(names, max_size=2),
        "trace": st.lists(names, max_size=2, unique=True),
        "vectors": st.booleans(),
    },
)
wires = st.fixed_dictionaries({"steering": st.lists(entries, max_size=4)}, optional={"readout": readouts})


@st.composite
def bodies(draw: st.DrawFn, path: str) -> str:
    """The text of a body for ``path``: a valid one into which up to two faults were put."""
    wire = draw(wires)
    if draw(st.booleans()):
        fields = {"vllm_xargs": {"vllm_steer": json.dumps(_spoiled(draw, wire, draw(st.integers(0, 1))))}}
    else:
        fields = wire
    fields = _spoiled(draw, fields, draw(st.integers(0, 1)))
    xargs = fields.get("vllm_xargs")
    if isinstance(xargs, dict):
        # vLLM answers 500 to half a surrogate pair in other fields of vllm_xargs, with this plugin or without it.
        others = {name: value for name, value in xargs.items() if name != "vllm_steer"}
        fields = {**fields, "vllm_xargs": {n: v for n, v in xargs.items() if n not in others or _has_utf8([n, v])}}
    odd_text = draw(st.sampled_from([*[None] * 30, *ODD_TEXTS]))
    if odd_text is not None:
        fields[draw(st.sampled_from(["steering", "readout", "vllm_xargs"]))] = PLACE_OF_TEXT
    body = {
        "model": draw(st.sampled_from(["tiny", ALIAS])), **PROMPTS[path], "max_tokens": draw(st.integers(1, 2)),
        "temperature": 0, "stream": draw(st.booleans()), **fields,
    }  # fmt: skip
    return json.dumps(body).replace(json.dumps(PLACE_OF_TEXT), odd_text or "")


def _spoiled(draw: st.DrawFn, fields: dict[str, Any], times: int) -> dict[str, Any]:
    """A copy of the object with ``times`` faults in it."""
    for _ in range(times):
        fields = {**fields, (name := draw(st.sampled_from(sorted(fields)))): _odd(draw, fields[name])}
    return fields


def _odd(draw: st.DrawFn, value: Any) -> Any:
    """The value with one fault, at any depth."""
    how = draw(st.sampled_from(["inside", "inside", "inside", "replaced", "more"]))
    if how == "inside" and value and isinstance(value, dict):
        return {**value, (name := draw(st.sampled_from(sorted(value)))): _odd(draw, value[name])}
    if how == "inside" and value and isinstance(value, list):
        place = draw(st.integers(0, len(value) - 1))
        return [*value[:place], _odd(draw, value[place]), *value[place + 1 :]]
    odd = draw(st.sampled_from(ODD_VALUES))
    if how == "more" and isinstance(value, dict):
        return {**value, draw(st.sampled_from(ODD_NAMES)): odd}
    if how == "more" and isinstance(value, list):
        return [*value, odd]
    return odd


def _has_utf8(value: Any) -> bool:
    return "\\ud800" not in json.dumps(value)


def _check_error(status: int, text: str) -> None:
    """The body of an error is OpenAI's."""
    assert 400 <= status < 500, text
    assert set(json.loads(text)) == {"error"}, text
    error = json.loads(text)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status or re.fullmatch("[a-z_]+", error["code"])  # vLLM's are numbers, ours names
    assert error["message"]


def _no_number(spelled: str) -> None:
    raise AssertionError(f"the reply is no JSON: it holds {spelled}")


def _unsteered(server: httpx.Client) -> str:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4, "temperature": 0}
    return str(server.post("/v1/completions", json=body).json()["choices"][0]["text"])


@pytest.mark.parametrize("path", PROMPTS)
def test_no_steering_readout_or_xargs_brings_the_server_down(server: httpx.Client, path: str) -> None:
    before = _unsteered(server)
    statuses: Counter[int] = Counter()

    @settings(REPEATABLE, max_examples=75)
    @given(bodies(path))
    def answers(body: str) -> None:
        reply = server.post(path, content=body.encode(), headers={"Content-Type": "application/json"})
        statuses[reply.status_code] += 1
        if reply.status_code != 200:
            if (reply.status_code, reply.text) != (400, UNREADABLE):
                _check_error(reply.status_code, reply.text)
        else:
            # Not splitlines(): a generated text may hold other line ends, which JSON lets stand.
            events = [
                line.removeprefix("data: ") for line in reply.text.split("\n") if line not in ("", "data: [DONE]")
            ]
            for event in events:
                assert "error" not in json.loads(event, parse_constant=_no_number), event
        assert _unsteered(server) == before

    answers()
    # A fuzzer whose bodies are all refused, or all accepted, tests nothing.
    assert min(statuses[200], statuses[400]) >= 10, statuses
    assert set(statuses) <= {200, 400}, statuses


@pytest.fixture
def own_names_go(server: httpx.Client) -> Iterator[None]:
    """Delete the directions that a test left under ``OWN``."""
    yield
    for one in server.get(DIRECTIONS).json()["directions"]:
        if one["name"].startswith(OWN):
            server.delete(f"{DIRECTIONS}/{quote(one['name'], safe='')}", headers=ADMIN)


@pytest.mark.usefixtures("own_names_go")
def test_no_request_to_the_routes_of_the_plugin_is_a_server_error(served: ServedModel, server: httpx.Client) -> None:
    document = schemathesis.openapi.from_url(f"{served.url}/openapi.json", timeout=60)
    routes = document.include(path_regex="^/v1/steering")
    assert {operation.ok().label for operation in routes.get_all_operations()} == ROUTES
    put = server.put(f"{DIRECTIONS}/{OWN_NAME}", params={"layer": KIND_LAYER}, content=VECTOR, headers=ADMIN)
    assert put.status_code == 201, put.text
    before = _unsteered(server)
    statuses: Counter[int] = Counter()
    cases = st.one_of(
        routes.as_strategy(),
        routes.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE),
        # Random names and layers seldom match, so some of the cases use one direction.
        routes.include(path_regex="name").as_strategy(path_parameters={"name": OWN_NAME}, query={"layer": KIND_LAYER}),
    )

    @settings(REPEATABLE, max_examples=100)
    @given(cases, st.booleans(), st.sampled_from(UPLOADS))
    def answers(case: schemathesis.Case, has_admin_key: bool, upload: bytes) -> None:
        name = next(iter(case.path_parameters), "")
        is_upload = case.method == "PUT" and name == "name"
        if case.method in ("PUT", "DELETE") and case.path_parameters[name] != OWN_NAME:
            case.path_parameters[name] = f"{OWN}{case.path_parameters[name]}"
        headers = {"Authorization": f"Bearer {API_KEY}"}
        if has_admin_key:
            headers |= ADMIN
        reply = case.call(headers=headers, **({"data": upload} if is_upload else {}))
        case.validate_response(reply, checks=[not_a_server_error])
        statuses[reply.status_code] += 1
        # No route of Starlette matches a path with a line end in it, so such a name never reaches the plugin.
        has_route = "%0A" not in str(case.path_parameters.get(name, ""))
        if reply.status_code >= 400 and (has_route or reply.text != '{"detail":"Not Found"}'):
            _check_error(reply.status_code, reply.text)

    answers()
    assert {200, 400, 401, 403, 404} <= set(statuses), statuses
    assert _unsteered(server) == before
