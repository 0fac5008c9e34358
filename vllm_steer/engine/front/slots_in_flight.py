"""The bank slots that requests of this process use, from admission until the engine is done with the request."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from vllm.v1.engine.exceptions import EngineDeadError

from vllm_steer.engine.background import run_in_background
from vllm_steer.engine.front.slot_use_files import SlotUse

DRAIN_SECONDS = 0.05


@dataclass(eq=False)
class Hold:
    """The slots that one call of ``AsyncLLM.generate`` holds; None until its request is admitted."""

    slots: tuple[int, ...] | None = None


class InFlight:
    """Keeps slots from being overwritten while a request may still read them.

    A request's readout must be collected before its hold ends, because it is projected onto the bank's contents at that
    time.

    Args:
        use: counts the uses.
        engine_is_past: returns once the engine has handled every message that this process sent before the call. A
            request whose client is gone, or that ended at a stop string, runs on until the engine has seen its abort.
        released: called with the slots of requests that the engine is done with.
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
        """Hold a request's slots during one call of ``AsyncLLM.generate``, until its generator is closed.

        Must be entered and left on the call's event loop.

        Args:
            request_id: the caller's id. Two requests may have the same.
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
        """Count a request's slots as used. Without a ``hold`` they stay in use for ever, which is safe."""
        waiting = [hold for hold in self._holds.get(request_id, ()) if hold.slots is None]
        if waiting:
            waiting[0].slots = tuple(slots)
        self.use.add(slots)

    def withdraw(self, request_id: str, slots: Sequence[int]) -> None:
        """Undo ``acquire`` before the request has gone to the engine."""
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
        """Ask the engine once for all requests that ended within ``DRAIN_SECONDS``, not once for each."""
        try:
            while self._leaving:
                await asyncio.sleep(DRAIN_SECONDS)
                leaving, self._leaving = self._leaving, []
                # A dead engine is done with all of them; the requests themselves fail with the error.
                with suppress(EngineDeadError):
                    await self._engine_is_past()
                self.use.subtract(leaving)
                self._released(leaving)
        finally:
            self._drain = None
