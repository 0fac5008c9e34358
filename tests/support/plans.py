"""Plans of requests whose prompt and generated tokens are steered each in its own way."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_steer.plan.batch_plan import Pooling, RequestPlan
from vllm_steer.plan.entry_rows import Entry


def in_halves(
    prompt_len: int, prompt: Sequence[Entry] = (), generated: Sequence[Entry] = (), pooling: Pooling | None = None
) -> RequestPlan:
    """The plan of a request with these entries over its prompt tokens and over its generated tokens."""
    windows = ((0, tuple(prompt)), (prompt_len, tuple(generated))) if prompt or generated else ()
    return RequestPlan(windows, pooling)
