"""The JSON of a readout, as it stands in replies."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def readout_json(answer: Mapping[str, Any]) -> dict[str, Any]:
    """A worker's answer (``FinishedReadout.answer``) as it stands in a reply, the trace aside."""
    if "error" in answer:
        return {"error": answer["error"]}
    projections: dict[str, dict[str, float | None]] = {}
    for name, layer, value in answer["projections"]:
        projections.setdefault(name, {})[str(layer)] = finite(value)
    readout: dict[str, Any] = {"num_tokens": answer["num_tokens"], "projections": projections}
    if answer.get("trace_error") is not None:
        readout["trace"] = {"error": answer["trace_error"]}
    if answer["mean"] is not None:
        rows_LD = np.frombuffer(answer["mean"], dtype=np.float32).reshape(len(answer["layers"]), -1)
        readout["mean"] = {
            str(layer): base64.b64encode(row_D.astype("<f4").tobytes()).decode()
            for layer, row_D in zip(answer["layers"], rows_LD, strict=True)
        }
    return readout


def finite(value: float) -> float | None:
    """A float32 with the nine digits that tell it from all others, or None where JSON has no number for it."""
    return float(f"{value:.9g}") if math.isfinite(value) else None
