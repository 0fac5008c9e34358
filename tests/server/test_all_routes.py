"""On every POST route of vLLM's server steering, readouts and aliases act, or are refused; none ignores them."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import vllm.entrypoints
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.server.conftest import ALIAS, ALIAS_ALPHA, KIND_LAYER, OTHER_LAYER, ServedModel
from tests.server.test_fuzz import REPEATABLE
from tests.support.server.asking import (
    EXACT,
    GENERATED,
    MESSAGES_BODY,
    PROMPT,
    READ,
    READING,
    ROUTES,
    SCORING,
    STRONG,
    USES,
    body_for,
    events_of,
    post,
    readout_of,
    said,
)
from vllm_steer import Steering, close_llm, load_llm, register_directions, steered
from vllm_steer.server.inbound.steered_routes import (
    CHAT,
    COHERE,
    INVOCATIONS,
    NAMING,
    REFUSING,
    RESPONSES,
    STEERED,
)

pytestmark = [pytest.mark.slow, pytest.mark.server]

DECIDED = frozenset(STEERED) | NAMING | REFUSING
DECISIONS = frozenset({"/v1/systemone", "/v1/decisions"})
"""The tiny model cannot decide, so these answer 501 to every request."""
SINCE = {"/v1/decisions": (0, 33)}
"""Route -> the first release that has it, for those that not all supported releases have."""
EXPECTED = {path for path in DECIDED if SINCE.get(path, (0, 0)) <= vllm.__version_tuple__[:2]}

# ---------------------------------------------------------------------------------------------- what there is


def test_somebody_has_decided_about_every_post_route_that_a_server_can_have() -> None:
    # Another process: vLLM reads the switches of its routes once.
    code = """
import json
from vllm.entrypoints.launchers.app import build_app
from vllm.tasks import POOLING_TASKS
from vllm.utils.argparse_utils import FlexibleArgumentParser
try:
    from vllm.entrypoints.common.cli_args import make_arg_parser
except ModuleNotFoundError:  # before 0.33
    from vllm.entrypoints.launchers.cli_args import make_arg_parser

options = ["--enable-scale-out", "--enable-fault-tolerance"]
arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(options)
app = build_app(arguments, ("generate", "transcription", "realtime", "render", *POOLING_TASKS))

def posts(routes):
    for route in routes:
        if "POST" in (getattr(route, "methods", None) or ()):
            yield route.path
        elif getattr(route, "routes", None):
            yield from posts(route.routes)

