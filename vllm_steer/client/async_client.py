"""The asynchronous client."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
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


class AsyncSteerClient:
    """``SteerClient`` for an event loop, with the same arguments, replies and exceptions.

    Await the methods, and iterate streams with ``async for``. Use it as an asynchronous context manager, or
    ``await close()``.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        admin_key: str | None = None,
        timeout: float = 600.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.model = model
        self._admin = {} if admin_key is None else {"X-Admin-Key": admin_key}
        self._http = httpx.AsyncClient(
            base_url=server_root(base_url), headers=key_headers(api_key), timeout=timeout, transport=transport
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def chat(
        self,
        messages: Messages,
        *,
        steering: Sequence[Steering] | None = None,
        readout: Readout | None = None,
        **options: Any,
    ) -> Reply:
        """See ``SteerClient.chat``."""
        return reply_of((await self._send(chat_call(self.model, messages, steering, readout, options))).json())

    async def complete(
        self,
        prompt: str | Sequence[str],
        *,
        steering: Sequence[Steering] | None = None,
        readout: Readout | None = None,
        **options: Any,
    ) -> Reply:
        """See ``SteerClient.complete``."""
        return reply_of((await self._send(completion_call(self.model, prompt, steering, readout, options))).json())

    def stream_chat(
        self,
        messages: Messages,
        *,
        steering: Sequence[Steering] | None = None,
        readout: Readout | None = None,
        **options: Any,
    ) -> AsyncIterator[Piece]:
        """See ``SteerClient.stream_chat``."""
        return self._stream(chat_call(self.model, messages, steering, readout, options, stream=True))

    def stream_complete(
        self,
        prompt: str | Sequence[str],
        *,
        steering: Sequence[Steering] | None = None,
        readout: Readout | None = None,
        **options: Any,
    ) -> AsyncIterator[Piece]:
        """See ``SteerClient.stream_complete``."""
        return self._stream(completion_call(self.model, prompt, steering, readout, options, stream=True))

    async def show(self) -> ServerSteering:
        """See ``SteerClient.show``."""
        return server_steering((await self._send(Call("GET", STEERING))).json())

    async def list_directions(self) -> tuple[StoredDirection, ...]:
        """See ``SteerClient.list_directions``."""
        return stored_directions((await self._send(Call("GET", DIRECTIONS))).json()["directions"])

    async def get_directions(self, name: str, layer: int | None = None) -> list[Direction]:
        """See ``SteerClient.get_directions``."""
        return directions_in((await self._send(get_call(name, layer))).content)

    async def put_directions(
        self, name: str, directions: Sequence[Direction], *, if_match: str | None = None, only_new: bool = False
    ) -> str:
        """See ``SteerClient.put_directions``."""
        return etag_of(await self._send(put_call(name, directions, if_match, only_new=only_new), self._admin))

    async def delete_directions(self, name: str, layer: int | None = None, *, if_match: str | None = None) -> None:
        """See ``SteerClient.delete_directions``."""
        await self._send(delete_call(name, layer, if_match), self._admin)

    def _request(self, call: Call, headers: dict[str, str]) -> httpx.Request:
        return self._http.build_request(
            call.method,
            call.path,
            json=call.json,
            content=call.content,
            params=call.params,
            headers={**call.headers, **headers},
        )

    async def _send(self, call: Call, headers: dict[str, str] | None = None) -> httpx.Response:
        with translated(str(self._http.base_url)):
            reply = await self._http.send(self._request(call, headers or {}))
        if not reply.is_success:
            raise refusal_of(reply.status_code, reply.content)
        check_seen(call, reply)
        return reply

    async def _stream(self, call: Call) -> AsyncIterator[Piece]:
        with translated(str(self._http.base_url)):
            reply = await self._http.send(self._request(call, {}), stream=True)
            try:
                if not reply.is_success:
                    raise refusal_of(reply.status_code, await reply.aread())
                check_seen(call, reply)
                events = StreamEvents()
                async for received in reply.aiter_bytes():
                    for event in events.feed(received):
                        for piece in pieces(event):
                            yield piece
            finally:
                await reply.aclose()
