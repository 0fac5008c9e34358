"""The API key of a request."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import Scope


def api_key(scope: Scope) -> str | None:
    """The bearer token, as vLLM's authentication reads it."""
    scheme, _, key = Headers(scope=scope).get("Authorization", "").partition(" ")
    return key if scheme.lower() == "bearer" and key else None
