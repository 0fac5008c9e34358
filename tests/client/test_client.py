"""The HTTP client against a transport in memory: what it sends and how it reads replies."""

from __future__ import annotations

import asyncio
import base64
import json
import math
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.client.sync_from_async import TARGET, sync_source
from tests.test_imports import run_blocked
from vllm_steer import Direction, Readout, Steering
from vllm_steer.client import AsyncSteerClient, Piece, ServerRefusal, ServerUnreachable, SteerClient
from vllm_steer.client.replies import StreamEvents
from vllm_steer.directions import load_directions
from vllm_steer.errors import (
    BadAlpha,
    DirectionChanged,
    MalformedSpec,
    NotConfigured,
    ReadoutUnavailable,
    UnknownDirection,
)

READOUT = {
    "num_tokens": 3,
    "projections": {"kind": {"12": 2.5, "8": None}},
    "proof": "experiment",
    "held": [2, True, None],
    "mean": {"12": base64.b64encode(np.array([1.5, -2.0], "<f4").tobytes()).decode()},
}
CHAT_REPLY = {
    "id": "chatcmpl-1",
    "model": "m",
    "choices": [
        {"index": 0, "message": {"content": "Hi"}, "finish_reason": "stop", "readout": READOUT},
        {"index": 1, "message": {"content": None}, "finish_reason": "length", "readout": {"error": "a gap"}},
    ],
    "usage": {"total_tokens": 9},
}
STREAM = [
    {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]},
    {"choices": [{"index": 0, "delta": {"content": "so\u2028"}, "trace": {"kind": {"start": 0, "values": [1.5]}}}]},
    {"choices": [{"index": 0, "delta": {"content": "\u0085é"}, "finish_reason": "stop", "readout": READOUT}]},
    {"choices": [], "usage": {"total_tokens": 9}},
]


