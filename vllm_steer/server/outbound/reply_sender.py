"""The ``send`` side of the middleware. It holds vLLM's messages back only until the kind of reply is known."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Send
from vllm.exceptions import VLLMClientError

from vllm_steer.engine.front.http_exchange import Exchange
from vllm_steer.errors import NotOnThisRoute, SteerError
from vllm_steer.schema.wire import REPLY_VERSION, STEERED_HEADER
from vllm_steer.server.outbound.readouts_in_replies import complete_event, complete_reply
from vllm_steer.server.outbound.refusals import error_body
from vllm_steer.server.outbound.sse_framing import EventSplitter, data_of, with_data

_START, _BODY = "http.response.start", "http.response.body"
_OK, _NOT_FOUND = 200, 404
Keep = Callable[[Exchange], Awaitable[None]]


class WholeSender:
    """Collects a reply, changes its JSON object and sends it on in one piece.

    Args:
        send: the ``send`` of the request.
        change: changes the object in place. A body that is not a JSON object stays as it is. If ``change`` raises
            ``SteerError``, the client gets this refusal.
        status: the only HTTP status whose replies are changed.
        before_sending: awaited when a reply has been changed, before it is sent.
    """

    def __init__(
        self,
        send: Send,
        change: Callable[[dict[str, Any]], None],
        status: int = _OK,
        before_sending: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._send = send
        self._change = change
        self._status = status
        self._before_sending = before_sending
        self._start: Message | None = None
        self._chunks: list[bytes] = []

    async def __call__(self, message: Message) -> None:
        """Take one message of vLLM's reply."""
        if message["type"] == _START and message["status"] == self._status:
            self._start = message
        elif message["type"] == _BODY and self._start is not None:
            self._chunks.append(message.get("body", b""))
            if not message.get("more_body", False):
                await self._finish(self._start, b"".join(self._chunks))
        else:
            await self._send(message)

    async def _finish(self, start: Message, body: bytes) -> None:
        try:
            reply = json.loads(body)
        except ValueError:
            reply = None
        if isinstance(reply, dict):
            try:
                self._change(reply)
            except SteerError as error:
                await _send_refusal(self._send, error, error_body(error))
                return
            body = json.dumps(reply, separators=(",", ":")).encode()
            if self._before_sending is not None:
                await self._before_sending()
        await _send_whole(self._send, start, body)


class AliasListingSender(WholeSender):
    """Adds the steered aliases to the error message for an unknown model."""

    def __init__(self, send: Send, aliases: Iterable[str], model: str) -> None:
        listed = ", ".join(aliases)

        def list_them(reply: dict[str, Any]) -> None:
            error = reply.get("error", reply)  # Cohere's errors have the message at the top
            if isinstance(error, dict) and isinstance(error.get("message"), str) and model in error["message"]:
                error["message"] += f" Steered aliases of this server: {listed}."

        super().__init__(send, list_them, status=_NOT_FOUND)


class StreamSender:
    """Sends an event stream on, with readouts and traces added to its events.

    The stream starts once an engine request has been admitted. If it ends or reports an error before that, the client
    gets an HTTP error instead of a stream: the request was refused for a reason that only the engine could know.
    """

    def __init__(self, send: Send, path: str, exchange: Exchange, keep: Keep, start: Message) -> None:
        self._send = send
        self._path = path
        self._exchange = exchange
        self._keep = keep
        self._reads = exchange.whole.readout is not None
        self._start: Message | None = start
        self._events = EventSplitter()
        self._held: list[bytes] = []
        self._is_refused = False

    async def __call__(self, message: Message) -> None:
        """Take one message of vLLM's reply."""
        if message["type"] != _BODY:
            await self._send(message)
        elif not self._is_refused:
            await self._chunk(message.get("body", b""), message.get("more_body", False))

    async def _chunk(self, chunk: bytes, more: bool) -> None:
        events = self._events.feed(chunk)
        if not more:
            events.append(self._events.rest())
        if self._start is not None:
            self._held += events
            events = self._held
            error = _first_error(events[:1] if self._exchange.is_applied else events)
            if error is not None:
                self._is_refused = True
                await _send_error(self._send, self._exchange, error, self._path)
                return
            if not self._exchange.is_applied:
                if not more:
                    self._is_refused = True
                    refusal = self._exchange.refusal or _unsteered(self._path)
                    await _send_refusal(self._send, refusal, error_body(refusal, self._path))
                return
            if not events:
                return
            await self._send(_marked(self._start))
            self._start = None
        closed = len(self._exchange.closed)
        body = b"".join(map(self._completed, events))
        if len(self._exchange.closed) > closed:
            await self._keep(self._exchange)
        await self._send({"type": _BODY, "body": body, "more_body": more})

    async def fail(self, error: RuntimeError) -> bool:
        """Answer an error that ended the stream before it started; False if it cannot be answered here.

        vLLM's handlers could not answer the original error, ``error.__cause__``, because for vLLM the stream had begun.
        """
        if self._is_refused:
            return True  # the client already has the refusal
        if self._start is None:
            return False
        cause = error.__cause__
        if self._exchange.refusal is None and not isinstance(cause, ValueError | VLLMClientError):
            return False
        told = {"error": {"message": str(cause), "type": "BadRequestError", "param": None, "code": 400}}
        self._is_refused = True
        await _send_error(self._send, self._exchange, told, self._path)
        return True

    def _completed(self, event: bytes) -> bytes:
        refusal = self._exchange.refusal
        if not self._reads and refusal is None:
            return event
        data = data_of(event)
        if data is None:
            return event
        if refusal is not None and isinstance(data.get("error"), dict):
            return with_data(event, error_body(refusal, self._path))
        return with_data(event, data) if self._reads and complete_event(self._path, data, self._exchange) else event


