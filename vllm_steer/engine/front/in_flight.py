"""The slots that the requests of this process use, from their admission to the moment the engine is done with them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from vllm.v1.engine.exceptions import EngineDeadError

from vllm_steer.engine.background import run_in_background
from vllm_steer.engine.front.slot_use import SlotUse

DRAIN_SECONDS = 0.05


@dataclass(eq=False)
class Hold:
    """What one call of ``AsyncLLM.generate`` holds; ``slots`` is None until its request is admitted."""

    slots: tuple[int, ...] | None = None


class InFlight:
    """Keeps slots from being written again while a request may still read them.

    Args:
        use: where the uses are counted.
        engine_is_past: returns when the engine has handled every message that this process sent it before. A request
            whose client is gone, or that ended at a stop string, runs on until the engine has seen its abort.
        released: told the slots of requests that the engine is done with.

    A request's readout must have been collected before its hold ends: it is projected onto the bank as it is then.
    """

    def __init__(
        self,
        use: SlotUse,
        engine_is_past: Callable[[], Awaitable[object]],
        released: Callable[[Sequence[int]], object],
    ) -> None:
        self.use = use
        self._released = released
        self._engine_is_past = engine_is_past
        self._holds: dict[str, list[Hold]] = {}
        self._leaving: list[int] = []
        self._drain: asyncio.Task[None] | None = None

    @contextmanager
    def hold(self, request_id: str) -> Iterator[None]:
        """Around one call of ``AsyncLLM.generate``, the closing of its generator included; on its event loop.

        Args:
            request_id: the id the caller knows. Two requests may have the same.
        """
        hold = Hold()
        self._holds.setdefault(request_id, []).append(hold)
        try:
            yield
        finally:
            self._holds[request_id].remove(hold)
            if not self._holds[request_id]:
                del self._holds[request_id]
            if hold.slots:
                self._leave(hold.slots)

    def acquire(self, request_id: str, slots: Sequence[int]) -> None:
        """Count a request's slots as used. A request that nothing holds keeps them for ever, which is safe."""
        waiting = [hold for hold in self._holds.get(request_id, ()) if hold.slots is None]
        if waiting:
            waiting[0].slots = tuple(slots)
        self.use.add(slots)

    def withdraw(self, request_id: str, slots: Sequence[int]) -> None:
        """Take ``acquire`` back before the request has gone to the engine."""
        for hold in self._holds.get(request_id, ()):
            if hold.slots == tuple(slots):
                hold.slots = None
                break
        self.use.subtract(slots)

    def _leave(self, slots: tuple[int, ...]) -> None:
        self._leaving.extend(slots)
        if self._drain is None:
            self._drain = run_in_background(self._drained(), "The release of slots")

    async def _drained(self) -> None:
        """One question to the engine for all requests that ended in the last moment, not one each."""
        try:
            while self._leaving:
                await asyncio.sleep(DRAIN_SECONDS)
                leaving, self._leaving = self._leaving, []
                # A dead engine is done with all of them; the requests themselves are told that it is.
                with suppress(EngineDeadError):
                    await self._engine_is_past()
                self.use.subtract(leaving)
                self._released(leaving)
        finally:
            self._drain = None
