"""One answer out of those of an engine's workers: pipeline stages hold different layers of the same readout.

All take the answers of ``collective_rpc`` in the order of the ranks, in which a later stage stands behind an earlier
one. A worker that another one of its tensor-parallel group answers for has answered None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Readout = dict[str, Any]
"""What ``FinishedReadout.answer`` gives."""
LiveTrace = list[tuple[str, list[float]]] | dict[str, str]
"""(name, values) of each traced direction, or ``{"error": reason}``."""


def whole_readouts(workers: Sequence[Sequence[Readout | None] | None]) -> list[Readout | None]:
    """The readouts of some samples, from the answers to ``vllm_steer_collect``; None for one that any stage lost."""
    return [_whole_readout(parts) for parts in _by_sample(workers)]


def whole_traces(workers: Sequence[Sequence[LiveTrace | None] | None]) -> list[LiveTrace | None]:
    """The traces of some samples that are under way, from the answers to ``vllm_steer_traces``.

    None for one that any stage does not know (yet, or any more). All directions of a sample come with equally many
    values, of the tokens that every stage knows of.
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
