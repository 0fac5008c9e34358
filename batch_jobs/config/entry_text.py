"""Entries of steering in the forms in which other programs pass them on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from vllm_steer import Steering, parse_steering
from vllm_steer.errors import SettingsError

_FORMS = "a line such as kind:8@12 or kind:8;span=response,calm:-3, or the entries as JSON"


def parse_entries(value: object, *, where: str, span: str = "all") -> tuple[Steering, ...]:
    """Entries of steering as a program passes them on: as text, as JSON or as objects.

    Args:
        value: a line, see `vllm_steer.parse_steering`; JSON text; a `Steering`, an object of its fields, or a list of
            these.
        where: the name of the setting, for messages.
        span: the span of the entries that have none of their own.

    Raises:
        SettingsError: there are no entries, or `value` has another form.
        SteerError: `Steering` refuses the values.
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        text = value
        try:
            value = json.loads(text)
        except ValueError as error:
            raise SettingsError(
                f"{where} is {text[:80]!r}, not JSON ({error}); allowed: {_FORMS}. A comma may have split it: give all "
                "settings as one JSON object."
            ) from None
    listed = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    entries: list[Steering] = []
    for one in listed:
        if isinstance(one, Mapping):
            entries.append(Steering.from_json({"span": span, **one}))
        elif isinstance(one, Steering):
            entries.append(one)
        elif isinstance(one, str):
            entries += parse_steering(one, where, span) if one.strip() else ()
        else:
            raise SettingsError(f"{where} is {str(value)[:80]!r}; allowed: {_FORMS}. Correct it.")
    if not entries:
        raise SettingsError(f"{where} is empty; allowed: {_FORMS}. Leave it out for the unsteered model.")
    return tuple(entries)
