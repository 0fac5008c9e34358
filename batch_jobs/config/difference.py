"""The differences between two study configs, field by field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ABSENT = "(absent)"


@dataclass(frozen=True)
class FieldChange:
    """One field whose values differ."""

    field: str
    """Dotted path, e.g. `sampling.temperature`."""
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.field}: {self.before!r} -> {self.after!r}"


def config_difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[FieldChange]:
    """The fields that differ between two nested mappings, sorted by path. Lists are compared as a whole. A field that
    one side lacks has the value `(absent)` there."""
    flat_before, flat_after = _flat(before, ""), _flat(after, "")
    return [
        FieldChange(field, flat_before.get(field, ABSENT), flat_after.get(field, ABSENT))
        for field in sorted({*flat_before, *flat_after})
        if flat_before.get(field, ABSENT) != flat_after.get(field, ABSENT)
    ]


def _flat(section: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in section.items():
        if isinstance(value, Mapping):
            fields |= _flat(value, f"{prefix}{name}.")
        else:
            fields[f"{prefix}{name}"] = value
    return fields