print("routes:", json.dumps(sorted(set(posts(app.routes)))))
"""
    switches = {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_ENABLE_COHERE_API": "1",
        "VLLM_PLUGINS": "",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **switches}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("routes: ")]
    built = set(json.loads(line.removeprefix("routes: ")))
    assert {CHAT, COHERE, *(DECISIONS & EXPECTED), "/v1/load_lora_adapter"} <= built
    assert built - DECIDED == set(), "decide in steered_routes.py what these do with steering"
    # Some routes exist only with arguments that exclude other routes; the source has their paths all the same.
    written = set(_written_posts(Path(vllm.entrypoints.__path__[0])))
    assert len(written) > 30
    assert written - DECIDED == set(), "decide in steered_routes.py what these do with steering"
    assert EXPECTED - written - built == set(), "vLLM has these no more"


def _written_posts(root: Path) -> Iterator[str]:
    """Paths that the source below ``root`` gives to POST routes."""
    for file in root.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or not node.args:
                continue
            path = node.args[0]
            if not isinstance(path, ast.Constant) or not str(path.value).startswith("/"):
                continue
            methods = next((word.value for word in node.keywords if word.arg == "methods"), None)
            names = {item.value for item in ast.walk(methods) if isinstance(item, ast.Constant)} if methods else set()
            adds = node.func.attr in ("add_api_route", "api_route", "add_route", "route") and "POST" in names
            if node.func.attr == "post" or adds:
                yield str(path.value)


# ---------------------------------------------------------------------------------------------- route by route


@ROUTES
def test_steering_acts_and_is_marked_and_an_alias_is_the_same(server: httpx.Client, path: str) -> None:
    plain = post(server, path)
    marked = post(server, path, steering=STRONG)
    assert said(path, marked) != said(path, plain)
    assert said(path, post(server, path, model=ALIAS)) == said(path, marked)
    assert said(path, post(server, path, steering=[])) == said(path, plain)
    assert ("x-vllm-steer" in marked.headers, "x-vllm-steer" in plain.headers) == (True, False)


@READING
def test_a_readout_comes_and_changes_nothing(server: httpx.Client, path: str) -> None:
    plain = post(server, path)
    read = post(server, path, readout=READ)
    assert said(path, read) == said(path, plain)
    assert "x-vllm-steer" in read.headers
    readout = readout_of(read)
    # The last token is sampled, not computed.
    assert readout["num_tokens"] == len(readout["trace"]["kind"]["values"]) == GENERATED - 1
    steered_too = readout_of(post(server, path, readout=READ, steering=STRONG))
    assert steered_too["projections"]["kind"] != readout["projections"]["kind"]


@pytest.mark.parametrize("path", [path for path in STEERED if not STEERED[path].reads])
def test_a_route_whose_replies_have_no_place_for_a_readout_refuses_one(server: httpx.Client, path: str) -> None:
    body = body_for(server, path) if path in USES else {}
    reply = server.post(path, json={"model": "tiny", **body, "readout": READ})
    assert reply.status_code == 400
    assert "no place" in reply.text


@pytest.mark.parametrize(
    ("path", "how"),
    [
        (path, how)
        for path, use in USES.items()
        if use.streamed
        for how in ("steered", "alias", "read")
        if how != "read" or STEERED[path].reads
    ],
)
def test_a_stream_says_what_the_whole_reply_says(server: httpx.Client, path: str, how: str) -> None:
    fields = {"steered": {"steering": STRONG}, "alias": {"model": ALIAS}, "read": {"readout": READ}}[how]
    whole = post(server, path, **fields)
    stream = post(server, path, stream=True, **fields)
    assert "x-vllm-steer" in stream.headers
    streamed = USES[path].streamed
    assert streamed is not None
    assert streamed(events_of(stream)) == said(path, whole)
    assert ('"readout"' in stream.text, '"trace"' in stream.text) == (how == "read", how == "read")


@pytest.mark.parametrize("fields", [{}, {"steering": STRONG}, {"readout": READ}], ids=["plain", "steered", "read"])
@pytest.mark.parametrize("abort", ["/abort_requests", "/inference/v1/abort_requests"])
def test_a_request_is_aborted_by_the_id_that_its_caller_knows(
    server: httpx.Client, abort: str, fields: dict[str, Any]
) -> None:
    body = {"model": "tiny", "messages": MESSAGES_BODY, **EXACT, "max_tokens": 200, "stream": True, **fields}
    tokens, reasons, last = 0, [], {}
    with server.stream("POST", CHAT, json=body, headers={"X-Request-Id": "to-be-aborted"}) as stream:
        for line in stream.iter_lines():
            if not line.startswith("data: {"):
                continue
            (last,) = json.loads(line.removeprefix("data: "))["choices"] or ({},)
            if tokens == 0 and last.get("token_ids"):
                assert server.post(abort, json={"request_ids": ["chatcmpl-to-be-aborted"]}).status_code == 200
            tokens += len(last.get("token_ids") or ())
            reasons.append(last.get("finish_reason"))
    assert reasons[-1] == "abort"
    assert 0 < tokens < 200
    assert ("readout" in last) == ("readout" in fields)
    if "readout" in last and "error" not in last["readout"]:  # the engine may be a step or two ahead of the abort
        assert last["readout"]["num_tokens"] == tokens - 1
    # Nothing of the request is left: its id is free, and the next request with it has a complete readout.
    again = server.post(
        CHAT, json={**body, "max_tokens": 5, "stream": False}, headers={"X-Request-Id": "to-be-aborted"}
    )
    assert again.json()["choices"][0]["finish_reason"] == "length"


@ROUTES
def test_an_unknown_model_is_told_the_aliases(server: httpx.Client, path: str) -> None:
    reply = post(server, path, model="nobody")
    if path == INVOCATIONS:  # it takes the model from a SageMaker header and ignores the body's
        assert said(path, reply) == said(path, post(server, path))
        return
    assert reply.status_code == 404
    assert f"Steered aliases of this server: {ALIAS}." in reply.text


@ROUTES
def test_a_bad_direction_is_a_bad_request(server: httpx.Client, path: str) -> None:
    bad = post(server, path, steering=[{"direction": "nobody", "alpha": 1.0}])
    assert bad.status_code == 400
    assert "no direction is named 'nobody'" in bad.text
    unhooked = post(server, path, steering=[{"direction": "kind", "alpha": 1.0, "layer": 0}])
    assert unhooked.status_code == 400
    assert "layer 0 is not hooked" in unhooked.text


def test_what_only_counts_takes_an_alias_for_its_model(server: httpx.Client) -> None:
    for path, body in {
        "/tokenize": {"prompt": PROMPT},
        "/detokenize": {"tokens": [5, 6, 7]},
        "/v1/messages/count_tokens": {"messages": MESSAGES_BODY},
    }.items():
        plain = server.post(path, json={"model": "tiny", **body})
        alias = server.post(path, json={"model": ALIAS, **body})
        assert (alias.status_code, alias.json()) == (200, plain.json())
        assert "x-vllm-steer" not in alias.headers
        assert server.post(path, json={"model": "tiny", **body, "steering": STRONG}).status_code == 400
    assert set(NAMING) == {"/tokenize", "/detokenize", "/v1/messages/count_tokens"}


# ---------------------------------------------------------------------------------------------- fuzz

SPECS = {
    "kind": [{"direction": "kind", "alpha": ALIAS_ALPHA}],
    "against": [{"direction": "kind", "alpha": -40.0, "span": "all"}],
    "other": [{"direction": "other", "alpha": 60.0, "layer": OTHER_LAYER}],
    "both": [{"direction": "kind", "alpha": 30.0}, {"direction": "other", "alpha": -30.0}],
    "set": [{"direction": "kind", "op": "set", "alpha": 45.0, "layer": KIND_LAYER}],
}
PLACES = (
    "top", "top", "top", "alias", "wire", "wire", "query", "steer", "Steering", "vllm_steer", "extra_body",
    "extra_args", "sampling_params", "options", "message", "raw vllm_xargs",
)  # fmt: skip
# Values that ask for nothing in the place of a spec, so that a plain answer is right.
NOTHING: tuple[Any, ...] = (None, [])
ODD: tuple[Any, ...] = (
    0, 1, True, "kind", "", {}, {"direction": "kind"}, [[]], [None], ["kind"], [{}], 1e308, [{"direction": "kind"}],
    [{"direction": "kind", "alpha": "5"}], [{"direction": "kind", "alpha": 1e9}], [{"direction": "", "alpha": 1.0}],
    [{"direction": "kind", "alpha": 1.0, "layers": [2]}], [{"direction": "kind", "alpha": 1.0, "layer": 99}],
)  # fmt: skip


@pytest.fixture(scope="module")
def offline(served: ServedModel) -> dict[str, dict[bool, tuple[list[int], str]]]:
    """Spec's name, or "" for none -> whether through the chat template -> the tokens and the text of the answer, from
    an engine in this process that has the server's checkpoint and directions."""
    llm = load_llm(
        str(served.model), layers=[OTHER_LAYER, KIND_LAYER], dtype="float32", enforce_eager=True, max_model_len=256,
        kv_cache_memory_bytes=64 << 20, disable_log_stats=True,
    )  # fmt: skip
    try:
        register_directions(llm, served.directions)
        params = {"temperature": 0, "max_tokens": GENERATED, "ignore_eos": True}
        asked = {name: [Steering.from_json(entry) for entry in SPECS.get(name, ())] for name in ("", *SPECS)}
        told: dict[str, dict[bool, tuple[list[int], str]]] = {}
        for name, entries in asked.items():
            chat = llm.chat(MESSAGES_BODY, steered(params, entries), use_tqdm=False)[0].outputs[0]  # type: ignore[arg-type]
            text = llm.generate(PROMPT, steered(params, entries), use_tqdm=False)[0].outputs[0]
            told[name] = {True: (list(chat.token_ids), chat.text), False: (list(text.token_ids), text.text)}
    finally:
        close_llm(llm)
    assert len({str(one) for one in told.values()}) == len(told)  # else the fuzz could not tell them apart
    return told


