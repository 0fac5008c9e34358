"""What a worker still keeps of requests. The function runs on the worker, in whatever process that is."""

from __future__ import annotations

from typing import Any

from vllm_steer.engine.worker.worker_steering import steering_of


def state_held(worker: Any) -> dict[str, int]:
    """Counts of everything that a request takes and must give back, without the store of finished readouts.

    vLLM tells the runner of a finished request with its next step, so the engine must have stepped once more.
    """
    steering = steering_of(worker.model_runner)
    assert steering is not None
    planner = steering.planner
    columns = planner._trace_columns
    return {
        "plans": len(planner.requests),
        "poolings": len(planner.poolings),
        "accumulators": planner.max_requests - len(planner._free_accumulators),
        "traced": len(planner.columns),
        "trace columns": columns.num_columns - len(columns._free),
        "sums over prompts": len(planner._prompt_sums),
        "sums put aside": len(steering.buffers._parked),
        "resolved": len(steering._resolved),
        "traces": len(steering._traces),
        "reading": len(steering._reading),
    }
