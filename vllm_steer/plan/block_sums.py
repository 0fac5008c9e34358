"""Which KV blocks have sums of their residual stream, where those are kept, and which reader may use them. Pure.

A reader is a request with a readout. The prefix cache spares a request the tokens of the KV blocks that it finds, but
a readout also needs their residual stream. So the workers keep, for blocks that a reader has computed, the sum of the
stream over the block's tokens and the row of the last of them, in numbered slots. The engine's scheduler decides alone
what is in which slot; it tells the workers with each step, so they all do the same.

The key of a sum is the block's hash and the part of the block that the span covers: the hash stands for all tokens up
to the block's end and for everything that shaped their stream, steering included. So sums need not follow the blocks
of the KV cache: whatever becomes of a block, equal content has equal sums. A block without sums counts as a miss for
readers, and for them alone.

Only tokens of the prompt are summed by block: they come many to a step, and are never drafts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Layers = frozenset[int]
PartKey = tuple[Any, int, int]
"""(hash of the block, first token in it, end in it)."""

MOST_SEGMENTS = 1024
"""The most parts of blocks that are summed in one step; the table of segments has room for so many."""


MOST_SLOTS = 1 << 16


def num_slots(mib: int, num_layers: int, hidden_size: int) -> int:
    """How many slots fit into ``mib`` MiB: each has two float32 rows at each of the hooked layers."""
    return min((mib << 20) // (2 * 4 * num_layers * hidden_size), MOST_SLOTS)


@dataclass(frozen=True, slots=True)
class StepBlocks:
    """What the workers do with sums of blocks in one step.

    Attributes:
        loads: request that begins within its span -> slots whose sums, added up, are those of its cached tokens.
        parts: request -> (first position, end, slot) of tokens of this step whose sum is written to a slot.
    """

    loads: dict[str, tuple[int, ...]] = field(default_factory=dict)
    parts: dict[str, tuple[tuple[int, int, int], ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reader:
    """What one request reads.

    Attributes:
        hashes: the hashes of its full blocks; the list may grow while tokens are generated.
        first, end: the positions [first, end); without an end if that is None.
        prompt_len: number of prompt tokens.
        layers: the layer indices that it reads.
    """

    hashes: Sequence[Any]
    first: int
    end: int | None
    prompt_len: int
    layers: Layers


@dataclass(slots=True)
class _Kept:
    """The sums of a part. ``slots``: those to add up, in order. ``user``: the request that last used or wrote them."""

    slots: tuple[int, ...]
    user: str


@dataclass(slots=True)
class _Filling:
    """A reader whose prompt is being computed.

    Attributes:
        written: its parts so far, in order.
        begun: (key, slots, position that is due) of a part that ends in a later step.
    """

    reader: Reader
    written: list[PartKey] = field(default_factory=list)
    begun: tuple[PartKey, tuple[int, ...], int] | None = None


class BlockSums:
    """The table of one scheduler.

    Args:
        block_size: tokens of a block, of those that are hashed.
        slots: number of slots. The least recently used sums make room for new ones.
    """

    def __init__(self, block_size: int, slots: int) -> None:
        self._block_size = block_size
        self._num_slots = slots
        self._beginning: dict[str, tuple[Reader, int, tuple[int, ...]]] = {}
        self._filling: dict[str, _Filling] = {}
        self.clear()

    def clear(self) -> None:
        """Forget all sums, because equal content no longer has an equal stream."""
        self._free = list(range(self._num_slots - 1, -1, -1))
        self._kept: OrderedDict[tuple[PartKey, Layers], _Kept] = OrderedDict()
        self._layers: dict[PartKey, list[Layers]] = {}
        self._filling.clear()
        self._beginning.clear()

    def __len__(self) -> int:
        """Number of parts that have sums."""
        return len(self._kept)

    @property
    def followed(self) -> list[str]:
        """The readers whose next step matters: they begin, or their prompt is being computed."""
        return [*self._beginning, *self._filling] if self._beginning or self._filling else []

    def reach(self, reader: Reader, num_tokens: int) -> int:
        """How many of a reader's first ``num_tokens`` tokens it may take from the cache: as far as there are sums."""
        end = num_tokens if reader.end is None else min(reader.end, num_tokens)
        for key, start, _ in self._parts(reader, reader.first, end):
            if key is None or self._find(key, reader.layers) is None:
                return start
        return num_tokens

    def begin(self, request_id: str, reader: Reader, num_cached: int) -> bool:
        """Note that a reader begins behind ``num_cached`` cached tokens, if the next step has it.

        Returns:
            Whether the sums of these tokens are there. Otherwise nothing is noted.
        """
        end = num_cached if reader.end is None else min(reader.end, num_cached)
        found: list[tuple[PartKey, Layers]] = []
        for key, _, part_end in self._parts(reader, reader.first, end):
            layers = None if key is None or part_end > num_cached else self._find(key, reader.layers)
            if key is None or layers is None:
                return False
            found.append((key, layers))
        slots = tuple(slot for one in found for slot in self._kept[one].slots)
        self._use(request_id, found)
        self._beginning[request_id] = reader, num_cached, slots
        return True

    def schedule(self, spans: Mapping[str, tuple[int, int]], finished: Iterable[str]) -> StepBlocks | None:
        """Decide on a step, once it is known; None if it has nothing to do with sums of blocks.

        Args:
            spans: request -> number of tokens computed before the step and scheduled in it, of those of ``followed``
                that are in the step.
            finished: requests that have ended.
        """
        step = StepBlocks()
        for request_id in finished:
            self._give_up(request_id)
        for request_id, (reader, num_cached, slots) in self._beginning.items():
            if request_id in spans and spans[request_id][0] == num_cached:
                self._give_up(request_id)
                self._filling[request_id] = _Filling(reader)
                if slots:
                    step.loads[request_id] = slots
        self._beginning.clear()
        # Slots of this step's loads may be written in the same step: the workers load before they compute.
        written: set[int] = set()
        for request_id in [one for one in self._filling if one in spans]:
            parts = self._fill(request_id, *spans[request_id], written)
            if parts:
                step.parts[request_id] = parts
        return step if step.loads or step.parts else None

    def _fill(
        self, request_id: str, computed: int, scheduled: int, written: set[int]
    ) -> tuple[tuple[int, int, int], ...]:
        filling = self._filling[request_id]
        reader = filling.reader
        limit = reader.prompt_len if reader.end is None else min(reader.end, reader.prompt_len)
        stop = min(computed + scheduled, limit)
        parts = []
        is_over = stop == limit
        for key, start, end in self._parts(reader, computed, stop):
            if key is None or end > limit:
                break
            at = max(start, computed)
            slots: tuple[int, ...] = ()
            if at > start:
                if filling.begun is None or (filling.begun[0], filling.begun[2]) != (key, at):
                    continue  # its beginning was not seen
                slots, filling.begun = filling.begun[1], None
            if self._find(key, reader.layers) is not None:  # another reader was faster
                self._free += slots
                continue
            slot = self._slot_for(request_id, written)
            if slot is None or len(written) == MOST_SEGMENTS:
                self._free += slots if slot is None else (*slots, slot)
                is_over |= slot is None
                break
            written.add(slot)
            slots = (*slots, slot)
            parts.append((at, min(end, stop), slot))
            if end <= stop:
                self._keep(key, reader.layers, _Kept(slots, request_id))
                filling.written.append(key)
            else:
                filling.begun = key, slots, stop
        if is_over:
            # The first blocks of a prompt go last: without them the others are of no use.
            self._use(request_id, [(key, reader.layers) for key in filling.written if self._has(key, reader.layers)])
            self._give_up(request_id)
        return tuple(parts)

    def _parts(self, reader: Reader, start: int, end: int) -> Iterator[tuple[PartKey | None, int, int]]:
        """(key, first position, end) of the parts that hold a span's tokens [start, end); no key without a hash."""
        size = self._block_size
        start = max(start, reader.first)
        for number in range(start // size, -(-end // size) if start < end else 0):
            first, stop = max(number * size, reader.first), (number + 1) * size
            if reader.end is not None:
                stop = min(stop, reader.end)
            key = None
            if number < len(reader.hashes):
                key = reader.hashes[number], first - number * size, stop - number * size
            yield key, first, stop

    def _find(self, key: PartKey, layers: Layers) -> Layers | None:
        """The layers of sums that have at least these; None if there are none."""
        return next((one for one in self._layers.get(key, ()) if layers <= one), None)

    def _has(self, key: PartKey, layers: Layers) -> bool:
        return (key, layers) in self._kept

    def _use(self, request_id: str, found: Sequence[tuple[PartKey, Layers]]) -> None:
        """Mark these sums, of consecutive blocks, as used last, the first of them very last."""
        for one in reversed(found):
            self._kept[one].user = request_id
            self._kept.move_to_end(one)

    def _keep(self, key: PartKey, layers: Layers, kept: _Kept) -> None:
        for fewer in [one for one in self._layers.get(key, ()) if one < layers]:
            self._drop((key, fewer))
        self._kept[key, layers] = kept
        self._layers.setdefault(key, []).append(layers)

    def _drop(self, one: tuple[PartKey, Layers]) -> None:
        key, layers = one
        self._free += self._kept.pop(one).slots
        self._layers[key].remove(layers)
        if not self._layers[key]:
            del self._layers[key]

    def _slot_for(self, request_id: str, written: set[int]) -> int | None:
        """A slot to write to; None if only sums of this request or of this step could make room."""
        # A slot that was freed in the step that writes it would be written twice in that step.
        while not self._free or self._free[-1] in written:
            oldest = next(iter(self._kept), None)
            if oldest is None:
                return None
            kept = self._kept[oldest]
            if kept.user == request_id or not written.isdisjoint(kept.slots):
                return None
            self._drop(oldest)
        return self._free.pop()

    def _give_up(self, request_id: str) -> None:
        filling = self._filling.pop(request_id, None)
        if filling is not None and filling.begun is not None:
            self._free += filling.begun[1]
