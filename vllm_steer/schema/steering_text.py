"""Steering as one line of text, where there is no place for JSON: command lines, model names, headers.

::

    kind:8                              the direction "kind" with α 8
    kind:8@12                           the same at layer 12
    kind:8@12;span=response             with other fields of an entry
    kind;op=ablate                      without α
    kind;op=clamp;low=-2;high=2
    kind:8,calm:-3@12                   several entries, in their order

A name that contains ``@``, ``;`` or ``,`` has no such text; use JSON for it.
"""

from __future__ import annotations

import json
import re
from typing import Any

from vllm_steer.errors import BadAlpha, MalformedSpec
from vllm_steer.schema.steering import Steering
from vllm_steer.schema.wire import without_duplicates

FORM = "direction:alpha[@layer][;field=value ...], several joined by commas, such as kind:8@12;span=response"
"""The form, for error messages."""
_NO_NAME = re.compile(r"[\s=]")
"""What no name of a direction has: kind=5 and kind 5 are meant to be kind:5."""
_OPS_WITH_ALPHA = ("add", "set", "scale")
_TEXTS = ("op", "span")
_VALUES = ("relative", "keep_norm", "low", "high")


def parse_steering(text: str, where: str = "steering", span: str = "all") -> tuple[Steering, ...]:
    """Parse the entries of a line.

    Args:
        text: at least one entry, in the form above.
        where: the name of the place of the text, for messages.
        span: the span of entries that name none.

    Raises:
        MalformedSpec: the text has another form; the message names the entry.
        BadAlpha, BadOp, BadSpan: as ``Steering``.
    """
    return tuple(_entry(one.strip(), where, span) for one in text.split(","))


def _entry(text: str, where: str, span: str) -> Steering:
    head, *pairs = text.split(";")
    head, at, layer = head.partition("@")
    name, colon, alpha = head.rpartition(":")  # a name may contain colons
    fields: list[tuple[str, Any]] = [("direction", name if colon else head)]
    try:
        if colon:
            fields.append(("alpha", float(alpha)))
        if at:
            fields.append(("layer", int(layer)))
        fields += [_field(pair) for pair in pairs]
    except ValueError:
        fields = [("direction", "")]
    if not fields[0][1] or _NO_NAME.search(fields[0][1]):
        raise MalformedSpec(f"{where} has {text[:80]!r}; allowed: {FORM}. Correct it.")
    entry = {"span": span, **without_duplicates(fields)}
    if "alpha" not in entry and entry.get("op", "add") in _OPS_WITH_ALPHA:
        raise BadAlpha(f"{where} has {text[:80]!r}, without alpha; allowed: {FORM}. Give alpha.")
    return Steering.from_json(entry)


def _field(pair: str) -> tuple[str, Any]:
    """One ``field=value``.

    Raises:
        ValueError: it is not one.
    """
    name, _, value = pair.strip().partition("=")
    if name in _TEXTS and value:
        return name, value
    if name in _VALUES:
        return name, json.loads(value)
    raise ValueError(pair)
