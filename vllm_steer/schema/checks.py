"""Checks of single values, and of the fields of a JSON object."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from vllm_steer.errors import BadAlpha, MalformedSpec, SpecError, UnknownField
from vllm_steer.messages import json_type, near, shown

MOST_FLOAT32 = float(np.finfo(np.float32).max)


def checked_layer(layer: object, where: str) -> int:
    if type(layer) is int and layer >= 0:  # the usual case, from JSON
        return layer
    if isinstance(layer, bool) or not isinstance(layer, int | np.integer) or layer < 0:
        raise MalformedSpec(
            f"{where} is {shown(layer)}; allowed: a whole number from 0 (the first decoder block). Give the block's "
            "index."
        )
    return int(layer)


def finite(value: object, name: str = "alpha", refusal: type[SpecError] = BadAlpha) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating | np.integer):
        raise refusal(f"{name} is {shown(value)}; allowed: a finite number. Give a number.")
    try:
        number = float(value)
    except OverflowError:  # an integer beyond the range of floats
        number = math.inf
    if not math.isfinite(number):
        raise refusal(f"{name} is {number}; allowed: a finite number. Leave the entry out to change nothing.")
    return number


def check_flag(value: object, name: str) -> None:
    if not isinstance(value, bool):
        raise MalformedSpec(f"{name} is {shown(value)}; allowed: true or false. Give one of them.")


def check_name(name: object, where: str) -> None:
    if not isinstance(name, str) or not name:
        raise MalformedSpec(
            f"{where} is {shown(name)}; allowed: a non-empty string. Give the name of a registered direction."
        )


def checked_fields(cls: type[Any], value: object, where: str, required: Sequence[str]) -> dict[str, Any]:
    allowed = cls.__match_args__  # the names of a dataclass's fields
    if not isinstance(value, dict):
        raise MalformedSpec(f"{where} is a JSON {json_type(value)}; allowed: an object with {', '.join(allowed)}.")
    unknown = [name for name in value if name not in allowed]
    if unknown:
        name = min(unknown)
        told = f"{where} has the field {name!r}; allowed: {', '.join(allowed)}."
        raise UnknownField(told + (near(name, allowed) or " Remove it."))
    missing = [name for name in required if name not in value]
    if missing:
        raise MalformedSpec(f"{where} lacks {missing[0]!r}; allowed fields: {', '.join(allowed)}. Add it.")
    return value
