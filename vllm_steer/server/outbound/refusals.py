"""Refusals as HTTP error bodies, in OpenAI's format, with the fields of other formats where a route has one."""

from __future__ import annotations

from typing import Any

from vllm_steer.errors import SteerError


def error_body(error: SteerError, path: str = "") -> dict[str, Any]:
    """The body of a refusal.

    ``{"error": {"message", "type": class of the error, "param", "code": its name for programs}}``, plus the fields that
    clients of Anthropic's and Cohere's routes read.
    """
    body: dict[str, Any] = {
        "error": {"message": str(error), "type": type(error).__name__, "param": error.param, "code": error.code}
    }
    if path.startswith("/v1/messages"):
        body["type"] = "error"
        body["error"]["details"] = {"error_code": error.code}  # the name of the code in Anthropic's own package
    elif path.startswith("/cohere/"):
        body["message"] = str(error)
    return body
