"""The front end's book of registered directions: which name at which layer lies in which slot of the workers' bank."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_steer.directions import UNIT_TOLERANCE, Direction, load_directions
from vllm_steer.errors import AmbiguousDirection, BankFull, LayerNotHooked, UnknownDirection, WrongDimension
from vllm_steer.settings import SteerSettings


@dataclass(frozen=True, slots=True)
class Registered:
    """A direction and its slot. The vector itself stays with the workers.

    Attributes:
        norm: Euclidean length of the vector.
        peak: largest absolute value of its elements.
    """

    name: str
    layer: int
    slot: int
    content_hash: str
    norm: float
    peak: float

    @classmethod
    def of(cls, direction: Direction, slot: int) -> Registered:
        """The entry of a direction whose vector lies in this slot."""
        peak = float(np.abs(direction.vector).max())
        return cls(direction.name, direction.layer, slot, direction.content_hash, direction.norm, peak)

    @property
    def length(self) -> float:
        """The norm, of which float32's rounding is no part in a unit direction."""
        return 1.0 if self.is_unit else self.norm

    @property
    def is_unit(self) -> bool:
        """Whether the norm is 1 to within float16 rounding."""
        return abs(self.norm - 1.0) <= UNIT_TOLERANCE


class DirectionBook:
    """Names to directions, for looking up.

    Args:
        registered: what the book holds, each name at most once a layer.
    """

    def __init__(self, registered: Iterable[Registered] = ()) -> None:
        self._by_name: dict[str, dict[int, Registered]] = {}
        for one in registered:
            self._by_name.setdefault(one.name, {})[one.layer] = one

    def current(self) -> DirectionBook:
        """The book as it stands, for look-ups that have to agree with each other."""
        return self

    def find(self, name: str, layer: int | None, hooked: Collection[int]) -> Registered:
        """The direction to use for ``name``, at ``layer`` if one is given.

        A name that belongs to exactly one layer may be used at any other one. Without ``layer``, a name that belongs to
        several is the one at a hooked layer.

        Args:
            hooked: the engine's hooked layers.

        Raises:
            UnknownDirection: nothing has the name.
            LayerNotHooked: it belongs to several layers, none of them hooked.
            AmbiguousDirection: it belongs to several, and which one is meant cannot be told.
        """
        layers = self.layers_of(name)
        if len(layers) == 1:
            return next(iter(layers.values()))
        if layer is not None and layer in layers:
            return layers[layer]
        choice = sorted(layers) if layer is not None else [one for one in sorted(layers) if one in hooked]
        if not choice:
            raise LayerNotHooked(
                f"direction {name!r} belongs to layers {sorted(layers)}; hooked: {sorted(hooked)}. Start the engine "
                "with steer_config(layers=[...]) naming one of them."
            )
        if layer is None and len(choice) == 1:
            return layers[choice[0]]
        asked = "no layer was given" if layer is None else f"layer {layer} was asked"
        raise AmbiguousDirection(
            f"direction {name!r} belongs to layers {choice} and {asked}; allowed: one of these. Give layer=..."
        )

    def layers_of(self, name: str) -> dict[int, Registered]:
        """Layer -> direction of all that carry this name.

        Raises:
            UnknownDirection: none does; the message lists what is registered.
        """
        if name not in self._by_name:
            known = ", ".join(sorted(self._by_name)) or "none"
            raise UnknownDirection(
                f"no direction is named {name!r}; registered: {known}. Register it with register_directions(...), or "
                "on a server with PUT /v1/steering/directions/NAME."
            )
        return self._by_name[name]

    def all(self) -> Iterable[Registered]:
        """Everything registered, by name and layer."""
        for name in sorted(self._by_name):
            yield from (self._by_name[name][layer] for layer in sorted(self._by_name[name]))


