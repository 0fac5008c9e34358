"""Merges the answers of workers: pipeline stages hold different layers of the same readout.

All functions take, for each engine behind a front end, its workers' answers in rank order, in which later stages follow
earlier ones. Only rank 0 of each tensor-parallel group answers; the others return None. With data parallelism there are
several engines, and a sample runs on one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Readout = dict[str, Any]
"""The result of ``FinishedReadout.answer``, with ``proof``."""
ModelRecord = dict[str, Any]
"""The result of ``rpc.model``."""
LiveTrace = list[tuple[str, list[float]]] | dict[str, str]
"""(name, values) of each traced direction, or ``{"error": reason}``."""


def whole_readouts(engines: Sequence[Sequence[Sequence[Readout | None] | None]]) -> list[Readout | None]:
    """Merge the answers to ``vllm_steer_collect``: one readout per sample, None where any stage lost it."""
    return _of_any([[_whole_readout(parts) for parts in _by_sample(workers)] for workers in engines])


def whole_traces(engines: Sequence[Sequence[Sequence[LiveTrace | None] | None]]) -> list[LiveTrace | None]:
    """Merge the answers to ``vllm_steer_traces``: one trace per running sample.

    The result is None for a sample that any stage does not know (not yet, or no longer). All directions of a sample
    have the same number of values: those of the tokens that every stage knows.
    """
    return _of_any([[_whole_trace(parts) for parts in _by_sample(workers)] for workers in engines])


def whole_model(engines: Sequence[Sequence[ModelRecord | None]]) -> ModelRecord:
    """Merge the answers to ``vllm_steer_model``: one record with the layers of all pipeline stages.

    All engines of a front end have the same model; the first one speaks for them.
    """
    stages = [stage for stage in engines[0] if stage is not None]
    experiments = [stage["experiment"] for stage in stages]
    return {
        "architecture": stages[0]["architecture"],
        "proof": _weakest(stages),
        "experiment": {
            **experiments[0],
            "layers": [layer for one in experiments for layer in one["layers"]],
            "repeated": max(one["repeated"] for one in experiments),
            "seconds": max(one["seconds"] for one in experiments),
        },
    }


def classes_in(record: ModelRecord) -> list[str]:
    """The classes of decoder layers in a record, each once."""
    return sorted({layer["path"] for layer in record["experiment"]["layers"]})


def _of_any(engines: Sequence[list[Any]]) -> list[Any]:
    """For each sample the answer of the engine that knows it; None where none does."""
    return [next((one for one in answers if one is not None), None) for answers in zip(*engines, strict=True)]


def _weakest(stages: Sequence[dict[str, Any]]) -> str:
    return "experiment" if any(stage["proof"] == "experiment" for stage in stages) else "parity"


def _by_sample(workers: Sequence[Sequence[Any] | None]) -> zip[tuple[Any, ...]]:
    return zip(*(answers for answers in workers if answers is not None), strict=True)


def _whole_readout(parts: Sequence[Readout | None]) -> Readout | None:
    if len(parts) == 1:
        return parts[0]
    stages = [part for part in parts if part is not None]
    if len(stages) < len(parts):
        return None
    for stage in stages:
        if "error" in stage:
            return stage
    counts = {stage["num_tokens"] for stage in stages}
    if len(counts) > 1:
        return {"error": f"the pipeline stages have summed different numbers of tokens, {sorted(counts)}"}
    pooled = [stage["pooled"] for stage in stages]
    errors = [stage["trace_error"] for stage in stages if stage["trace_error"] is not None]
    return {
        "num_tokens": counts.pop(),
        "layers": [layer for stage in stages for layer in stage["layers"]],
        "pooled": None if None in pooled else b"".join(pooled),
        "projections": [projection for stage in stages for projection in stage["projections"]],
        "trace": [trace for stage in stages for trace in stage["trace"]],
        "max": [largest for stage in stages for largest in stage["max"]],
        "held": _whole_held([stage.get("held") for stage in stages]),
        "stopped": [crossing for stage in stages for crossing in stage["stopped"]],
        "flags": [crossing for stage in stages for crossing in stage["flags"]],
        "rows": [rows for stage in stages for rows in stage["rows"]],
        "trace_error": errors[0] if errors else None,
        "proof": _weakest(stages),
    }


def _whole_held(parts: Sequence[list[Any] | None]) -> list[Any] | None:
    """Each condition from the stage that has evaluated it."""
    told = [part for part in parts if part is not None]
    return [next((one for one in of if one is not None), None) for of in zip(*told, strict=True)] if told else None


def _whole_trace(parts: Sequence[LiveTrace | None]) -> LiveTrace | None:
    traced: list[tuple[str, list[float]]] = []
    for part in parts:
        if part is None or isinstance(part, dict):
            return part
        traced += part
    known = min((len(values) for _, values in traced), default=0)
    return [(name, values[:known]) for name, values in traced]
