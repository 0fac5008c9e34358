"""The synchronous client, made from `async_client.py`."""

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
    delete_alias_call,
    delete_call,
    directions_in,
    etag_of,
    get_call,
    key_headers,
    put_alias_call,
    put_call,
    readouts_call,
    server_root,
)
from vllm_steer.client.refusals import refusal_of, translated
from vllm_steer.client.replies import (
    Piece,
    Reply,
    ServerSteering,
    StoredDirection,
    StreamEvents,
    kept_readouts,
    pieces,
    reply_of,
    server_steering,
    stored_directions,
)
from vllm_steer.directions import Direction
from vllm_steer.schema.readout import Readout, ReadoutResult
from vllm_steer.schema.steering import Steering


class SteerClient:
    """Client of one server.

    Close it, or use it as a context manager. Several threads may share it.

    Args:
        base_url: the server's address, with or without ``/v1``.
        model: name of the model or steered alias.
        api_key: the server's ``--api-key``.
        admin_key: the server's ``VLLM_STEER_ADMIN_KEY``; required to change its directions.
        timeout: longest wait for a connection and between two parts of a reply, in seconds.
        transport: httpx transport that replaces the default one.

    Every method raises the ``vllm_steer.errors`` class that the server's error names, ``ServerRefusal`` for any other
    error of the server, and ``ServerUnreachable`` if no complete reply comes.
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
        """Send a chat request and return the whole reply.

        Args:
            messages: OpenAI message objects, or the text of one user message.
            steering: entries, in addition to those of an alias. ``None`` leaves the server's default steering on; an
                empty list turns it off.
            readout: the activations to read.
            options: any other field of the request's body, such as ``max_tokens`` or ``n``.

        Raises:
            MalformedSpec: an option repeats a field that the client writes itself.
            NotConfigured: the server ignored steering or readout.
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
        """Complete one prompt or several and return the whole reply; other arguments as in ``chat``."""
        return reply_of(self._send(completion_call(self.model, prompt, steering, readout, options)).json())

    def stream_chat(
        self,
        messages: Messages,
        *,
        steering: Sequence[Steering] | None = None,
        readout: Readout | None = None,
        **options: Any,
    ) -> Iterator[Piece]:
        """Stream a chat reply piece by piece; arguments as in ``chat``. Closing the iterator ends the request."""
        return self._stream(chat_call(self.model, messages, steering, readout, options, stream=True))

    def stream_complete(
        self,
        prompt: str | Sequence[str],
        *,
        steering: Sequence[Steering] | None = None,
        readout: Readout | None = None,
        **options: Any,
    ) -> Iterator[Piece]:
        """Stream completions piece by piece; arguments as in ``complete``. Closing the iterator ends the request."""
        return self._stream(completion_call(self.model, prompt, steering, readout, options, stream=True))

    def show(self) -> ServerSteering:
        """Layers, limits, aliases and directions of the server."""
        return server_steering(self._send(Call("GET", STEERING)).json())

    def list_directions(self) -> tuple[StoredDirection, ...]:
        """The registered directions, without their vectors."""
        return stored_directions(self._send(Call("GET", DIRECTIONS)).json()["directions"])

    def get_directions(self, name: str, layer: int | None = None) -> list[Direction]:
        """Fetch the directions of one name, at every layer or at one.

        Raises:
            UnknownDirection: the name is not registered, or not at this layer.
        """
        return directions_in(self._send(get_call(name, layer)).content)

    def put_directions(
        self, name: str, directions: Sequence[Direction], *, if_match: str | None = None, only_new: bool = False
    ) -> str:
        """Register or replace the directions of one name. Requests in flight keep the vectors they started with.

        Args:
            name: the name that all ``directions`` have.
            directions: one or more, each at its own layer.
            if_match: ETag that the name must have now; for a name with one direction, that direction's content hash.
            only_new: refuse the call if the name is already registered.

        Returns:
            The new ETag of the name.

        Raises:
            MalformedSpec: there are no directions, or one has another name.
            DirectionChanged: ``if_match`` or ``only_new`` does not hold.
        """
        return etag_of(self._send(put_call(name, directions, if_match, only_new=only_new), self._admin))

    def delete_directions(self, name: str, layer: int | None = None, *, if_match: str | None = None) -> None:
        """Remove the directions of one name, at every layer or at one.

        Args:
            name: the name.
            layer: None for every layer.
            if_match: as in ``put_directions``.

        Raises:
            UnknownDirection: the name is not registered, or not at this layer.
            DirectionChanged: ``if_match`` does not hold.
        """
        self._send(delete_call(name, layer, if_match), self._admin)

    def get_readouts(self, reply_id: str) -> list[ReadoutResult]:
        """The readouts of a finished reply, by its choices; for replies that came through a client that drops them.

        Raises:
            ReadoutNotFound: nothing is kept under this id for this API key.
            ReadoutUnavailable: a readout failed.
        """
        return kept_readouts(self._send(readouts_call(reply_id)).json())

    def put_alias(self, alias: str, steering: Sequence[Steering]) -> None:
        """Make a model name stand for a steering, or give an alias another one.

        Raises:
            BadAlias: the model or an alias of the server's settings has this name.
            SteerError: the server refuses the steering.
        """
        self._send(put_alias_call(alias, steering), self._admin)

    def delete_alias(self, alias: str) -> None:
        """Remove an alias that was put.

        Raises:
            AliasNotFound: no such alias was put.
        """
        self._send(delete_alias_call(alias), self._admin)

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
