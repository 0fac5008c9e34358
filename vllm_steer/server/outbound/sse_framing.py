"""Server-sent events as vLLM writes them: lines that end in a newline, events that end in an empty line."""

from __future__ import annotations

import json
from typing import Any

_END = b"\n\n"
_DATA = b"data: "


class EventSplitter:
    """Splits a byte stream into whole events, however its chunks are split."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """The events that ``chunk`` completes, each with its closing empty line."""
        *events, self._rest = (self._rest + chunk).split(_END)
        return [event + _END for event in events]

    def rest(self) -> bytes:
        """The bytes of an unfinished event, which are then forgotten."""
        rest, self._rest = self._rest, b""
        return rest


def data_of(event: bytes) -> dict[str, Any] | None:
    """The JSON object of an event; None for any other data, such as the closing ``[DONE]``."""
    for line in event.split(b"\n"):
        if line.startswith(_DATA):
            try:
                data = json.loads(line[len(_DATA) :])
            except ValueError:
                return None
            return data if isinstance(data, dict) else None
    return None


def with_data(event: bytes, data: dict[str, Any]) -> bytes:
    """The same event, of the same type, with ``data`` in place of its own."""
    text = _DATA + json.dumps(data, separators=(",", ":")).encode()
    return b"\n".join(text if line.startswith(_DATA) else line for line in event.split(b"\n"))
