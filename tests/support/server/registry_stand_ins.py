"""Stand-ins for workers and engine, for tests of the shared registry."""

from __future__ import annotations

import asyncio

import numpy as np

from vllm_steer.directions import Direction
from vllm_steer.engine.front.admission import Admission
from vllm_steer.engine.front.slots_in_flight import InFlight
from vllm_steer.engine.registry import DirectionBook
from vllm_steer.server.registry.registry_folder import Server
from vllm_steer.server.registry.shared_registry import SharedRegistry
from vllm_steer.settings import SteerSettings

SIZE, CAPACITY = 4, 4
SERVER = Server(pid=1, started=1.0)


class StandInWorkers:
    """Workers that take every write; `bank` maps a slot to the first element of its vector."""

    def __init__(self) -> None:
        self.bank: dict[int, float] = {}

    async def write(self, writes: list[tuple[int, Direction]]) -> None:
        """Put each direction into its slot of the bank."""
        await asyncio.sleep(0)  # other tasks run while the workers write
        for slot, direction in writes:
            self.bank[slot] = float(direction.vector[0])


def direction(name: str, value: float, layer: int = 1, size: int = SIZE) -> Direction:
    """A direction whose ``size`` elements are all ``value``."""
    return Direction(name, layer, np.full(size, value, np.float32))


def anything(before: DirectionBook, after: DirectionBook) -> None:
    """A check that lets every change through."""


SETTINGS = SteerSettings(layers=(1,), max_directions=CAPACITY)


def admission_on(registry: SharedRegistry) -> Admission:
    """Admission over ``registry``, with an engine that is always past its requests."""

    async def is_past() -> None:
        pass

    admission = Admission(SETTINGS, SIZE)
    admission.registry, admission.in_flight = registry, InFlight(registry.use, is_past, registry.released)
    return admission
