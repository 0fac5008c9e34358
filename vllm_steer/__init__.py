"""Activation steering and activation readout inside stock vLLM.

The names below are the whole public API. They are resolved on first use, so that ``import vllm_steer`` loads neither
vLLM nor torch: a client, a scorer or a report can use the data types on a machine that has neither.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_steer.directions import Direction, load_directions, make_direction, save_directions
    from vllm_steer.engine.doctor import Diagnosis, diagnose
    from vllm_steer.engine.front.extraction import extract_directions
    from vllm_steer.engine.front.offline import (
        abandon_requests,
        abandon_requests_async,
        close_llm,
        collect_readouts,
        collect_readouts_async,
        load_llm,
        model_record,
        register_directions,
        register_directions_async,
        steered,
    )
    from vllm_steer.errors import SteerError
    from vllm_steer.schema.conditions import Crossing, Watch, When
    from vllm_steer.schema.readout import Readout, ReadoutResult
    from vllm_steer.schema.steering import Steering
    from vllm_steer.schema.steering_text import parse_steering
    from vllm_steer.settings import steer_config

__version__ = "0.1.0"

__all__ = [
    "Crossing",
    "Diagnosis",
    "Direction",
    "Readout",
    "ReadoutResult",
    "SteerError",
    "Steering",
    "Watch",
    "When",
    "__version__",
    "abandon_requests",
    "abandon_requests_async",
    "close_llm",
    "collect_readouts",
    "collect_readouts_async",
    "diagnose",
    "extract_directions",
    "load_directions",
    "load_llm",
    "make_direction",
    "model_record",
    "parse_steering",
    "register_directions",
    "register_directions_async",
    "save_directions",
    "steer_config",
    "steered",
]

_HOME = {
    "Direction": "vllm_steer.directions",
    "load_directions": "vllm_steer.directions",
    "make_direction": "vllm_steer.directions",
    "save_directions": "vllm_steer.directions",
    "SteerError": "vllm_steer.errors",
    "Readout": "vllm_steer.schema.readout",
    "ReadoutResult": "vllm_steer.schema.readout",
    "Crossing": "vllm_steer.schema.conditions",
    "Watch": "vllm_steer.schema.conditions",
    "When": "vllm_steer.schema.conditions",
    "Steering": "vllm_steer.schema.steering",
    "parse_steering": "vllm_steer.schema.steering_text",
    "steer_config": "vllm_steer.settings",
    "Diagnosis": "vllm_steer.engine.doctor",
    "diagnose": "vllm_steer.engine.doctor",
    "extract_directions": "vllm_steer.engine.front.extraction",
    "abandon_requests": "vllm_steer.engine.front.offline",
    "abandon_requests_async": "vllm_steer.engine.front.offline",
    "close_llm": "vllm_steer.engine.front.offline",
    "collect_readouts": "vllm_steer.engine.front.offline",
    "collect_readouts_async": "vllm_steer.engine.front.offline",
    "load_llm": "vllm_steer.engine.front.offline",
    "model_record": "vllm_steer.engine.front.offline",
    "register_directions": "vllm_steer.engine.front.offline",
    "register_directions_async": "vllm_steer.engine.front.offline",
    "steered": "vllm_steer.engine.front.offline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vllm_steer' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
