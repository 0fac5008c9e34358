"""Turns a server's errors into the exceptions that the offline API raises for the same mistakes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx

from vllm_steer import errors
from vllm_steer.errors import SteerError

_SHOWN_CHARACTERS = 300


class ServerRefusal(SteerError):
    """The server reported an error that is not one of this package's: a wrong key, an unknown model, an internal error.

    Attributes:
        status: the HTTP status; 500 for an error inside a stream that has none.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class ServerUnreachable(SteerError):
    """No complete reply: the connection failed, broke off or exceeded the timeout."""

    status = 502


@contextmanager
def translated(url: str) -> Iterator[None]:
    """Turn httpx's transport errors into ``ServerUnreachable``.

    Raises:
        ServerUnreachable: no complete reply came from ``url``.
    """
    try:
        yield
    except httpx.TransportError as error:
        raise ServerUnreachable(
            f"{url} sent no complete reply ({type(error).__name__}: {error}); check the address, and that the server "
            "runs."
        ) from error


def refusal_of(status: int, body: bytes) -> SteerError:
    """The exception for an HTTP error reply with this status and body."""
    try:
        told = json.loads(body)
    except ValueError:
        told = None
    error = told.get("error") if isinstance(told, dict) else None
    if not isinstance(error, Mapping):
        # vLLM's key check answers {"error": "Unauthorized"}; a proxy may answer HTML
        shown = str(error) if error else body[:_SHOWN_CHARACTERS].decode(errors="replace")
        return ServerRefusal(f"the server answered with status {status}: {shown}", status)
    return refusal_in_stream(error, status)


def refusal_in_stream(error: Mapping[str, Any], status: int | None = None) -> SteerError:
    """The exception for an OpenAI error object: the class of this package that ``type`` names, or ``ServerRefusal``."""
    message = str(error.get("message", error))
    kind = getattr(errors, str(error.get("type")), None)
    if isinstance(kind, type) and issubclass(kind, SteerError):
        return kind(message)
    code = error.get("code")
    return ServerRefusal(message, status or (code if isinstance(code, int) else 500))
