"""A refusal as an HTTP reply, in the shape of OpenAI's errors, or of the route's own where that is another."""

from __future__ import annotations

from typing import Any

from vllm_steer.errors import SteerError


def error_body(error: SteerError, path: str = "") -> dict[str, Any]:
    """The body of a refusal.

    ``{"error": {"message", "type": class of the error, "param", "code": its name for programs}}``, beside which stands
    what clients of Anthropic's and Cohere's routes look for.
    """
    body: dict[str, Any] = {
        "error": {"message": str(error), "type": type(error).__name__, "param": None, "code": error.code}
    }
    if path.startswith("/v1/messages"):
        body["type"] = "error"
        body["error"]["details"] = {"error_code": error.code}  # what Anthropic's own package calls the code
    elif path.startswith("/cohere/"):
        body["message"] = str(error)
    return body
