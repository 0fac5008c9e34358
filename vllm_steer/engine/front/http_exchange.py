"""The plugin's state for one HTTP request while vLLM answers it.

The middleware makes an ``Exchange`` and binds it to the task that serves the request. The engine's front end, which
runs in that task or in one started by it, finds it there. So a readout can only reach the request that asked for it,
whatever ids clients choose, and it is freed with its request.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from vllm_steer.engine.front import metrics
from vllm_steer.errors import SteerError
from vllm_steer.schema.request_spec import RequestSpec


@dataclass(slots=True)
class Sample:
    """The values known so far of one sample of the reply.

    Attributes:
        trace: direction name -> one projection per token of the readout's span; can be one or two tokens ahead.
        span_length: how many of these values are known to belong to the sample.
        told: how many of them have been sent already.
        readout: the finished readout in the reply's JSON form; None before the sample is finished.
    """

    trace: dict[str, list[float | None]] = field(default_factory=dict)
    span_length: int = 0
    told: int = 0
    readout: dict[str, Any] | None = None


@dataclass(slots=True)
class Exchange:
    """One HTTP request and its reply.

    Attributes:
        spec: the body's spec, an alias's entries included; None if there is neither.
        whole: the same together with the server's default steering.
        choices_per_prompt: the body's ``n``.
        is_background: whether the reply comes before anything is generated; then only default steering applies.
        alias: the alias that the request named, if it did.
        allowed: the directions that its engine requests may name if they bring their own spec; None means any.
        samples: samples by (engine request id in vLLM's server, sample index), oldest first.
        is_applied: whether one of its engine requests was admitted with ``whole``.
        refusal: the refusal of one of its engine requests, if there was one.
        reply_id: the id in the reply, once it is known.
        closed: ``{"index", "readout"}`` of each choice whose readout has been sent.
    """

    spec: RequestSpec | None = None
    whole: RequestSpec = field(default_factory=RequestSpec)
    choices_per_prompt: int = 1
    is_background: bool = False
    alias: str | None = None
    allowed: frozenset[str] | None = None
    samples: dict[tuple[str, int], Sample] = field(default_factory=dict)
    is_applied: bool = False
    refusal: SteerError | None = None
    reply_id: str | None = None
    closed: list[dict[str, Any]] = field(default_factory=list)

    def mark_applied(self) -> None:
        """Note that an engine request of this exchange was admitted with ``whole``."""
        if self.alias is not None and not self.is_applied:
            metrics.alias_named(self.alias)
        self.is_applied = True

    def sample(self, request_id: str, index: int) -> Sample:
        """The sample of this id and index, created if there is none yet."""
        return self.samples.setdefault((request_id, index), Sample())


current_exchange: ContextVar[Exchange | None] = ContextVar("vllm_steer_exchange", default=None)
"""The exchange that the running task serves; None outside HTTP requests."""