class ReplySender:
    """Sends on the reply to a request that uses the plugin: whole replies, streams and errors.

    A successful reply gets ``STEERED_HEADER``. If no engine request was steered or read, the client gets an error
    instead.

    Args:
        send: the ``send`` of the request.
        path: the route.
        exchange: the request and what is known of its reply.
        keep: keeps the readouts of the reply; awaited before the last of them is sent.
    """

    def __init__(self, send: Send, path: str, exchange: Exchange, keep: Keep) -> None:
        self._send = send
        self._path = path
        self._exchange = exchange
        self._keep = keep
        self._sender: Send = send

    async def __call__(self, message: Message) -> None:
        """Take one message of vLLM's reply."""
        if message["type"] == _START:
            self._sender = self._sender_for(message)
            if isinstance(self._sender, StreamSender):
                return
            if self._exchange.is_applied and message["status"] == _OK:
                message = _marked(message)
        await self._sender(message)

    def _sender_for(self, start: Message) -> Send:
        exchange = self._exchange
        if Headers(raw=start["headers"]).get("content-type", "").startswith("text/event-stream"):
            return StreamSender(self._send, self._path, exchange, self._keep, start)
        if exchange.refusal is not None:
            return _RefusalSender(self._send, exchange.refusal, self._path)
        if start["status"] == _OK and not exchange.is_applied:
            # The reply to a background request comes before anything is generated.
            if exchange.is_background:
                return self._send
            return _RefusalSender(self._send, _unsteered(self._path), self._path)
        if exchange.whole.readout is None:
            return self._send
        return WholeSender(
            self._send,
            lambda reply: complete_reply(self._path, reply, exchange),
            before_sending=partial(self._keep, exchange),
        )

    async def fail(self, error: RuntimeError) -> bool:
        """Answer an error that ended the reply before its first byte was sent; False if it cannot be answered."""
        return isinstance(self._sender, StreamSender) and await self._sender.fail(error)


class _RefusalSender:
    """Sends a refusal of the plugin in place of vLLM's reply."""

    def __init__(self, send: Send, refusal: SteerError, path: str) -> None:
        self._send = send
        self._refusal = refusal
        self._path = path

    async def __call__(self, message: Message) -> None:
        if message["type"] == _BODY and not message.get("more_body", False):
            await _send_refusal(self._send, self._refusal, error_body(self._refusal, self._path))


def _unsteered(path: str) -> NotOnThisRoute:
    return NotOnThisRoute(
        f"{path} was answered without any engine request that could be steered or read; allowed: routes and models "
        "that generate. Leave steering, readout and alias out."
    )


def _marked(start: Message) -> Message:
    """Add the header that tells the client that its request was steered or read."""
    mark = (STEERED_HEADER.encode(), str(REPLY_VERSION).encode())
    return {**start, "headers": [*start["headers"], mark]}


def _first_error(events: Iterable[bytes]) -> Mapping[str, Any] | None:
    """The data of the first event that reports an error; None if there is none."""
    for event in events:
        data = data_of(event)
        if data is not None and isinstance(data.get("error"), dict):
            return data
    return None


async def _send_error(send: Send, exchange: Exchange, error: Mapping[str, Any], path: str) -> None:
    """Send, as a whole reply, the error with which a stream would have begun."""
    if exchange.refusal is not None:
        await _send_refusal(send, exchange.refusal, error_body(exchange.refusal, path))
        return
    code = error["error"].get("code")
    if not isinstance(code, int) or not 400 <= code < 600:  # Anthropic's errors have none
        code = 400 if str(error["error"].get("type")).startswith("BadRequest") else 500
    await _send_json(send, code, error)


async def _send_refusal(send: Send, refusal: SteerError, body: Mapping[str, Any]) -> None:
    await _send_json(send, refusal.status, body)


async def _send_json(send: Send, status: int, body: Mapping[str, Any]) -> None:
    start = {"type": _START, "status": status, "headers": [(b"content-type", b"application/json")]}
    await _send_whole(send, start, json.dumps(body).encode())


async def _send_whole(send: Send, start: Message, body: bytes) -> None:
    headers = MutableHeaders(raw=list(start["headers"]))
    headers["content-length"] = str(len(body))
    await send({**start, "headers": headers.raw})
    await send({"type": _BODY, "body": body, "more_body": False})
