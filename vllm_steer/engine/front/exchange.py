"""What the plugin keeps of one HTTP request while vLLM answers it.

The middleware makes an ``Exchange`` and binds it to the task that serves the request; the engine's front end, which
runs in that task or in one that it started, finds it there. So a readout can only ever reach the request that asked for
it, whatever ids clients choose, and it is gone with its request.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from vllm_steer.errors import SteerError
from vllm_steer.schema import RequestSpec


@dataclass(slots=True)
class Sample:
    """What is known so far of one sample of the reply.

    Attributes:
        trace: direction name -> one projection a token of the readout's span; may run a token or two ahead.
        span_length: how many of these are known to belong to the sample.
        told: how many have been sent already.
        readout: the finished readout as it stands in the reply; None before the sample is finished.
    """

    trace: dict[str, list[float | None]] = field(default_factory=dict)
    span_length: int = 0
    told: int = 0
    readout: dict[str, Any] | None = None


@dataclass(slots=True)
class Exchange:
    """One HTTP request and its reply.

    Attributes:
        spec: what its body asks, an alias's entries included; None where it says nothing.
        whole: the same with the server's default steering.
        choices_per_prompt: the body's ``n``.
        is_background: its reply comes before anything is generated; steered by default only.
        allowed: the directions that engine requests of it may name which bring a spec of their own; None is any.
        samples: by (id of the engine request as vLLM's server names it, sample index), oldest first.
        is_applied: whether an engine request of it was admitted with ``whole``.
        refusal: why an engine request of this exchange was refused, if one was.
    """

    spec: RequestSpec | None = None
    whole: RequestSpec = field(default_factory=RequestSpec)
    choices_per_prompt: int = 1
    is_background: bool = False
    allowed: frozenset[str] | None = None
    samples: dict[tuple[str, int], Sample] = field(default_factory=dict)
    is_applied: bool = False
    refusal: SteerError | None = None

    def mark_applied(self) -> None:
        """Note that an engine request of it was admitted with ``whole``."""
        self.is_applied = True

    def sample(self, request_id: str, index: int) -> Sample:
        """The sample of that id and index, made where there is none yet."""
        return self.samples.setdefault((request_id, index), Sample())


current_exchange: ContextVar[Exchange | None] = ContextVar("vllm_steer_exchange", default=None)
"""The exchange that the running task serves; None outside HTTP requests."""
