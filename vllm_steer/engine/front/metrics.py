"""The plugin's Prometheus metrics, on vLLM's ``/metrics``.

They are in prometheus_client's default registry, like vLLM's own. For several API server processes vLLM points
``PROMETHEUS_MULTIPROC_DIR`` at a directory before it starts them, and their counts are added up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import Counter, Gauge

from vllm_steer.errors import SteerError
from vllm_steer.schema.request_spec import RequestSpec

MAX_LABELS = 64
OTHER = "other"
"""Label of every direction (or alias) after the first ``MAX_LABELS`` that a process counts: it limits the series."""

_requests = Counter("vllm_steer_requests", "Steered requests that were admitted, by direction.", ["direction"])
_aliases = Counter("vllm_steer_alias_requests", "Requests that named a steered alias, by alias.", ["alias"])
_tokens = Counter("vllm_steer_tokens", "Tokens generated for steered requests, by direction.", ["direction"])
_readouts = Counter("vllm_steer_readouts", "Requests with a readout that were admitted.")
_stops = Counter("vllm_steer_stops", "Samples that ended because their stop held, by direction.", ["direction"])
_flags = Counter("vllm_steer_flags", "Samples for which a flag held, by direction.", ["direction"])
_refusals = Counter("vllm_steer_refusals", "Refused requests, by the class of the refusal.", ["reason"])
_bank_slots = Gauge(
    "vllm_steer_bank_slots",
    "Slots of the direction bank: registered, held (no longer registered, a running request uses it), free.",
    ["state"],
    multiprocess_mode="mostrecent",  # every process knows the whole bank, so the latest value is right
)
_directions: set[str] = set()
_named: set[str] = set()


def directions_of(spec: RequestSpec) -> tuple[str, ...]:
    """The names of the directions that steer a request, each once."""
    return tuple(dict.fromkeys(entry.direction for entry in spec.entries))


def admitted(spec: RequestSpec) -> None:
    """Count an admitted request. Its directions must have been found in the registry."""
    for direction in directions_of(spec):
        _requests.labels(_label(direction, _directions)).inc()
    if spec.readout is not None:
        _readouts.inc()


def alias_named(alias: str) -> None:
    """Count a request that named an alias and was admitted; it must be one of the server's."""
    _aliases.labels(_label(alias, _named)).inc()


def tokens(directions: Iterable[str], count: int) -> None:
    """Count the generated tokens of a request for each of its directions (see ``directions_of``)."""
    for direction in directions:
        _tokens.labels(_label(direction, _directions)).inc(count)


def crossings(answer: Mapping[str, Any]) -> None:
    """Count the stop and the flags that held for a sample; ``answer`` is what the workers say of its readout."""
    for name, *_ in answer.get("stopped", ()):
        _stops.labels(_label(name, _directions)).inc()
    for name, *_ in answer.get("flags", ()):
        _flags.labels(_label(name, _directions)).inc()


def refused(error: SteerError) -> None:
    """Count a refusal by its class, one of ``vllm_steer.errors``."""
    _refusals.labels(type(error).__name__).inc()


def bank(registered: int, held: int, free: int) -> None:
    """Set the numbers of bank slots that are registered, held and free."""
    for state, slots in (("registered", registered), ("held", held), ("free", free)):
        _bank_slots.labels(state).set(slots)


def _label(name: str, counted: set[str]) -> str:
    if name not in counted and len(counted) < MAX_LABELS:
        counted.add(name)
    return name if name in counted else OTHER
