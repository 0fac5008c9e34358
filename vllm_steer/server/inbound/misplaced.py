"""Finds misplaced and misspelt steering and readouts, which vLLM would silently ignore."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vllm_steer.errors import MisplacedField
from vllm_steer.schema.wire import WIRE_KEY
from vllm_steer.server.inbound.spelling import is_like_ours

FIELDS = ("steering", "readout")
# Objects into which clients pack fields that belong at the top of a body.
_CONTAINERS = frozenset(
    {
        *("extra_body", "extra_args", "extra_params", "extra_query", "extra_headers", "additional_params"),
        *("additional_config", "sampling_params", "model_kwargs", "generation_config", "generation_kwargs"),
        *("parameters", "options", "kwargs"),
    }
)


def misplaced(fields: Mapping[str, Any], extra: tuple[str, ...], query: Mapping[str, str]) -> str | None:
    """Describe the first place in a request with misplaced steering or a misplaced readout; None if there is none.

    Args:
        fields: the body.
        extra: path of keys to the body's ``extra_args``, where ``WIRE_KEY`` is right; empty if the route has none.
        query: the parameters of the URL.
    """
    return next(iter([*_in_body(fields), *_in_extra(fields, extra), *_in_query(query)]), None)


def check_places(fields: Mapping[str, Any], extra: tuple[str, ...], query: Mapping[str, str]) -> None:
    """Refuse a request in which ``misplaced`` finds something; the arguments are the same.

    Raises:
        MisplacedField: the message names the place and the right spelling.
    """
    place = misplaced(fields, extra, query)
    if place is not None:
        also = f", or {WIRE_KEY!r} in {'.'.join(extra)}" if extra else ""
        raise MisplacedField(
            f"the request has {place}, which nothing reads; allowed: 'steering' and 'readout' at the top of the body"
            f"{also}. Move it there."
        )


# Objects whose keys are the user's own: schemas of tools and answers, and arguments of tool calls.
_USERS_NAMES = frozenset({"properties", "schema", "parameters", "input_schema", "arguments", "$defs", "definitions"})


def _deeper(value: Any, where: str) -> Iterator[str]:
    """Names like the plugin's, with an object or a list as value, at any depth of a value of the body."""
    pending = [value]
    while pending:
        one = pending.pop()
        if isinstance(one, list):
            pending += [inner for inner in one if isinstance(inner, dict | list)]
        elif isinstance(one, dict):
            for name, inner in one.items():
                if not isinstance(inner, dict | list):
                    continue
                if is_like_ours(name, most_edits=1):
                    yield f"{name!r} within {where!r}"
                elif name not in _USERS_NAMES and not (name == "input" and one.get("type") == "tool_use"):
                    pending.append(inner)


def _in_body(fields: Mapping[str, Any]) -> Iterator[str]:
    for name, value in fields.items():
        if name in FIELDS:
            continue
        if is_like_ours(name):
            yield repr(name)
        if name in _CONTAINERS and isinstance(value, dict):
            yield from (f"{inner!r} in {name!r}" for inner in value if is_like_ours(inner))
        if name == "messages" and isinstance(value, list):
            for index, message in enumerate(value):
                if isinstance(message, dict):
                    yield from (f"{inner!r} in messages[{index}]" for inner in message if is_like_ours(inner))
        if name != "vllm_xargs":
            yield from _deeper(value, name)


def _in_extra(fields: Mapping[str, Any], extra: tuple[str, ...]) -> Iterator[str]:
    """Names like the plugin's among the extra arguments, except for ``WIRE_KEY`` in its right place."""
    for keys in {extra, ("vllm_xargs",)}:
        found: Any = fields
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        if isinstance(found, dict) and keys:
            right = (WIRE_KEY,) if keys == extra else ()
            yield from (f"{name!r} in {keys[-1]!r}" for name in found if name not in right and is_like_ours(name))


def _in_query(query: Mapping[str, str]) -> Iterator[str]:
    yield from (f"the URL's parameter {name!r}" for name in query if is_like_ours(name))
