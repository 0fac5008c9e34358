"""Merges the answers of an engine's workers: pipeline stages hold different layers of the same readout.

All functions take the results of ``collective_rpc`` in rank order, in which later stages follow earlier ones. Only
rank 0 of each tensor-parallel group answers; the others return None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Readout = dict[str, Any]
"""The result of ``FinishedReadout.answer``."""
LiveTrace = list[tuple[str, list[float]]] | dict[str, str]
"""(name, values) of each traced direction, or ``{"error": reason}``."""


def whole_readouts(workers: Sequence[Sequence[Readout | None] | None]) -> list[Readout | None]:
    """Merge the answers to ``vllm_steer_collect``: one readout per sample, None where any stage lost it."""
    return [_whole_readout(parts) for parts in _by_sample(workers)]


def whole_traces(workers: Sequence[Sequence[LiveTrace | None] | None]) -> list[LiveTrace | None]:
    """Merge the answers to ``vllm_steer_traces``: one trace per running sample.

    The result is None for a sample that any stage does not know (not yet, or no longer). All directions of a sample
    have the same number of values: those of the tokens that every stage knows.
    """
    return [_whole_trace(parts) for parts in _by_sample(workers)]


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
    means = [stage["mean"] for stage in stages]
    errors = [stage["trace_error"] for stage in stages if stage["trace_error"] is not None]
    return {
        "num_tokens": counts.pop(),
        "layers": [layer for stage in stages for layer in stage["layers"]],
        "mean": None if None in means else b"".join(means),
        "projections": [projection for stage in stages for projection in stage["projections"]],
        "trace": [trace for stage in stages for trace in stage["trace"]],
        "trace_error": errors[0] if errors else None,
    }


def _whole_trace(parts: Sequence[LiveTrace | None]) -> LiveTrace | None:
    traced: list[tuple[str, list[float]]] = []
    for part in parts:
        if part is None or isinstance(part, dict):
            return part
        traced += part
    known = min((len(values) for _, values in traced), default=0)
    return [(name, values[:known]) for name, values in traced]
