"""Lets scripts of other origins read the plugin's reply headers (CORS, Fetch standard, section 3.3.4)."""

from __future__ import annotations

from starlette.types import Message, Send

from vllm_steer.schema.wire import STEERED_HEADER

_EXPOSED = (b"access-control-expose-headers", f"{STEERED_HEADER}, ETag".encode())
_NAMES = frozenset({STEERED_HEADER.encode(), b"etag"})


class ExposingSender:
    """Sends a reply on; one with such a header says that any origin's script may read it.

    vLLM's own CORS middleware decides which origins get the reply at all.
    """

    def __init__(self, send: Send) -> None:
        self._send = send

    async def __call__(self, message: Message) -> None:
        """Take one message of the reply."""
        if message["type"] == "http.response.start" and not _NAMES.isdisjoint(
            name.lower() for name, _ in message["headers"]
        ):
            message = {**message, "headers": [*message["headers"], _EXPOSED]}
        await self._send(message)
