"""Traces of running requests, fetched from the workers for all of them together."""

from __future__ import annotations

import asyncio
from typing import Any

from vllm.v1.engine.exceptions import EngineDeadError

from vllm_steer.engine.background import run_in_background
from vllm_steer.engine.front.all_engines import call_workers
from vllm_steer.engine.front.http_exchange import Sample
from vllm_steer.engine.front.readout_json import finite
from vllm_steer.engine.worker_answers import LiveTrace, whole_traces

POLL_SECONDS = 0.05


class LiveTraces:
    """Asks the workers once every ``POLL_SECONDS`` while any sample is followed, and never otherwise.

    Args:
        engine: the ``AsyncLLM`` whose workers are asked.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._followed: dict[tuple[str, int], Sample] = {}
        self._task: asyncio.Task[None] | None = None

    def follow(self, key: str, index: int, sample: Sample) -> None:
        """Keep ``sample.trace`` up to date until ``leave``. Must be called on the event loop.

        Args:
            key: the name under which the workers keep the request's readouts.
            index: the sample's index in the request.
            sample: the sample to update.
        """
        self._followed[key, index] = sample
        if self._task is None:
            self._task = run_in_background(self._poll(), "The poll of running traces")

    def leave(self, key: str, index: int) -> None:
        """Stop following a sample; does nothing if it is not followed."""
        self._followed.pop((key, index), None)

    async def _poll(self) -> None:
        try:
            while self._followed:
                await asyncio.sleep(POLL_SECONDS)
                asked = [(*key, _known(sample)) for key, sample in self._followed.items()]
                if asked:
                    answers = whole_traces(await call_workers(self._engine, "vllm_steer_traces", asked))
                    for (key, index, _), answer in zip(asked, answers, strict=True):
                        self._take(key, index, answer)
        except EngineDeadError:  # the requests themselves fail with it
            self._followed.clear()
        finally:
            self._task = None

    def _take(self, key: str, index: int, answer: LiveTrace | None) -> None:
        if answer is None or (key, index) not in self._followed:  # not begun yet, or finished during the call
            return
        if isinstance(answer, dict):  # it failed; its readout will say why
            self.leave(key, index)
            return
        sample = self._followed[key, index]
        for name, values in answer:
            sample.trace.setdefault(name, []).extend(finite(value) for value in values)


def _known(sample: Sample) -> int:
    return max((len(values) for values in sample.trace.values()), default=0)
