"""The middleware before a stub of vLLM's server: what reaches the server, and what reaches the client."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.server.stub_openai_app import BASE_MODEL, StubChecker, StubServer, exchange_messages, request
from vllm_steer.client.replies import reply_of
from vllm_steer.engine.front.http_exchange import Exchange, current_exchange
from vllm_steer.engine.front.readout_json import readout_json
from vllm_steer.errors import BadReadout, ReadoutNotFound, StreamOverflow
from vllm_steer.schema.steering import Steering
from vllm_steer.server.inbound.steered_routes import CHAT, COMPLETIONS, MESSAGES, RESPONSES
from vllm_steer.server.outbound.sse_framing import EventSplitter
from vllm_steer.server.readouts.kept_readouts import KeptReadouts

KIND = [{"direction": "kind", "alpha": 2.0}]
STEERED = {"model": BASE_MODEL, "steering": KIND}
READ = {**STEERED, "readout": {"layers": [2], "trace": ["kind"]}}
STREAM = "text/event-stream; charset=utf-8"


def _sse(*objects: dict[str, Any]) -> bytes:
    events = [json.dumps(one, separators=(",", ":")) for one in objects]
    return "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"]).encode()


def _objects(body: bytes) -> list[dict[str, Any]]:
    events = [event.removeprefix("data: ") for event in body.decode().split("\n\n") if event]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


def _filled(exchange: Exchange) -> None:
    """Fill the exchange as the engine does after a chat with two samples."""
    for index in range(2):
        sample = exchange.sample("chatcmpl-x", index)
        sample.trace = {"kind": [0.5, 1.5, 2.5]}
        sample.span_length = 3
        sample.readout = {"num_tokens": 3 + index}


def test_an_unsteered_request_and_its_reply_pass_byte_by_byte() -> None:
    body = b'{ "messages" : [], "n":1, "x": "\\u00e9" }'
    stub = StubServer(chunks=[b'{ "choices"', b": [] }"])
    reply = request(stub, StubChecker(served_aliases={"a": KIND}), CHAT, body, chunk_size=7)
    assert stub.body == body
    assert reply.chunks == [b'{ "choices"', b": [] }"]


@pytest.mark.parametrize("body", [STEERED, READ], ids=["steered", "read"])
def test_a_reply_says_in_its_head_that_its_request_was_steered_or_read(body: dict[str, Any]) -> None:
    answer = {"id": "chatcmpl-x", "choices": [{"index": 0}]}
    for content_type in ("application/json", STREAM):
        chunks = [_sse(answer) if content_type == STREAM else json.dumps(answer).encode()]
        stub = StubServer(chunks=chunks, content_type=content_type, engine=_filled)
        assert request(stub, StubChecker(), CHAT, body).headers["x-vllm-steer"] == "1"


@pytest.mark.parametrize(
    "body",
    [
        {"model": BASE_MODEL},
        {"model": BASE_MODEL, "steering": []},
        {"messages": [{"role": "user", "content": "vllm_steer, steering"}]},
    ],
    ids=str,
)
def test_a_reply_to_a_request_that_asks_for_nothing_has_no_mark(body: dict[str, Any]) -> None:
    for content_type in ("application/json", STREAM):
        stub = StubServer(chunks=[_sse({}) if content_type == STREAM else b"{}"], content_type=content_type)
        assert "x-vllm-steer" not in request(stub, StubChecker(), CHAT, body).headers


def test_an_alias_and_the_default_mark_their_replies_too() -> None:
    checker = StubChecker(served_aliases={"a": KIND}, default_steering=KIND)
    for model in ("a", BASE_MODEL):
        assert request(StubServer(), checker, CHAT, {"model": model}).headers["x-vllm-steer"] == "1"
    assert "x-vllm-steer" not in request(StubServer(), checker, CHAT, {"steering": []}).headers


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/chat/completions/batch", "/invocations", "/generative_scoring"])
@pytest.mark.parametrize("content_type", ["application/json", STREAM])
def test_a_success_without_anything_having_been_steered_is_an_error(path: str, content_type: str) -> None:
    chunks = [_sse({"choices": []}) if content_type == STREAM else b"{}"]
    stub = StubServer(chunks=chunks, content_type=content_type, steers=False)
    reply = request(stub, StubChecker(), path, STEERED)
    assert reply.status == 400
    assert reply.json()["error"]["type"] == "NotOnThisRoute"
    assert "x-vllm-steer" not in reply.headers


def test_a_readout_for_which_the_reply_has_no_place_is_an_error() -> None:
    stub = StubServer(chunks=[b'{"id": "chatcmpl-x", "data": []}'], engine=_filled)
    reply = request(stub, StubChecker(), "/invocations", READ)
    assert (reply.status, reply.json()["error"]["type"]) == (400, "NotOnThisRoute")


def test_events_are_held_back_until_something_was_steered() -> None:
    """A streamed response reports its creation before its engine request is admitted."""
    created = b'event: response.created\ndata: {"type": "response.created"}\n\n'
    refused = b'event: error\ndata: {"type": "error", "error": {"message": "no", "code": 400}}\n\n'
    stub = StubServer(chunks=[created, refused], content_type=STREAM, steers=False)
    reply = request(stub, StubChecker(), RESPONSES, STEERED)
    assert (reply.status, reply.json()["error"]["message"]) == (400, "no")


def test_a_refusal_in_the_midst_of_a_stream_is_told_in_the_plugins_words() -> None:
    def engine(exchange: Exchange) -> None:
        exchange.refusal = StreamOverflow("beyond float16")

    text = _sse({"id": "chatcmpl-x", "choices": []}, {"error": {"message": "gone", "code": 400}})
    stub = StubServer(chunks=[text], content_type=STREAM, engine=engine)
    last = _objects(request(stub, StubChecker(), CHAT, STEERED).body)[-1]
    assert (last["error"]["type"], last["error"]["message"]) == ("StreamOverflow", "beyond float16")


@pytest.mark.parametrize(
    ("path", "beside"), [("/v1/messages", {"type": "error"}), ("/cohere/v2/chat", {"message": "kidn"}), (CHAT, {})]
)
def test_a_refusal_has_what_the_routes_own_clients_look_for(path: str, beside: dict[str, str]) -> None:
    steering = [{"direction": "kidn", "alpha": 1}]
    reply = request(StubServer(), StubChecker(), path, {"steering": steering}).json()
    error = reply.pop("error")
    assert (error["type"], error["code"]) == ("UnknownDirection", "unknown_direction")
    assert set(reply) == set(beside)
    assert all(value in reply[name] for name, value in beside.items())


def test_a_model_that_is_not_there_is_answered_with_the_aliases_that_are() -> None:
    answer = {"error": {"message": "The model `x` does not exist.", "type": "NotFoundError", "code": 404}}
    checker = StubChecker(served_aliases={"base-kind": KIND, "base-calm": KIND})
    for path in (CHAT, "/tokenize", "/v1/messages"):
        stub = StubServer(chunks=[json.dumps(answer).encode()], status=404)
        told = request(stub, checker, path, {"model": "x"}).json()["error"]
        assert told["message"] == "The model `x` does not exist. Steered aliases of this server: base-kind, base-calm."
        assert told["code"] == 404


@pytest.mark.parametrize("method", ["GET", "OPTIONS"])
def test_other_methods_are_left_alone(method: str) -> None:
    stub = StubServer()
    request(stub, StubChecker(), CHAT, STEERED, method=method)
    assert stub.body == json.dumps(STEERED).encode()


def test_a_route_that_cannot_steer_refuses_a_body_that_asks_for_it() -> None:
    stub = StubServer()
    reply = request(stub, StubChecker(), "/v1/embeddings", STEERED)
    assert (reply.status, reply.json()["error"]["code"]) == (400, "not_on_this_route")
    assert stub.body is None
    request(stub, StubChecker(), "/v1/embeddings", {"model": BASE_MODEL})
    assert stub.body == json.dumps({"model": BASE_MODEL}).encode()


def test_a_server_without_hooks_is_left_alone() -> None:
    stub = StubServer()
    request(stub, None, CHAT, STEERED)
    assert stub.body == json.dumps(STEERED).encode()


@pytest.mark.parametrize("chunk_size", [None, 1, 5])
def test_the_new_body_has_its_own_length_however_the_old_one_was_cut(chunk_size: int | None) -> None:
    stub = StubServer()
    request(stub, StubChecker(), CHAT, STEERED, chunk_size=chunk_size)
    assert stub.body is not None
    assert "steering" not in json.loads(stub.body)
    assert int(stub.headers[b"content-length"]) == len(stub.body)


def test_the_exchange_is_bound_while_the_request_is_served_and_no_longer() -> None:
    stub = StubServer()
    request(stub, StubChecker(), CHAT, {**READ, "n": 2})
    assert stub.exchange is not None
    assert stub.exchange.spec is not None
    assert stub.exchange.choices_per_prompt == 2
    assert current_exchange.get() is None


def test_an_exchange_carries_the_servers_default_and_the_callers_guard_rails() -> None:
    stub = StubServer()
    checker = StubChecker(default_steering=KIND, allowed_directions={"key:2bb80d537b1d": ["calm"]})
    request(stub, checker, "/v1/messages", b"{}", key="secret")
    assert stub.exchange is not None
    assert stub.exchange.spec is None
    assert [entry.direction for entry in stub.exchange.whole.entries] == ["kind"]
    assert stub.exchange.allowed == {"calm"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_has_its_status_and_openais_body_and_reaches_nobody_else(stream: bool) -> None:
    stub = StubServer()
    body = {"stream": stream, "steering": [{"direction": "nobody", "alpha": 1}]}
    reply = request(stub, StubChecker(), CHAT, body)
    assert stub.body is None
    assert reply.status == 400
    assert reply.json() == {
        "error": {
            "message": "no direction is named 'nobody'",
            "type": "UnknownDirection",
            "param": None,
            "code": "unknown_direction",
        }
    }


@pytest.mark.parametrize("depth", [100, 950, 970, 980, 990, 100_000])
def test_a_body_nested_however_deeply_is_passed_on_or_refused(depth: int) -> None:
    body = b'{"steering": [{"direction": "kind", "alpha": 1}], "x": ' + b"[" * depth + b"]" * depth + b"}"
    assert request(StubServer(), StubChecker(), CHAT, body).status in (200, 400)


def test_a_client_that_goes_away_before_its_body_is_sent_starts_nothing() -> None:
    stub = StubServer()
    messages = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]
    assert exchange_messages(stub, StubChecker(), CHAT, messages) == []
    assert stub.body is None


def test_readouts_are_added_to_a_whole_chat_and_nothing_else_is_changed() -> None:
    answer = {"id": "chatcmpl-x", "choices": [{"index": 0, "text": "é"}, {"index": 1}], "usage": {"total": 3}}
    stub = StubServer(chunks=[json.dumps(answer).encode()], engine=_filled)
    reply = request(stub, StubChecker(), CHAT, READ).json()
    readouts = [choice.pop("readout") for choice in reply["choices"]]
    assert reply == answer
    trace = {"kind": {"start": 0, "values": [0.5, 1.5, 2.5]}}
    assert readouts == [{"num_tokens": 3, "trace": trace}, {"num_tokens": 4, "trace": trace}]


def test_choices_of_batched_prompts_find_the_sample_of_their_own_prompt() -> None:
    def engine(exchange: Exchange) -> None:
        for prompt in range(2):
            for index in range(3):
                exchange.sample(f"cmpl-x-{prompt}", index).readout = {"num_tokens": 10 * prompt + index}

    answer = {"id": "cmpl-x", "choices": [{"index": index} for index in range(6)]}
    stub = StubServer(chunks=[json.dumps(answer).encode()], engine=engine)
    reply = request(stub, StubChecker(), COMPLETIONS, {**READ, "n": 3}).json()
    assert [choice["readout"]["num_tokens"] for choice in reply["choices"]] == [0, 1, 2, 10, 11, 12]


def test_a_response_shows_the_readout_of_its_last_turn() -> None:
    def engine(exchange: Exchange) -> None:
        for turn in range(2):
            exchange.sample(f"resp-x_{turn}", 0).readout = {"num_tokens": turn}

    stub = StubServer(chunks=[b'{"id": "resp-x"}'], engine=engine)
    assert request(stub, StubChecker(), RESPONSES, READ).json()["readout"] == {"num_tokens": 1}


def test_an_error_of_vllms_own_is_passed_on() -> None:
    stub = StubServer(chunks=[b'{"error": {"message": "too long", "code": 400}}'], status=400)
    reply = request(stub, StubChecker(), CHAT, READ)
    assert (reply.status, reply.body) == (400, stub.chunks[0])


@pytest.mark.parametrize("content_type", ["application/json", STREAM])
def test_a_refusal_that_only_the_engine_could_make_is_a_true_http_error_of_the_plugins_own(content_type: str) -> None:
    def engine(exchange: Exchange) -> None:
        exchange.refusal = BadReadout("skip_first is too large")

    vllms = {"error": {"message": "skip_first is too large", "type": "Bad Request", "code": 400}}
    is_stream = content_type == STREAM
    chunks = [_sse(vllms)] if is_stream else [json.dumps(vllms).encode()]
    stub = StubServer(chunks=chunks, status=200 if is_stream else 400, content_type=content_type, engine=engine)
    reply = request(stub, StubChecker(), CHAT, READ)
    assert reply.status == 400
    assert reply.json()["error"]["type"] == "BadReadout"


@pytest.mark.parametrize("cut", [None, 3])
def test_a_stream_that_begins_with_an_error_is_never_opened(cut: int | None) -> None:
    text = _sse({"error": {"message": "busy", "type": "ServiceUnavailableError", "param": None, "code": 503}})
    chunks = [text] if cut is None else [text[:cut], text[cut:]]
    reply = request(StubServer(chunks=chunks, content_type=STREAM), StubChecker(), CHAT, STEERED)
    assert reply.status == 503
    assert reply.json()["error"]["message"] == "busy"


def test_an_error_later_in_a_stream_stays_in_the_stream() -> None:
    text = _sse({"id": "chatcmpl-x", "choices": []}, {"error": {"message": "gone", "code": 500}})
    reply = request(StubServer(chunks=[text], content_type=STREAM), StubChecker(), CHAT, STEERED)
    assert (reply.status, reply.body) == (200, text)


def test_a_stream_without_readouts_is_passed_on_unchanged() -> None:
    text = _sse({"id": "chatcmpl-x", "choices": [{"index": 0, "finish_reason": "stop"}]})
    reply = request(StubServer(chunks=[text], content_type=STREAM, engine=_filled), StubChecker(), CHAT, STEERED)
    assert reply.body == text


@given(data=st.data())
def test_a_streams_choices_get_their_trace_once_and_their_readout_last_wherever_the_bytes_are_cut(
    data: st.DataObject,
) -> None:
    chunks = [
        {"id": "chatcmpl-x", "choices": [{"index": index, "delta": {"content": "ü\n"}, "finish_reason": reason}]}
        for reason in (None, "stop")
        for index in (0, 1)
    ]
    usage = {"id": "chatcmpl-x", "choices": [], "usage": {"total_tokens": 7}}
    text = _sse(*chunks, usage)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(text) - 1), max_size=8)))
    parts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    stub = StubServer(chunks=parts, content_type=STREAM, engine=_filled)
    objects = _objects(request(stub, StubChecker(), CHAT, {**READ, "n": 2, "stream": True}).body)
    assert objects[-1] == usage
    choices = [choice for one in objects[:-1] for choice in one["choices"]]
    added = [(choice.pop("trace", None), choice.pop("readout", None)) for choice in choices]
    assert choices == [choice for one in chunks for choice in one["choices"]]
    values = {"kind": {"start": 0, "values": [0.5, 1.5, 2.5]}}
    closing = [(None, {"num_tokens": count, "trace": values}) for count in (3, 4)]
    assert added == [(values, None), (values, None), *closing]


def test_a_live_trace_tells_each_value_once_and_none_beyond_the_samples_end() -> None:
    def engine(exchange: Exchange) -> None:
        sample = exchange.sample("chatcmpl-x", 0)
        sample.trace, sample.span_length, sample.told = {"kind": [1.0, 2.0, 3.0, 4.0]}, 3, 1

    text = _sse(*({"id": "chatcmpl-x", "choices": [{"index": 0, "finish_reason": None}]} for _ in range(2)))
    stub = StubServer(chunks=[text], content_type=STREAM, engine=engine)
    first, second = _objects(request(stub, StubChecker(), CHAT, READ).body)
    assert first["choices"][0]["trace"] == {"kind": {"start": 1, "values": [2.0, 3.0]}}
    assert "trace" not in second["choices"][0]


def test_a_streamed_response_carries_its_trace_in_events_and_its_readout_in_the_closing_one() -> None:
    def engine(exchange: Exchange) -> None:
        sample = exchange.sample("resp-x_0", 0)
        sample.trace, sample.span_length, sample.readout = {"kind": [1.0]}, 1, {"num_tokens": 1}

    events = [("response.output_text.delta", {"delta": "a"}), ("response.completed", {"response": {"id": "resp-x"}})]
    text = "".join(f"event: {kind}\ndata: {json.dumps({'type': kind, **more})}\n\n" for kind, more in events)
    stub = StubServer(chunks=[text.encode()], content_type=STREAM, engine=engine)
    body = request(stub, StubChecker(), RESPONSES, READ).body.decode()
    delta, completed = (event.split("\n") for event in body.rstrip("\n").split("\n\n"))
    assert [delta[0], completed[0]] == [f"event: {kind}" for kind, _ in events]
    assert json.loads(delta[1].removeprefix("data: "))["trace"] == {"kind": {"start": 0, "values": [1.0]}}
    whole = {"num_tokens": 1, "trace": {"kind": {"start": 0, "values": [1.0]}}}
    assert json.loads(completed[1].removeprefix("data: "))["response"]["readout"] == whole


def test_aliases_are_listed_as_children_of_the_base_model() -> None:
    card = {"id": BASE_MODEL, "object": "model", "root": "/models/base", "parent": None}
    stub = StubServer(chunks=[json.dumps({"object": "list", "data": [card]}).encode()])
    reply = request(stub, StubChecker(served_aliases={"base-kind": KIND}), "/v1/models", method="GET")
    assert reply.json()["data"] == [card, {**card, "id": "base-kind", "parent": BASE_MODEL}]


@given(st.lists(st.binary(max_size=6)), st.binary(max_size=4))
def test_events_are_cut_where_empty_lines_are_and_no_byte_is_lost(chunks: list[bytes], tail: bytes) -> None:
    chunks = [chunk.replace(b"\x00", b"\n") for chunk in [*chunks, tail]]
    splitter = EventSplitter()
    events = [event for chunk in chunks for event in splitter.feed(chunk)]
    rest = splitter.rest()
    assert b"".join([*events, rest]) == b"".join(chunks)
    assert all(event.endswith(b"\n\n") and b"\n\n" not in event[:-2] for event in events)
    assert b"\n\n" not in rest


def test_a_mean_of_no_token_is_null_and_vectors_are_little_endian_float32() -> None:
    rows = np.array([[1.0, -2.0], [0.5, 0.25]], np.float32)
    answer = {
        "num_tokens": 0,
        "layers": [1, 2],
        "pooled": rows.tobytes(),
        "max": [],
        "stopped": [],
        "flags": [],
        "trace": [],
        "rows": [],
        "trace_error": "no column is free",
        "proof": "parity",
        "projections": [["kind", 1, float("nan")], ["kind", 2, np.float32(0.1).item()]],
    }
    assert readout_json(answer, "mean") == {
        "num_tokens": 0,
        "projections": {"kind": {"1": None, "2": 0.100000001}},
        "proof": "parity",
        "mean": {"1": "AACAPwAAAMA=", "2": "AAAAPwAAgD4="},
        "trace": {"error": "no column is free"},
    }
    assert "held" not in readout_json(answer | {"held": None}, "mean")
    assert readout_json(answer | {"held": [3, False, None]}, "mean")["held"] == [3, False, None]
    assert readout_json({"error": "preempted"}, "mean") == {"error": "preempted"}


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_rows_travel_as_bytes_and_come_back_in_their_shape(num_tokens: int) -> None:
    rows_LND = np.random.default_rng(0).standard_normal((2, num_tokens, 4)).astype(np.float32)
    answer: dict[str, Any] = {
        "num_tokens": num_tokens,
        "layers": [1, 2],
        "pooled": None,
        "max": [],
        "stopped": [],
        "flags": [],
        "trace": [],
        "rows": [[layer, 4, rows_ND.tobytes()] for layer, rows_ND in zip((1, 2), rows_LND, strict=True)],
        "trace_error": None,
        "proof": "parity",
        "projections": [],
    }
    told = readout_json(answer, "rows")
    assert set(told) == {"num_tokens", "projections", "proof", "rows"}
    body = {"id": "", "model": "", "choices": [{"index": 0, "text": "", "readout": json.loads(json.dumps(told))}]}
    (choice,) = reply_of(body).choices
    assert choice.readout is not None
    assert set(choice.readout.rows) == {1, 2}
    for got, expected in zip(choice.readout.rows.values(), rows_LND, strict=True):
        assert got.dtype == np.float32
        assert got.shape == ((3, 4) if num_tokens else (0, 0))
        np.testing.assert_array_equal(got.ravel(), expected.ravel())


def _kept(kept: KeptReadouts, reply_id: str, key: str | None = None) -> list[Any]:
    return [one["readout"]["num_tokens"] for one in json.loads(kept.load(reply_id, key))["readouts"]]


def test_the_readouts_of_whole_and_streamed_replies_are_kept_by_the_replys_id(tmp_path: Path) -> None:
    """The same for both, and only for the API key of the request."""
    kept = KeptReadouts(tmp_path, 1, 60.0)
    choices = [{"index": index, "finish_reason": "stop"} for index in range(2)]
    whole = json.dumps({"id": "chatcmpl-x", "choices": choices}).encode()
    streamed = _sse(*({"id": "chatcmpl-x", "choices": [choice]} for choice in choices))
    told = []
    for chunk, kind in ((whole, "application/json"), (streamed, STREAM)):
        stub = StubServer(chunks=[chunk], content_type=kind, engine=_filled)
        request(stub, StubChecker(), CHAT, {**READ, "n": 2}, key="mine", kept=kept)
        told.append(kept.load("chatcmpl-x", "mine"))
        assert _kept(kept, "chatcmpl-x", "mine") == [3, 4]
        for key in (None, "other"):
            with pytest.raises(ReadoutNotFound, match="chatcmpl-x"):
                kept.load("chatcmpl-x", key)
    assert told[0] == told[1]


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("path", [RESPONSES, MESSAGES])
def test_replies_of_one_sample_are_kept_too(tmp_path: Path, path: str, is_stream: bool) -> None:
    def engine(exchange: Exchange) -> None:
        exchange.sample("one", 0).readout = {"num_tokens": 5}

    kept = KeptReadouts(tmp_path, 1, 60.0)
    events = {
        RESPONSES: [{"type": "response.completed", "response": {"id": "reply"}}],
        MESSAGES: [{"type": "message_start", "message": {"id": "reply"}}, {"type": "message_delta"}],
    }
    chunk = _sse(*events[path]) if is_stream else b'{"id": "reply"}'
    stub = StubServer(chunks=[chunk], content_type=STREAM if is_stream else "application/json", engine=engine)
    request(stub, StubChecker(), path, READ, kept=kept)
    assert _kept(kept, "reply") == [5]


def test_only_what_reads_is_kept(tmp_path: Path) -> None:
    request(StubServer(chunks=[b'{"id": "x", "choices": []}']), StubChecker(), CHAT, STEERED, kept=_full(tmp_path))
    assert list(tmp_path.iterdir()) == []


def _full(folder: Path) -> KeptReadouts:
    return KeptReadouts(folder, 1, 60.0)


def test_a_script_of_another_origin_may_read_the_plugins_headers() -> None:
    exposed = "access-control-expose-headers"
    assert request(StubServer(), StubChecker(), CHAT, STEERED).headers[exposed] == "x-vllm-steer, ETag"
    assert exposed not in request(StubServer(), StubChecker(), CHAT, {"model": BASE_MODEL}).headers


def test_the_header_steers_a_request_without_fields() -> None:
    stub = StubServer()
    reply = request(stub, StubChecker(), CHAT, {"messages": []}, more={"x-steering": "kind:2"})
    assert reply.headers["x-vllm-steer"] == "1"
    assert stub.exchange is not None
    assert stub.exchange.whole.entries == (Steering("kind", 2.0),)
    refused = request(StubServer(), StubChecker(), CHAT, {"messages": []}, more={"x-steer": "kind:2"})
    assert (refused.status, refused.json()["error"]["type"]) == (400, "MisplacedField")
    form = {"x-steering": "kind:2", "content-type": "multipart/form-data"}
    refused = request(StubServer(), StubChecker(), "/v1/audio/transcriptions", b"x", more=form)
    assert (refused.status, refused.json()["error"]["type"]) == (400, "NotOnThisRoute")
