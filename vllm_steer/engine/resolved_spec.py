"""The result of admission for the workers: a spec with names resolved to slots and layers to layer indices.

A layer index counts the hooked layers from 0. The result travels in ``SamplingParams.extra_args`` as plain dicts, lists
and bytes, which pass vLLM's msgpack unchanged. The entries of a window are one bytes object, see ``plan.entry_rows``.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from hashlib import sha256
from operator import attrgetter
from typing import Any, NamedTuple

from vllm_steer.plan.batch_plan import Pooling, RequestPlan
from vllm_steer.plan.entry_rows import Entry, Packed, slots_of, unpack
from vllm_steer.plan.trace_columns import HELD

RESOLVED_KEY = "vllm_steer_resolved"


class Projected(NamedTuple):
    """A direction onto which a readout's mean is projected; ``layer`` is the model's layer number."""

    name: str
    layer: int
    slot: int


class Traced(NamedTuple):
    """A direction onto which every token is projected, after hooked layer number ``layer_index``.

    ``layer`` is the model's layer number; ``is_shown`` is False where only the largest projection is asked for.
    """

    name: str
    layer_index: int
    slot: int
    layer: int = -1
    is_shown: bool = True


class Held(NamedTuple):
    """An entry whose condition a readout tells of.

    Attributes:
        number: its number among the request's entries with a condition, in the order given.
        layer_index: the hooked layer at which it acts.
        runs: the positions [first, end) that it covers, ``end`` None for no end.
        gate, threshold: of a condition over the prompt, as in its ``Entry``; gate -1 for one on tokens.
        is_above: of a condition over the prompt, whether it holds above the threshold.
    """

    number: int
    layer_index: int
    runs: Sequence[Sequence[int | None]]
    gate: int = -1
    threshold: float = 0.0
    is_above: bool = False

    def within(self, first: int) -> list[slice]:
        """The tokens that it covers, counted from position ``first`` on."""
        ends = ((start or 0, end) for start, end in self.runs)
        return [slice(max(start - first, 0), None if end is None else max(end - first, 0)) for start, end in ends]


class Watched(NamedTuple):
    """A watch on the generated tokens: their projection after hooked layer number ``layer_index``.

    It holds once ``patience`` tokens in a row are above (below, if not ``is_above``) ``bound``. ``is_stop`` tells
    whether the request then ends.
    """

    name: str
    layer_index: int
    slot: int
    layer: int
    is_above: bool
    bound: float
    patience: int
    is_stop: bool


class Window(NamedTuple):
    """Tokens of a request that are all steered alike.

    Attributes:
        start: position of the first one; the last is before the next window's first.
        packed: their steering; empty for none.
        digest: content hash of it; an empty string for no entries.
    """

    start: int
    packed: Packed
    digest: str

    @property
    def entries(self) -> list[Entry]:
        """The steering as ``Entry`` objects."""
        return unpack(self.packed)


@dataclass(frozen=True, slots=True)
class ResolvedReadout:
    """A readout in the form that the workers need.

    Attributes:
        layers: layer numbers in the model.
        layer_indices: the layer indices of ``layers``, in the same order.
        first, end: average over the positions [first, end); ``end`` is None for a span without a fixed end.
        project: the projections of the pooled vector.
        vectors: whether to return the pooled vectors themselves.
        trace: the projections of every token.
        pool: see ``Readout``.
        watch: the watches on the generated tokens.
        watch_first: position of the first generated token.
        held: the entries whose conditions to tell of; ``num_held``, all entries with a condition, or None for not
            telling.
    """

    layers: list[int]
    layer_indices: list[int]
    first: int
    end: int | None
    project: list[Projected]
    vectors: bool
    trace: list[Traced]
    pool: str = "mean"
    watch: list[Watched] = field(default_factory=list)
    watch_first: int = 0
    held: list[Held] = field(default_factory=list)
    num_held: int | None = None

    @property
    def counted(self) -> list[Held]:
        """The conditions on tokens of ``held``, each of which takes a trace column."""
        return [one for one in self.held if one.gate < 0]

    @property
    def directions(self) -> tuple[Projected | Traced | Watched, ...]:
        """Everything that the readout projects onto."""
        return (*self.project, *self.trace, *self.watch)

    @property
    def stop(self) -> Watched | None:
        """The watch that ends the request."""
        return next((one for one in self.watch if one.is_stop), None)

    @classmethod
    def load(cls, value: dict[str, Any]) -> ResolvedReadout:
        """Rebuild an object from its part of the result of ``Resolved.dump``."""
        return cls(
            **value
            | {
                "project": list(map(Projected._make, value["project"])),
                "trace": list(map(Traced._make, value["trace"])),
                "watch": list(map(Watched._make, value["watch"])),
                "held": list(map(Held._make, value["held"])),
            }
        )

    def pooling(self) -> Pooling:
        """The same readout in the form that ``batch_plan`` takes."""
        trace = tuple((one.layer_index, one.slot) for one in self.trace)
        watch = tuple((one.layer_index, one.slot) for one in self.watch)
        return Pooling(
            tuple(self.layer_indices),
            self.first,
            self.end,
            trace,
            watch,
            self.watch_first,
            stores_rows=self.pool == "rows",
            held=tuple((HELD, one.number) for one in self.counted),
        )

    def on_stage(self, held: AbstractSet[int]) -> ResolvedReadout:
        """The part for a pipeline stage that holds these layer indices; every stage counts the tokens."""
        read = {*self.layer_indices, *(one.layer_index for one in self.trace), *(one.layer_index for one in self.watch)}
        if read.union(one.layer_index for one in self.held) <= held:
            return self
        kept = [(layer, index) for layer, index in zip(self.layers, self.layer_indices, strict=True) if index in held]
        layers = [layer for layer, _ in kept]
        return replace(
            self,
            layers=layers,
            layer_indices=[index for _, index in kept],
            project=[one for one in self.project if one.layer in layers],
            trace=[one for one in self.trace if one.layer_index in held],
            watch=[one for one in self.watch if one.layer_index in held],
            held=[one for one in self.held if one.layer_index in held],
        )


def sums_suffice(readout: dict[str, Any]) -> bool:
    """Whether a dumped readout needs no more of its tokens than their sum and the last of them."""
    return readout["pool"] in ("mean", "last") and not readout["trace"] and not readout["held"]


@dataclass(frozen=True, slots=True)
class Resolved:
    """Everything that a worker and the scheduler need to know about one request.

    Attributes:
        request_id: the caller's id; the internal ids of the request's samples contain it.
        key: the name under which the workers keep the request's readouts. Unlike the id, it is unique.
        prompt_len: number of prompt tokens.
        windows: the windows in order, the first of which starts at 0; neighbours differ.
        readout: the requested readout, or None.
        contents: (slot, vector hash) of each slot in ``slots``; the worker compares them with its bank.
        looks_at_prompt: whether a condition does, so that every prompt token must be computed.
    """

    request_id: str
    key: str
    prompt_len: int
    windows: list[Window]
    readout: ResolvedReadout | None
    contents: list[tuple[int, str]]
    looks_at_prompt: bool = False

    @property
    def slots(self) -> tuple[int, ...]:
        """Every bank slot that the request reads, each once, sorted."""
        found: set[int] = set()
        for window in self.windows:
            found |= slots_of(window.packed)
        if self.readout is not None:
            found.update(one.slot for one in self.readout.directions)
        return tuple(sorted(found))

    def dump(self) -> dict[str, Any]:
        """Plain dicts and lists for ``load``. The lists are shared with this object, not copied."""
        dumped = _dumped(self)
        if self.readout is not None:
            dumped["readout"] = _dumped(self.readout)
        return dumped

    @classmethod
    def load(cls, value: dict[str, Any]) -> Resolved:
        """Rebuild an object from the result of ``dump``."""
        windows = list(map(Window._make, value["windows"]))
        readout = None if value["readout"] is None else ResolvedReadout.load(value["readout"])
        return cls(**{**value, "windows": windows, "readout": readout})

    def plan(self) -> RequestPlan:
        """The same request in the form that ``batch_plan`` takes."""
        windows = tuple((start, packed) for start, packed, _ in self.windows)
        return RequestPlan(
            windows=windows if any(packed for _, packed in windows) else (),
            pooling=None if self.readout is None else self.readout.pooling(),
            summed_prompt=self.prompt_len if self.looks_at_prompt else 0,
        )


def resolved_of(request: Any) -> dict[str, Any] | None:
    """``Resolved.dump`` of a request of vLLM's scheduler; None for one without steering and readout."""
    params = request.sampling_params
    return params.extra_args.get(RESOLVED_KEY) if params is not None and params.extra_args else None


def _dumped(value: Resolved | ResolvedReadout) -> dict[str, Any]:
    names, get = _FIELDS[type(value)]
    return dict(zip(names, get(value), strict=True))


class Digest:
    """Hashes what entries do to a token, by content: entries that differ in their a alone share an object.

    Names are left out: one vector under two names gives the same KV, and a name with a new vector gives different KV.

    Args:
        rest: of each entry, in the order of application, everything but its a, as numbers and hashes.
    """

    def __init__(self, rest: Sequence[Sequence[Any]]) -> None:
        self._begun = sha256(json.dumps(rest).encode())
        self._a_N = struct.Struct(f"<{len(rest)}d")

    def of(self, a_N: Sequence[float]) -> str:
        """The SHA-256 of the entries with these a, whose bits count; an empty string for no entries."""
        if not a_N:
            return ""
        hashed = self._begun.copy()
        hashed.update(self._a_N.pack(*a_N))  # behind JSON text of known end, so no two inputs are alike
        return hashed.hexdigest()


_FIELDS = {one: (one.__match_args__, attrgetter(*one.__match_args__)) for one in (Resolved, ResolvedReadout)}
