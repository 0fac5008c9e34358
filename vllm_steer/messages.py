"""How the messages of refusals show values: in the words of JSON, in which most requests come."""

from __future__ import annotations

import json
from collections.abc import Iterable
from difflib import get_close_matches

_JSON_TYPES = {
    dict: "object",
    list: "array",
    tuple: "array",
    str: "string",
    bool: "boolean",
    int: "number",
    float: "number",
    type(None): "null",
}


def json_type(value: object) -> str:
    """JSON's word for the type of a value."""
    return _JSON_TYPES.get(type(value), type(value).__name__)


def shown(value: object) -> str:
    """A value for a message: JSON's ``null``, ``true`` and ``false`` in JSON's words; at most 80 characters."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return repr(value)[:80]


def near(name: str, allowed: Iterable[str]) -> str:
    """For a message: `` Perhaps you mean 'x'.`` with the most similar allowed name; empty if none is similar."""
    close = get_close_matches(name, list(allowed), 1)
    return f" Perhaps you mean {close[0]!r}." if close else ""
