"""The request header ``X-Steering``, for clients that can set headers and nothing in a body."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vllm_steer.errors import MalformedSpec, MisplacedField
from vllm_steer.schema.steering_text import FORM, parse_steering
from vllm_steer.schema.wire import STEERED_HEADER, parsed_json
from vllm_steer.server.inbound.spelling import is_header_like_ours

STEERING_HEADER = "x-steering"


def steering_header(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, Any] | None:
    """The steering in a request's headers, as a wire object; None if no header has any.

    The header holds entries as text (``vllm_steer.schema.steering_text``), or JSON: a list of entries, or an object
    with ``steering`` and ``readout``.

    Args:
        headers: names, in lower case, and values, as ASGI gives them.

    Raises:
        MisplacedField: a header has a name like ``X-Steering``, but not this.
        MalformedSpec: the header comes twice, or has another form.
        SpecError: as ``Steering``.
    """
    texts = []
    for raw_name, value in headers:
        name = raw_name.decode("latin-1")
        if name == STEERING_HEADER:
            texts.append(value.decode("latin-1").strip())
        elif name != STEERED_HEADER and is_header_like_ours(name):
            raise MisplacedField(
                f"the request has the header {name!r}, which nothing reads; allowed: X-Steering. Use this name."
            )
    if not texts:
        return None
    if len(texts) > 1:
        raise MalformedSpec("the header X-Steering came twice; allowed: once, entries joined by commas. Join them.")
    text = texts[0]
    if not text.startswith(("[", "{")):
        return {"steering": [one.to_json() for one in parse_steering(text, "the header X-Steering")]}
    told = parsed_json(text, "the header X-Steering", f"{FORM}, or JSON in ASCII. Correct it")
    return told if isinstance(told, dict) else {"steering": told}