@dataclass(frozen=True)
class Ask:
    """One request of the fuzz.

    Attributes:
        spec: the name in ``SPECS``; None where the value is not one of them.
        place: one of ``PLACES``.
        value: the value in that place.
        stream: whether a stream is asked for.
    """

    path: str
    spec: str | None
    place: str
    value: Any
    stream: bool


@st.composite
def asks(draw: st.DrawFn) -> Ask:
    path = draw(st.sampled_from([*sorted(USES) * 4, *sorted(DECIDED)]))
    place = draw(st.sampled_from(PLACES))
    spec = draw(st.sampled_from([*SPECS, *SPECS, None]))
    value = SPECS[spec] if spec is not None else draw(st.sampled_from([*NOTHING, *ODD]))
    use = USES.get(path)
    stream = use is not None and use.streamed is not None and draw(st.booleans())
    return Ask(path, "kind" if place == "alias" else spec, place, value, stream)


def _request(server: httpx.Client, ask: Ask) -> httpx.Response:
    body = {"model": "tiny", **(body_for(server, ask.path) if ask.path in USES else {})}
    if ask.stream:
        body["stream"] = True
    params = {}
    match ask.place:
        case "top":
            body["steering"] = ask.value
        case "alias":
            body["model"] = ALIAS
        case "wire":
            route = STEERED.get(ask.path)
            inner = body
            for name in route.extra if route is not None and route.extra else ("vllm_xargs",):
                inner[name] = dict(inner.get(name, {}))
                inner = inner[name]
            inner["vllm_steer"] = json.dumps({"v": 1, "steering": ask.value})
        case "query":
            params["steering"] = json.dumps(ask.value)
        case "steer" | "Steering" | "vllm_steer":
            body[ask.place] = ask.value
        case "message":
            body["messages"] = [{**MESSAGES_BODY[0], "steering": ask.value}]
        case "raw vllm_xargs":
            body["vllm_xargs"] = {**body.get("vllm_xargs", {}), "steering": json.dumps(ask.value)}
        case _:
            body[ask.place] = {**body.get(ask.place, {}), "steering": ask.value}
    return server.post(ask.path, json=body, params=params)