class Chunks(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body that arrives a few bytes at a time, split inside characters too."""

    def __init__(self, content: bytes) -> None:
        self._parts = [content[start : start + 7] for start in range(0, len(content), 7)]

    def __iter__(self) -> Iterator[bytes]:
        yield from self._parts

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for part in self._parts:
            yield part


def sse(events: list[dict[str, Any]]) -> httpx.Response:
    lines = [json.dumps(event, ensure_ascii=False) for event in events]
    return httpx.Response(200, stream=Chunks("".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"]).encode()))


def client_of(answer: Callable[[httpx.Request], httpx.Response], **keys: str) -> SteerClient:
    return SteerClient("http://server/v1/", "m", transport=httpx.MockTransport(seen_by_the_plugin(answer)), **keys)


def seen_by_the_plugin(answer: Callable[[httpx.Request], httpx.Response]) -> Callable[..., httpx.Response]:
    def marked(request: httpx.Request) -> httpx.Response:
        reply = answer(request)
        reply.headers["X-Vllm-Steer"] = "1"
        return reply

    return marked


def answering(reply: httpx.Response, seen: list[httpx.Request] | None = None) -> Callable[..., httpx.Response]:
    def answer(request: httpx.Request) -> httpx.Response:
        if seen is not None:
            seen.append(request)
        return reply

    return answer


def test_a_chat_sends_steering_and_readout_as_the_wire_has_them_and_reads_the_reply() -> None:
    seen: list[httpx.Request] = []
    with client_of(answering(httpx.Response(200, json=CHAT_REPLY), seen), api_key="secret") as client:
        reply = client.chat("Hello", steering=[Steering("kind", 5.0)], readout=Readout([12]), n=2, max_tokens=4)
    (request,) = seen
    assert str(request.url) == "http://server/v1/chat/completions"
    assert request.headers["Authorization"] == "Bearer secret"
    assert json.loads(request.content) == {
        "model": "m",
        "messages": [{"role": "user", "content": "Hello"}],
        "steering": [Steering("kind", 5.0).to_json()],
        "readout": Readout([12]).to_json(),
        "n": 2,
        "max_tokens": 4,
    }
    first, second = reply.choices
    assert (first.text, first.finish_reason, first.readout_error) == ("Hi", "stop", None)
    assert first.readout is not None
    assert first.readout.mean[12].tolist() == [1.5, -2.0]
    assert first.readout.mean[12].dtype == np.float32
    assert (first.readout.num_tokens, first.readout.projections["kind"][12]) == (3, 2.5)
    assert math.isnan(first.readout.projections["kind"][8])
    assert first.readout.held == (2, True, None)
    assert (second.text, second.readout, second.readout_error) == ("", None, "a gap")
    assert reply.usage == {"total_tokens": 9}


@pytest.mark.parametrize(("steering", "sent"), [(None, "absent"), ([], [])])
def test_no_steering_and_unsteered_are_told_apart(steering: list[Steering] | None, sent: object) -> None:
    seen: list[httpx.Request] = []
    reply = {"id": "c", "model": "m", "choices": [{"index": 0, "text": "x", "finish_reason": "stop"}]}
    with client_of(answering(httpx.Response(200, json=reply), seen)) as client:
        client.complete(["a", "b"], steering=steering)
    body = json.loads(seen[0].content)
    assert body.get("steering", "absent") == sent
    assert body["prompt"] == ["a", "b"]


def check_pieces(pieces: list[Piece]) -> None:
    assert [piece.text for piece in pieces] == ["", "so\u2028", "\u0085é"]
    assert pieces[1].trace["kind"].start == 0
    assert pieces[1].trace["kind"].values.tolist() == [1.5]
    assert pieces[1].readout is None
    assert pieces[2].finish_reason == "stop"
    assert pieces[2].readout is not None
    assert pieces[2].readout.num_tokens == 3
    assert pieces[2].readout.proof == "experiment"


def test_a_stream_gives_text_trace_and_readout_wherever_the_bytes_are_cut() -> None:
    with client_of(answering(sse(STREAM))) as client:
        check_pieces(list(client.stream_chat("Hello", readout=Readout([12], trace=["kind"]))))


def test_the_asynchronous_client_does_the_same() -> None:
    async def use() -> None:
        def answer(request: httpx.Request) -> httpx.Response:
            if json.loads(request.content).get("stream"):
                return sse(STREAM)
            return httpx.Response(404, json={"error": {"message": "no kind", "type": "UnknownDirection"}})

        transport = httpx.MockTransport(seen_by_the_plugin(answer))
        async with AsyncSteerClient("http://server", "m", transport=transport) as client:
            check_pieces([piece async for piece in client.stream_chat("Hello")])
            with pytest.raises(UnknownDirection, match="no kind"):
                await client.chat("Hello")

    asyncio.run(use())


def test_both_clients_have_the_same_methods() -> None:
    public = [{name for name in vars(one) if not name.startswith("_")} for one in (SteerClient, AsyncSteerClient)]
    assert public[0] == public[1]


@given(st.lists(st.text(st.characters(exclude_characters="\r\n")).map(str.strip)), st.data())
def test_events_do_not_depend_on_where_the_stream_is_cut(texts: list[str], data: st.DataObject) -> None:
    stream = "".join(f": a comment\ndata: {text}\r\n\r\n" for text in texts).encode()
    cuts = sorted(data.draw(st.sets(st.integers(0, len(stream)))))
    events = StreamEvents()
    parts = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    found = [event for part in parts for event in events.feed(part)]
    assert [event.strip() for event in found] == [text.strip() for text in texts]


@pytest.mark.parametrize(
    ("status", "body", "kind", "told"),
    [
        (400, {"error": {"message": "alpha is 1e9", "type": "BadAlpha", "code": 400}}, BadAlpha, "alpha is 1e9"),
        (412, {"error": {"message": "changed", "type": "DirectionChanged", "code": 412}}, DirectionChanged, "changed"),
        (404, {"error": {"message": "no model x", "type": "NotFoundError"}}, ServerRefusal, "no model x"),
        (401, {"error": "Unauthorized"}, ServerRefusal, "401: Unauthorized"),
        (500, {"error": {"message": "m", "type": "annotations"}}, ServerRefusal, "m"),
        (502, b"<html>gone</html>", ServerRefusal, "502: <html>gone"),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_a_refusal_is_raised_as_the_class_it_names(
    status: int, body: Any, kind: type[Exception], told: str, streamed: bool
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    with client_of(answering(httpx.Response(status, content=content))) as client:
        with pytest.raises(kind, match=told) as caught:
            list(client.stream_complete("x")) if streamed else client.complete("x")
        assert type(caught.value) is kind
        assert getattr(caught.value, "status", None) == status


def test_an_error_inside_a_stream_is_raised_after_what_came_before() -> None:
    broken = [STREAM[1], {"error": {"message": "the engine died", "type": "InternalServerError", "code": 500}}]
    with client_of(answering(sse(broken))) as client:
        stream = client.stream_chat("Hello")
        assert next(stream).text == "so\u2028"
        with pytest.raises(ServerRefusal, match="the engine died"):
            next(stream)


def test_no_server_is_one_clear_error() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    with client_of(answer) as client, pytest.raises(ServerUnreachable, match=r"http://server.*ConnectError"):
        client.show()


def test_directions_travel_as_files_with_conditions_and_the_admin_key(tmp_path: Any) -> None:
    seen: list[httpx.Request] = []
    kind = Direction("a/b", 3, np.array([0.6, 0.8]))

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        if request.method == "GET":
            return httpx.Response(200, content=seen[0].content)
        return httpx.Response(200, json={}, headers={"ETag": f'"{kind.content_hash}"'})

    with client_of(answer, admin_key="admin") as client:
        assert client.put_directions("a/b", [kind], if_match="old") == kind.content_hash
        (back,) = client.get_directions("a/b", 3)
        client.delete_directions("a/b", if_match=kind.content_hash)
    put, get, delete = seen
    (tmp_path / "sent.safetensors").write_bytes(put.content)
    assert load_directions(tmp_path / "sent.safetensors")[0].content_hash == back.content_hash == kind.content_hash
    assert put.url.raw_path == b"/v1/steering/directions/a%2Fb"
    assert get.url.raw_path == b"/v1/steering/directions/a%2Fb?layer=3"
    assert put.headers["If-Match"] == '"old"'
    assert delete.headers["If-Match"] == f'"{kind.content_hash}"'
    assert [request.headers.get("X-Admin-Key") for request in seen] == ["admin", None, "admin"]


def test_aliases_are_made_and_readouts_fetched_by_the_replys_id() -> None:
    seen: list[httpx.Request] = []
    kept = [
        {"index": 1, "readout": {"num_tokens": 2, "projections": {"kind": {"3": 1.5}}}},
        {"index": 0, "readout": {"num_tokens": 1, "projections": {"kind": {"3": None}}}},
    ]

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json={"id": "chat/1", "readouts": kept})

    with client_of(answer, admin_key="admin") as client:
        client.put_alias("a/b", [Steering("kind", 2.0, span="response")])
        client.delete_alias("a/b")
        first, second = client.get_readouts("chat/1")
        kept[0]["readout"] = {"error": "no column is free"}
        with pytest.raises(ReadoutUnavailable, match="no column is free") as failed:
            client.get_readouts("chat/1")
    assert (first.num_tokens, second.projections["kind"][3]) == (1, 1.5)
    assert failed.value.reasons == {(0, 1): "no column is free"}
    assert [one.num_tokens for one in failed.value.results if one is not None] == [1]
    put, delete, get, _ = seen
    assert json.loads(put.content) == {"steering": [Steering("kind", 2.0, span="response").to_json()]}
    for request, path, key in (
        (put, "aliases/a%2Fb", "admin"),
        (delete, "aliases/a%2Fb", "admin"),
        (get, "readouts/chat%2F1", None),
    ):
        assert request.url.raw_path == f"/v1/steering/{path}".encode()
        assert request.headers.get("X-Admin-Key") == key


def test_a_direction_of_another_name_and_an_option_twice_are_refused_before_anything_is_sent() -> None:
    with client_of(pytest.fail) as client:
        with pytest.raises(MalformedSpec, match="put under 'kind'"):
            client.put_directions("kind", [Direction("cold", 1, np.ones(2))])
        with pytest.raises(MalformedSpec, match="'model'"):
            client.chat("x", model="other")


def test_the_client_needs_no_engine() -> None:
    run_blocked("import vllm_steer.client", ("vllm", "torch", "ray", "transformers"))


@pytest.mark.parametrize("asked", [{"steering": [Steering("kind", 2.0)]}, {"readout": Readout([12])}], ids=str)
def test_an_answer_of_a_server_without_the_plugin_is_not_taken_for_a_steered_one(asked: dict[str, Any]) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        return sse(STREAM) if b'"stream"' in request.content else httpx.Response(200, json=CHAT_REPLY)

    stock = httpx.MockTransport(answer)
    with SteerClient("http://server", "m", transport=stock) as client:
        assert client.chat("Hello").choices
        assert client.chat("Hello", steering=[]).choices
        with pytest.raises(NotConfigured, match="without looking at"):
            client.chat("Hello", **asked)
        with pytest.raises(NotConfigured, match="without looking at"):
            list(client.stream_chat("Hello", **asked))

    async def ask() -> None:
        async with AsyncSteerClient("http://server", "m", transport=stock) as client:
            with pytest.raises(NotConfigured, match="without looking at"):
                await client.chat("Hello", **asked)
            with pytest.raises(NotConfigured, match="without looking at"):
                [piece async for piece in client.stream_chat("Hello", **asked)]

    asyncio.run(ask())


def test_the_synchronous_client_is_that_of_the_asynchronous_source() -> None:
    assert sync_source() == TARGET.read_text(encoding="utf-8"), "run `python -m tests.client.sync_from_async`"
