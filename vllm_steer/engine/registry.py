"""The front end's registry of directions: the slot of the workers' bank for each name at each layer."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_steer.directions import UNIT_TOLERANCE, Direction, load_directions
from vllm_steer.directions.files import direction_keys
from vllm_steer.errors import AmbiguousDirection, BankFull, LayerNotHooked, UnknownDirection, WrongDimension
from vllm_steer.messages import listed, mib, near
from vllm_steer.settings import SteerSettings

MOST_BYTES_A_MESSAGE = 1 << 28
"""Most bytes of vectors in one message to the workers: it bounds the memory of a registration, on both sides."""
MANY = 1000
"""So many directions are told in the log, with the memory that they take, before they are registered."""
_ITEM_BYTES = 4


@dataclass(frozen=True, slots=True)
class Registered:
    """A direction and its slot. Only the workers keep the vector.

    Attributes:
        slot: the bank slot of the vector.
        content_hash: hash of the vector.
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
        """Describe a direction whose vector is in ``slot``."""
        peak = float(np.abs(direction.vector).max())
        return cls(direction.name, direction.layer, slot, direction.content_hash, direction.norm, peak)

    @property
    def length(self) -> float:
        """The norm; exactly 1 for a unit direction, so that rounding does not show."""
        return 1.0 if self.is_unit else self.norm

    @property
    def is_unit(self) -> bool:
        """Whether the norm is 1 to within float16 rounding."""
        return abs(self.norm - 1.0) <= UNIT_TOLERANCE


class DirectionBook:
    """Looks up registered directions by name.

    Args:
        registered: the directions, each name at most once per layer; or a book to copy.

    Attributes:
        state: another object after each change, for what is remembered of look-ups.
    """

    def __init__(self, registered: Iterable[Registered] | DirectionBook = ()) -> None:
        self._by_name: dict[str, dict[int, Registered]] = {}
        self.state = object()
        if isinstance(registered, DirectionBook):
            self._by_name = {name: dict(layers) for name, layers in registered.current()._by_name.items()}
            return
        for one in registered:
            self._by_name.setdefault(one.name, {})[one.layer] = one

    def current(self) -> DirectionBook:
        """The present state of the book, for look-ups that must agree with each other."""
        return self

    def find(self, name: str, layer: int | None, hooked: Collection[int]) -> Registered:
        """The direction that ``name`` refers to.

        A name that belongs to exactly one layer may be used at any layer. A name that belongs to several layers means
        the direction at ``layer``, or without ``layer`` the one at a hooked layer.

        Args:
            name: name of the direction.
            layer: the layer to use it at; None if the request names none.
            hooked: the engine's hooked layers.

        Raises:
            UnknownDirection: no direction has the name.
            LayerNotHooked: no layer is given, and the name belongs to several layers, none of them hooked.
            AmbiguousDirection: the name belongs to several layers, and ``layer`` does not select one of them.
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
        """All directions of this name, by layer.

        Raises:
            UnknownDirection: there is none; the message lists registered names.
        """
        if name not in self._by_name:
            raise UnknownDirection(
                f"no direction is named {name!r}; registered: {listed(self._by_name)}.{near(name, self._by_name)} "
                "Register it with register_directions(...), or on a server with PUT /v1/steering/directions/NAME."
            )
        return self._by_name[name]

    def slots(self) -> set[int]:
        """The slots of all registered directions."""
        return {one.slot for layers in self.current()._by_name.values() for one in layers.values()}

    def all(self) -> Iterable[Registered]:
        """All registered directions, sorted by name and layer."""
        for name in sorted(self._by_name):
            yield from (self._by_name[name][layer] for layer in sorted(self._by_name[name]))


class DirectionRegistry(DirectionBook):
    """A ``DirectionBook`` that allocates the slots of a bank.

    A direction that is replaced or removed keeps its slot until ``reclaim``, because requests that were admitted before
    still use it.

    Args:
        capacity: number of slots in the bank.
        hidden_size: D, the required length of every vector.
        registered: the directions that are in the bank already, or a book of them.
        busy: slots not to allocate, although no registered direction is in them.
    """

    def __init__(
        self,
        capacity: int,
        hidden_size: int,
        registered: Iterable[Registered] | DirectionBook = (),
        busy: Collection[int] = (),
    ) -> None:
        super().__init__(registered)
        self.capacity = capacity
        self.hidden_size = hidden_size
        taken = self.slots() | set(busy)
        self._free = [slot for slot in range(capacity - 1, -1, -1) if slot not in taken]
        self._retired: list[int] = []

    def register(self, directions: Sequence[Direction]) -> list[tuple[int, Direction]]:
        """Register all of the directions, or none if one is refused.

        Skips a direction that is registered already with the same content.

        Returns:
            (slot, direction) of each vector that must be written to the bank.

        Raises:
            WrongDimension, BankFull: see ``reserve``.
        """
        writes = self.reserve(directions)
        self.publish(writes)
        return writes

    def reserve(self, directions: Sequence[Direction]) -> list[tuple[int, Direction]]:
        """Take slots for directions, which cannot be found by name until ``publish``.

        Returns:
            As ``register``.

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
            needed = self.capacity - len(self._free) + len(new)
            raise BankFull(
                f"{len(new)} new directions, and {len(self._free)} of {self.capacity} slots are free; start the "
                f"engine with steer_config(max_directions={needed}) or more: a bank of "
                f"{bank_size(needed, self.hidden_size)}."
            )
        return [(self._free.pop(), direction) for direction in new]

    def publish(self, writes: Iterable[tuple[int, Direction]]) -> None:
        """Make reserved directions findable by name. A direction that is replaced keeps its slot until ``reclaim``."""
        for slot, direction in writes:
            layers = self._by_name.setdefault(direction.name, {})
            if direction.layer in layers:
                self._retired.append(layers[direction.layer].slot)
            layers[direction.layer] = Registered.of(direction, slot)
        self.state = object()

    def give_back(self, writes: Iterable[tuple[int, Direction]]) -> None:
        """Free reserved slots again, instead of ``publish``."""
        self._free.extend(slot for slot, _ in writes)

    def remove(self, name: str, layer: int | None = None) -> list[Registered]:
        """Remove a name at ``layer``, or at all its layers, and return the removed directions.

        Raises:
            UnknownDirection: there is no direction of that name, or none at that layer.
        """
        layers = self.layers_of(name)
        if layer is not None and layer not in layers:
            raise UnknownDirection(f"direction {name!r} belongs to layers {sorted(layers)}, not {layer}; name one.")
        removed = [layers.pop(one) for one in ([layer] if layer is not None else sorted(layers))]
        if not layers:
            del self._by_name[name]
        self._retired.extend(one.slot for one in removed)
        self.state = object()
        return removed

    def reclaim(self) -> None:
        """Free the slots of replaced and removed directions. Call it only while no request is in flight."""
        self._free.extend(self._retired)
        self._retired.clear()

    def _has(self, direction: Direction) -> bool:
        known = self._by_name.get(direction.name, {}).get(direction.layer)
        return known is not None and known.content_hash == direction.content_hash