class DirectionRegistry(DirectionBook):
    """A book that gives out the slots of a bank.

    Args:
        capacity: slots in the bank.
        hidden_size: D; every vector must have this length.
        registered: what lies in the bank already.
        busy: slots that are not to be given out though nothing registered lies in them.

    A direction that is replaced or removed keeps its slot until ``reclaim``: requests that were admitted before still
    use it.
    """

    def __init__(
        self, capacity: int, hidden_size: int, registered: Iterable[Registered] = (), busy: Collection[int] = ()
    ) -> None:
        super().__init__(registered)
        self.capacity = capacity
        self.hidden_size = hidden_size
        taken = {one.slot for one in self.all()} | set(busy)
        self._free = [slot for slot in range(capacity - 1, -1, -1) if slot not in taken]
        self._retired: list[int] = []

    def register(self, directions: Sequence[Direction]) -> list[tuple[int, Direction]]:
        """Book directions and say which vectors have to be written to which slots; all of them or none.

        What is registered already with the same content is left alone.

        Raises:
            What ``reserve`` raises.
        """
        writes = self.reserve(directions)
        self.publish(writes)
        return writes

    def reserve(self, directions: Sequence[Direction]) -> list[tuple[int, Direction]]:
        """The slots that ``register`` would give to directions, taken but not yet to be found by name.

        Raises:
            WrongDimension: a vector whose length is not the hidden size.
            BankFull: more new directions than free slots.
        """
        for direction in directions:
            if direction.vector.size != self.hidden_size:
                raise WrongDimension(
                    f"direction {direction.key!r} has {direction.vector.size} elements; allowed: "
                    f"{self.hidden_size}, the hidden size of this model. Extract it from this model."
                )
        latest = {direction.key: direction for direction in directions}.values()
        new = [direction for direction in latest if not self._has(direction)]
        if len(new) > len(self._free):
            raise BankFull(
                f"{len(new)} new directions, and {len(self._free)} of {self.capacity} slots are free; start the "
                "engine with steer_config(max_directions=...) larger."
            )
        return [(self._free.pop(), direction) for direction in new]

    def publish(self, writes: Iterable[tuple[int, Direction]]) -> None:
        """Let reserved directions be found by name; one that had the same name and layer keeps its slot until
        ``reclaim``."""
        for slot, direction in writes:
            layers = self._by_name.setdefault(direction.name, {})
            if direction.layer in layers:
                self._retired.append(layers[direction.layer].slot)
            layers[direction.layer] = Registered.of(direction, slot)

    def give_back(self, writes: Iterable[tuple[int, Direction]]) -> None:
        """Free reserved slots again, in place of ``publish``."""
        self._free.extend(slot for slot, _ in writes)

    def remove(self, name: str, layer: int | None = None) -> list[Registered]:
        """Forget a name, at one layer or at all it belongs to; says what that was.

        Raises:
            UnknownDirection: there is none of that name, or none at that layer.
        """
        layers = self.layers_of(name)
        if layer is not None and layer not in layers:
            raise UnknownDirection(f"direction {name!r} belongs to layers {sorted(layers)}, not {layer}; name one.")
        removed = [layers.pop(one) for one in ([layer] if layer is not None else sorted(layers))]
        if not layers:
            del self._by_name[name]
        self._retired.extend(one.slot for one in removed)
        return removed

    def reclaim(self) -> None:
        """Free the slots of replaced and removed directions; only while no request is in flight."""
        self._free.extend(self._retired)
        self._retired.clear()

    def _has(self, direction: Direction) -> bool:
        known = self._by_name.get(direction.name, {}).get(direction.layer)
        return known is not None and known.content_hash == direction.content_hash


def bank_writes(writes: Iterable[tuple[int, Direction]]) -> list[tuple[int, str, int, bytes]]:
    """The argument of the workers' ``vllm_steer_write``: (slot, name, layer, float32 little-endian bytes)."""
    return [(slot, one.name, one.layer, one.vector.astype("<f4", copy=False).tobytes()) for slot, one in writes]


def configured_directions(settings: SteerSettings) -> list[Direction]:
    """The directions of the configured files, in the order that front end and workers both give them slots."""
    return [direction for path in settings.directions for direction in load_directions(path)]
