"""The JSON form of readouts in replies."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def readout_json(answer: Mapping[str, Any], pool: str) -> dict[str, Any]:
    """Convert a worker's answer (``FinishedReadout.answer``) to the JSON of a reply, without the values of its trace.

    The pooled vector of each layer is base64 of D little-endian float32; its field is called as ``pool``. The rows of
    each layer are those of its tokens, one after the other.
    """
    if "error" in answer:
        return {"error": answer["error"]}
    projections: dict[str, dict[str, float | None]] = {}
    for name, layer, value in answer["projections"]:
        projections.setdefault(name, {})[str(layer)] = finite(value)
    readout: dict[str, Any] = {
        "num_tokens": answer["num_tokens"],
        "projections": projections,
        "proof": answer["proof"],
    }
    if answer.get("trace_error") is not None:
        readout["trace"] = {"error": answer["trace_error"]}
    for name, layer, value, position in answer["max"]:
        readout.setdefault("max", {}).setdefault(name, {})[str(layer)] = [finite(value), position]
    if answer.get("held") is not None:
        readout["held"] = answer["held"]
    for crossings, field in ((answer["stopped"], "stopped"), (answer["flags"], "flags")):
        told = [
            {"direction": name, "layer": layer, "position": position, "value": finite(value)}
            for name, layer, position, value in crossings
        ]
        if told:
            readout[field] = told if field == "flags" else told[0]
    if answer["rows"]:
        readout["rows"] = {str(layer): base64.b64encode(rows).decode() for layer, _, rows in answer["rows"]}
    if answer["pooled"] is not None:
        rows_LD = np.frombuffer(answer["pooled"], dtype=np.float32).reshape(len(answer["layers"]), -1)
        readout[pool] = {
            str(layer): base64.b64encode(row_D.astype("<f4").tobytes()).decode()
            for layer, row_D in zip(answer["layers"], rows_LD, strict=True)
        }
    return readout


def finite(value: float) -> float | None:
    """A float32 value to nine digits, which identify it; None for NaN and infinity, which JSON does not have."""
    return float(f"{value:.9g}") if math.isfinite(value) else None
