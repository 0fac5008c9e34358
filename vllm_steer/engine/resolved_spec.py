"""What admission hands to the workers: a request's spec with names turned into slots and layers into hook numbers.

It travels beside the wire in ``SamplingParams.extra_args`` as plain lists, which cross vLLM's msgpack unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

from vllm_steer.plan.batch_plan import Pooling, RequestPlan
from vllm_steer.plan.entry_rows import Entry

Row = tuple[int, int, float, float]
"""Layer index, slot, a, b of an entry: what ``Entry`` is on the workers."""
RESOLVED_KEY = "vllm_steer_resolved"


@dataclass(frozen=True, slots=True)
class ResolvedReadout:
    """A readout in the workers' terms.

    Attributes:
        layers: layer numbers, and ``layer_indices`` their hook numbers, in the same order.
        first, end: the positions [first, end) to average; ``end`` None is open.
        project: (name, layer, slot) of each projection.
        vectors: whether the means themselves are asked.
        trace: (name, layer index, slot) of each direction to follow token by token.
    """

    layers: list[int]
    layer_indices: list[int]
    first: int
    end: int | None
    project: list[tuple[str, int, int]]
    vectors: bool
    trace: list[tuple[str, int, int]]

    def pooling(self) -> Pooling:
        """The readout as ``batch_plan`` wants it."""
        trace = tuple((layer_index, slot) for _, layer_index, slot in self.trace)
        return Pooling(tuple(self.layer_indices), self.first, self.end, trace)

    def on_stage(self, held: Collection[int]) -> ResolvedReadout:
        """The part of it that a pipeline stage with these hook numbers sees; at least the count of tokens."""
        kept = [(layer, index) for layer, index in zip(self.layers, self.layer_indices, strict=True) if index in held]
        layers = [layer for layer, _ in kept]
        return replace(
            self,
            layers=layers,
            layer_indices=[index for _, index in kept],
            project=[one for one in self.project if one[1] in layers],
            trace=[one for one in self.trace if one[1] in held],
        )


@dataclass(frozen=True, slots=True)
class Resolved:
    """All that a worker and the scheduler need to know of one request.

    Attributes:
        request_id: the id that the caller knows; internal ids of the samples of one request contain it.
        key: the name under which workers keep the request's readouts. Unlike the id, no other request has it.
        prompt_len: tokens of the prompt.
        prompt, generated: the entries for prompt and for generated tokens.
        prompt_digest, generated_digest: content of these entries; empty where there are none.
        contents: (slot, hash of the vector) of each of ``slots``, for the worker to compare with what it has there.
    """

    request_id: str
    key: str
    prompt_len: int
    prompt: list[Row]
    generated: list[Row]
    prompt_digest: str
    generated_digest: str
    readout: ResolvedReadout | None
    contents: list[tuple[int, str]]

    @property
    def slots(self) -> tuple[int, ...]:
        """Every slot of the bank that the request reads, each once."""
        found = {slot for _, slot, _, _ in self.prompt}
        if self.generated != self.prompt:
            found |= {slot for _, slot, _, _ in self.generated}
        if self.readout is not None:
            found |= {slot for _, _, slot in (*self.readout.project, *self.readout.trace)}
        return tuple(sorted(found))

    def dump(self) -> dict[str, Any]:
        """The plain lists and dicts that ``load`` takes; the lists are this object's own."""
        return _shallow(self) | {"readout": None if self.readout is None else _shallow(self.readout)}

    @classmethod
    def load(cls, value: dict[str, Any]) -> Resolved:
        readout = value["readout"]
        return cls(**{**value, "readout": None if readout is None else ResolvedReadout(**readout)})

    def plan(self) -> RequestPlan:
        """The request as ``batch_plan`` wants it."""
        prompt = tuple(map(Entry._make, self.prompt))
        return RequestPlan(
            prompt_len=self.prompt_len,
            prompt_entries=prompt,
            generated_entries=prompt if self.generated == self.prompt else tuple(map(Entry._make, self.generated)),
            pooling=None if self.readout is None else self.readout.pooling(),
        )


def _shallow(value: Resolved | ResolvedReadout) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__match_args__}  # the names of a dataclass's fields


def digest(entries: Sequence[tuple[int, float, float, str]]) -> str:
    """Hash of what entries do, by content: layer, a, b and the vector's hash of each, in order of application.

    Names do not enter: the same vector under two names gives the same KV, and a name with a new vector does not.
    """
    return sha256(json.dumps(entries).encode()).hexdigest() if entries else ""