def bank_writes(writes: Sequence[tuple[int, Direction]]) -> Iterator[tuple[list[int], bytes]]:
    """The arguments of the calls of the workers' ``vllm_steer_write`` that write these: mostly one call.

    Yields:
        (slots, their vectors as little-endian float32 numbers, one vector after another).
    """
    if not writes:
        return
    step = max(1, MOST_BYTES_A_MESSAGE // (_ITEM_BYTES * writes[0][1].vector.size))
    for start in range(0, len(writes), step):
        some = writes[start : start + step]
        # join copies each vector once, into its place
        vectors = b"".join([one.vector.astype("<f4", copy=False).data for _, one in some])
        yield [slot for slot, _ in some], vectors


def bank_size(slots: int, hidden_size: int) -> str:
    """The memory of a bank on each worker, for messages."""
    return f"{mib(slots * hidden_size * _ITEM_BYTES)} on each worker ({slots:,} slots × {hidden_size:,} × 4 bytes)"


def registration_memory(num_directions: int, hidden_size: int, capacity: int) -> str:
    """What a registration takes, for the log: memory of this process and of the workers."""
    size = num_directions * hidden_size * _ITEM_BYTES
    return (
        f"registering {num_directions:,} directions of {hidden_size:,} numbers: the vectors take {mib(size)} of this "
        f"process's memory; sending them takes up to {mib(2 * min(size, MOST_BYTES_A_MESSAGE))} more for a moment, "
        f"here and in each worker; the bank, which is there already, takes {bank_size(capacity, hidden_size)}"
    )


def reading_memory(num_directions: int, hidden_size: int) -> str:
    """What the configured directions take while an engine starts, for the log."""
    return (
        f"{num_directions:,} configured directions of {hidden_size:,} numbers: front end and workers each take up to "
        f"three times {mib(num_directions * hidden_size * _ITEM_BYTES)} of host memory while they read them"
    )


def check_room(settings: SteerSettings, hidden_size: int) -> int:
    """Compare the configured files with the bank, before any vector is read or any weight is loaded.

    Args:
        settings: the engine's settings.
        hidden_size: D, for the message.

    Returns:
        The number of configured directions.

    Raises:
        BankFull: they need more slots than there are.
        BadDirectionFile, BadVector: a file cannot be read.
    """
    keys = {key for path in settings.directions for key in direction_keys(path)}
    if len(keys) > settings.max_directions:
        raise BankFull(
            f"the configured files hold {len(keys):,} directions, and max_directions is {settings.max_directions:,}; "
            f"allowed: at most so many. Set max_directions={len(keys)} or more: a bank of "
            f"{bank_size(len(keys), hidden_size)}."
        )
    return len(keys)


def configured_directions(settings: SteerSettings) -> list[Direction]:
    """The directions of the configured files, in the order in which front end and workers both assign slots.

    Raises:
        BadDirectionFile, BadVector: a file cannot be read.
    """
    return [direction for path in settings.directions for direction in load_directions(path)]
