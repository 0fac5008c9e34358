"""Entries of steering as text: `direction:alpha[@layer]`, and the forms in which other programs pass them on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_steer import Steering
from vllm_steer.errors import SettingsError

_FORMS = "direction:alpha or direction:alpha@layer, such as kind:8@12, several joined by ; or the entries as JSON"


def parse_entry(text: str, **fields: Any) -> Steering | None:
    """Parse `direction:alpha` or `direction:alpha@layer`; None if `text` has another form.

    Args:
        text: the entry.
        fields: other fields of the entry.

    Raises:
        SteerError: `Steering` refuses the values.
    """
    # a direction's name may hold colons, but no @
    entry, at, layer = text.strip().partition("@")
    direction, _, alpha = entry.rpartition(":")
    try:
        multiplier = float(alpha)
        at_layer = int(layer) if at else None
    except ValueError:
        return None
    return Steering(direction, multiplier, at_layer, **fields) if direction else None


def parse_entries(value: object, *, where: str, span: str | None = None) -> tuple[Steering, ...]:
    """Entries of steering as a program passes them on: as text, as JSON or as objects.

    Args:
        value: the short text, several joined by `;`; JSON text; a `Steering`, an object of its fields, or a list of
            these.
        where: the name of the setting, for messages.
        span: the span of the entries that have none of their own; None for `all`.

    Raises:
        SettingsError: there are no entries, or `value` has another form.
        SteerError: `Steering` refuses the values.
    """
    fields = {} if span is None else {"span": span}
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        text = value
        try:
            value = json.loads(text)
        except ValueError as error:
            raise SettingsError(
                f"{where} is {text[:80]!r}, not JSON ({error}); allowed: {_FORMS}. A comma may have split it: give "
                "all settings as one JSON object, or the short text."
            ) from None
    if isinstance(value, str):
        value = [part for part in value.split(";") if part.strip()]
    listed = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    entries = []
    for one in listed:
        if isinstance(one, Mapping):
            one = Steering.from_json({**fields, **one})
        elif isinstance(one, str):
            one = parse_entry(one, **fields)
        if not isinstance(one, Steering):
            raise SettingsError(f"{where} is {str(value)[:80]!r}; allowed: {_FORMS}. Correct it.")
        entries.append(one)
    if not entries:
        raise SettingsError(f"{where} is empty; allowed: {_FORMS}. Leave it out for the unsteered model.")
    return tuple(entries)
