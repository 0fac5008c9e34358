"""What the tests of the shared registry put in the place of workers and engine."""

from __future__ import annotations

import asyncio

import numpy as np

from vllm_steer.directions import Direction
from vllm_steer.engine.front.admission import Admission
from vllm_steer.engine.front.in_flight import InFlight
from vllm_steer.engine.registry import DirectionBook
from vllm_steer.server.registry.directory import Server
from vllm_steer.server.registry.shared_registry import SharedRegistry
from vllm_steer.settings import SteerSettings

SIZE, CAPACITY = 4, 4
SERVER = Server(pid=1, started=1.0)


class StandInWorkers:
    """A bank that takes what is written to it."""

    def __init__(self) -> None:
        self.bank: dict[int, float] = {}

    async def write(self, writes: list[tuple[int, Direction]]) -> None:
        await asyncio.sleep(0)  # other tasks run while the workers write
        for slot, direction in writes:
            self.bank[slot] = float(direction.vector[0])


def direction(name: str, value: float, layer: int = 1, size: int = SIZE) -> Direction:
    return Direction(name, layer, np.full(size, value, np.float32))


def anything(before: DirectionBook, after: DirectionBook) -> None:
    """A check that lets every change through."""


SETTINGS = SteerSettings(layers=(1,), max_directions=CAPACITY)


def admission_on(registry: SharedRegistry) -> Admission:
    async def is_past() -> None:
        pass

    admission = Admission(SETTINGS, SIZE)
    admission.registry, admission.in_flight = registry, InFlight(registry.use, is_past, registry.released)
    return admission
