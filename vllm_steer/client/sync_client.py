"""The client for ordinary code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Self

import httpx

from vllm_steer.client.calls import (
    DIRECTIONS,
    STEERING,
    Call,
    Messages,
    chat_call,
    check_seen,
    completion_call,
    delete_call,
    directions_in,
    etag_of,
    get_call,
    key_headers,
    put_call,
    server_root,
)
from vllm_steer.client.refusals import refusal_of, translated
from vllm_steer.client.replies import (
    Piece,
    Reply,
    ServerSteering,
    StoredDirection,
    StreamEvents,
    pieces,
    reply_of,
    server_steering,
    stored_directions,
)
from vllm_steer.directions import Direction
from vllm_steer.schema import Readout, Steering


class SteerClient:
    """Calls one server; close it, or use it as a context manager. May be used from several threads.

    Args:
        base_url: the server's address, with or without ``/v1``.
        model: the model or steered alias to ask.
        api_key: what the server was given as ``--api-key``.
        admin_key: what it was given as ``VLLM_STEER_ADMIN_KEY``; needed to change its directions.
        timeout: seconds for connecting and for each pause in an answer.
        transport: what carries the requests, in place of httpx's own.

    Every method raises the ``vllm_steer.errors`` class that the server's refusal names, ``ServerRefusal`` for any other
    error of the server, ``ServerUnreachable`` without an answer.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        admin_key: str | None = None,
        timeout: float = 600.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.model = model
        self._admin = {} if admin_key is None else {"X-Admin-Key": admin_key}
        self._http = httpx.Client(
            base_url=server_root(base_url), headers=key_headers(api_key), timeout=timeout, transport=transport
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def chat(
        self,
        messages: Messages,
        *,
        steering: Sequence[Steering] | None = None,
        readout: Readout | None = None,
        **options: Any,
    ) -> Reply:
        """A chat reply.

        Args:
            messages: OpenAI's message objects, or the text of one user message.
            steering: ``None`` leaves it to the server's default or the alias; an empty list asks for none.
            readout: what to read.
            options: any other field of the request's body, such as ``max_tokens`` or ``n``.
        """
        return reply_of(self._send(chat_call(self.model, messages, steering, readout, options)).json())

    def complete(
        self,
        prompt: str | Sequence[str],
        *,
        steering: Sequence[Steering] | None = None,
        readout: Readout | None = None,
        **options: Any,
    ) -> Reply:
        """Completions of one prompt or several; arguments as in ``chat``."""
        return reply_of(self._send(completion_call(self.model, prompt, steering, readout, options)).json())

    def stream_chat(
        self,
        messages: Messages,
        *,
        steering: Sequence[Steering] | None = None,
        readout: Readout | None = None,
        **options: Any,
    ) -> Iterator[Piece]:
        """A chat reply piece by piece; arguments as in ``chat``. Closing the iterator ends the request."""
        return self._stream(chat_call(self.model, messages, steering, readout, options, stream=True))

    def stream_complete(
        self,
        prompt: str | Sequence[str],
        *,
        steering: Sequence[Steering] | None = None,
        readout: Readout | None = None,
        **options: Any,
    ) -> Iterator[Piece]:
        """Completions piece by piece; arguments as in ``chat``."""
        return self._stream(completion_call(self.model, prompt, steering, readout, options, stream=True))

    def show(self) -> ServerSteering:
        """Layers, limits, aliases and directions of the server."""
        return server_steering(self._send(Call("GET", STEERING)).json())

    def list_directions(self) -> tuple[StoredDirection, ...]:
        """What is registered, without the vectors."""
        return stored_directions(self._send(Call("GET", DIRECTIONS)).json()["directions"])

    def get_directions(self, name: str, layer: int | None = None) -> list[Direction]:
        """The directions of one name, at every layer or at one.

        Raises:
            UnknownDirection: none has the name.
        """
        return directions_in(self._send(get_call(name, layer)).content)

    def put_directions(
        self, name: str, directions: Sequence[Direction], *, if_match: str | None = None, only_new: bool = False
    ) -> str:
        """Register directions of one name, or replace what they were; requests in flight keep what they started with.

        Args:
            if_match: ETag that the name must have: the content hash of its direction, where it has one.
            only_new: refuse where the name is registered already.

        Returns:
            The name's new ETag.

        Raises:
            DirectionChanged: ``if_match`` or ``only_new`` did not hold.
        """
        return etag_of(self._send(put_call(name, directions, if_match, only_new=only_new), self._admin))

    def delete_directions(self, name: str, layer: int | None = None, *, if_match: str | None = None) -> None:
        """Remove the directions of one name, at every layer or at one; ``if_match`` as in ``put_directions``."""
        self._send(delete_call(name, layer, if_match), self._admin)

    def _request(self, call: Call, headers: dict[str, str]) -> httpx.Request:
        return self._http.build_request(
            call.method,
            call.path,
            json=call.json,
            content=call.content,
            params=call.params,
            headers={**call.headers, **headers},
        )

    def _send(self, call: Call, headers: dict[str, str] | None = None) -> httpx.Response:
        with translated(str(self._http.base_url)):
            reply = self._http.send(self._request(call, headers or {}))
        if not reply.is_success:
            raise refusal_of(reply.status_code, reply.content)
        check_seen(call, reply)
        return reply

    def _stream(self, call: Call) -> Iterator[Piece]:
        with translated(str(self._http.base_url)):
            reply = self._http.send(self._request(call, {}), stream=True)
            try:
                if not reply.is_success:
                    raise refusal_of(reply.status_code, reply.read())
                check_seen(call, reply)
                events = StreamEvents()
                for received in reply.iter_bytes():
                    for event in events.feed(received):
                        yield from pieces(event)
            finally:
                reply.close()
