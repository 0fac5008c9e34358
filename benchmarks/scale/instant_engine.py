"""A stand-in for the engine that answers at once, so that only the cost of the batch jobs around it remains.

It has no model: every completion is the same text of 200 tokens. Building the requests is real (`vllm_steer.steered`);
calls to an engine are replaced.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import vllm_steer
from batch_jobs.generate import ray_executor
from vllm_steer import ReadoutResult

COMPLETION = "I see you, and I am sorry that nobody answered; this litre is yours, and B will understand. " * 10
COMPLETION_TOKENS = 200
CONCEPT = "empathy"
NUM_LAYERS = 4


class InstantEngine:
    """The part of `vllm.LLM` that batch jobs call; also its own tokenizer."""

    chat_template = None

    def get_tokenizer(self) -> InstantEngine:
        """This object, which is a tokenizer too."""
        return self

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        """Token ids for `text`, one per four characters."""
        return {"input_ids": list(range(len(text) // 4))}

    def get_metrics(self) -> list[Any]:
        """No metrics."""
        return []

    def reset_prefix_cache(self) -> bool:
        """True; there is no cache."""
        return True

    def generate(
        self, prompts: Sequence[Mapping[str, Any]], sampling_params: Sequence[Any], *, use_tqdm: bool
    ) -> list[Any]:
        """The same completion for every prompt."""
        return [
            SimpleNamespace(
                outputs=[SimpleNamespace(text=COMPLETION, token_ids=range(COMPLETION_TOKENS), finish_reason="length")],
                metrics=SimpleNamespace(arrival_time=1.7e9, scheduled_ts=1.0, last_token_ts=3.5),
            )
            for _ in prompts
        ]


@contextmanager
def instant() -> Iterator[InstantEngine]:
    """Yield an InstantEngine, and meanwhile replace the functions of vllm_steer that call an engine."""
    readout = ReadoutResult(
        mean={}, num_tokens=COMPLETION_TOKENS - 1, projections={CONCEPT: dict.fromkeys(range(NUM_LAYERS), 0.5)}
    )
    stand_ins: dict[str, Any] = {
        "register_directions": lambda *_: None,
        "collect_readouts": lambda _, outputs: [[readout]] * len(outputs),
        "abandon_requests": lambda _: 0,
    }
    with patch.multiple(vllm_steer, create=True, **stand_ins):
        yield InstantEngine()


class InstantShardWorker(ray_executor.ShardWorker):
    """The Ray actor of a study, with an InstantEngine."""

    def __init__(self, *arguments: Any) -> None:
        self._for_life = ExitStack()
        engine = self._for_life.enter_context(instant())
        with patch.object(ray_executor, "start_engine", lambda *_: engine):
            super().__init__(*arguments)