def test_no_route_gives_the_unsteered_answer_to_a_request_that_asks_for_steering(
    server: httpx.Client, offline: dict[str, dict[bool, tuple[list[int], str]]]
) -> None:
    scores = {name: said(SCORING, post(server, SCORING, steering=SPECS.get(name, []))) for name in ("", *SPECS)}
    assert len({str(one) for one in scores.values()}) == len(scores)
    seen: Counter[tuple[str, int]] = Counter()

    @settings(REPEATABLE, max_examples=600)
    @given(asks())
    def answers(ask: Ask) -> None:
        reply = _request(server, ask)
        if ask.path in DECISIONS and reply.status_code == 501:
            return
        assert reply.status_code < 500, reply.text
        kind = "steers" if ask.path in USES else "other"
        seen[kind, reply.status_code] += 1
        if reply.status_code != 200:
            return
        # No other route may answer a request that asks for steering, but for an alias where tokens are only counted.
        asks_nothing = ask.spec is None and ask.value in NOTHING
        if ask.path not in USES:
            assert asks_nothing or (ask.place == "alias" and ask.path in NAMING)
            return
        assert ask.spec is not None or asks_nothing, f"{ask.value!r} was taken for a spec"
        name = "" if asks_nothing else ask.spec or ""
        use = USES[ask.path]
        if ask.path == SCORING:
            answer, expected = said(ask.path, reply), scores[name]
        else:
            streamed = use.streamed if ask.stream else None
            answer = said(ask.path, reply) if streamed is None else streamed(events_of(reply))
            ids, text = offline[name][use.is_chat]
            expected = text if isinstance(answer, str) else [ids]
        assert answer == expected, ask
        assert ("x-vllm-steer" in reply.headers) == (name != ""), ask

    answers()
    # A fuzzer that only ever sees refusals, or none, tests nothing.
    assert min(seen["steers", 200], seen["steers", 400], seen["other", 400]) >= 20, seen


@pytest.mark.parametrize(
    "path", [path for path, use in USES.items() if use.streamed is not None and STEERED[path].reads]
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_that_only_the_engine_can_make_is_a_bad_request_streamed_or_not(
    server: httpx.Client, path: str, stream: bool
) -> None:
    reply = post(server, path, readout={"project": ["kind"], "skip_first": 200}, stream=stream)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "bad_readout")


@pytest.mark.parametrize("fields", [{"steering": STRONG}, {"readout": READ}], ids=str)
@pytest.mark.parametrize("path", [CHAT, RESPONSES])
def test_a_bad_request_of_vllms_own_is_no_server_error_where_it_was_to_be_steered_and_streamed(
    server: httpx.Client, path: str, fields: dict[str, Any]
) -> None:
    reply = post(server, path, logit_bias={"99999999": 1}, stream=True, **fields)
    assert reply.status_code == 400, reply.text
    assert isinstance(reply.json()["error"]["message"], str)
