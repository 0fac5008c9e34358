"""How the messages of refusals show values: in the words of JSON, in which most requests come."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
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
_MOST_LISTED = 20


def json_type(value: object) -> str:
    """JSON's word for the type of a value."""
    return _JSON_TYPES.get(type(value), type(value).__name__)


def shown(value: object) -> str:
    """A value for a message: JSON's ``null``, ``true`` and ``false`` in JSON's words; at most 80 characters."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return repr(value)[:80]


def listed(names: Collection[str]) -> str:
    """Names for a message, sorted: at most 20 of them, and how many there are beside these."""
    first = ", ".join(sorted(names)[:_MOST_LISTED]) or "none"
    return first if len(names) <= _MOST_LISTED else f"{first} and {len(names) - _MOST_LISTED:,} others"


def mib(num_bytes: int) -> str:
    """A size in MiB, with one decimal below ten: ``3.9 MiB``, ``1,024 MiB``."""
    size = num_bytes / (1 << 20)
    return f"{size:,.0f} MiB" if size >= 10 else f"{size:.1f} MiB"


def near(name: str, allowed: Iterable[str]) -> str:
    """For a message: `` Perhaps you mean 'x'.`` with the most similar allowed name; empty if none is similar."""
    close = get_close_matches(name, list(allowed), 1)
    return f" Perhaps you mean {close[0]!r}." if close else ""
