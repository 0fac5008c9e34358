"""The result of admission for the workers: a spec with names resolved to slots and layers to layer indices.

A layer index counts the hooked layers from 0. The result travels in ``SamplingParams.extra_args`` as plain lists, which
pass vLLM's msgpack unchanged.
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
"""(layer index, slot, a, b) of one entry; the workers turn it into an ``Entry``."""
RESOLVED_KEY = "vllm_steer_resolved"


@dataclass(frozen=True, slots=True)
class ResolvedReadout:
    """A readout in the form that the workers need.

    Attributes:
        layers: layer numbers in the model.
        layer_indices: the layer indices of ``layers``, in the same order.
        first, end: average over the positions [first, end); ``end`` is None for a span without a fixed end.
        project: (name, layer, slot) of each projection of the mean.
        vectors: whether to return the means themselves.
        trace: (name, layer index, slot) of each direction to project every token onto.
    """

    layers: list[int]
    layer_indices: list[int]
    first: int
    end: int | None
    project: list[tuple[str, int, int]]
    vectors: bool
    trace: list[tuple[str, int, int]]

    def pooling(self) -> Pooling:
        """The same readout in the form that ``batch_plan`` takes."""
        trace = tuple((layer_index, slot) for _, layer_index, slot in self.trace)
        return Pooling(tuple(self.layer_indices), self.first, self.end, trace)

    def on_stage(self, held: Collection[int]) -> ResolvedReadout:
        """The part for a pipeline stage that holds these layer indices; every stage counts the tokens."""
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
    """Everything that a worker and the scheduler need to know about one request.

    Attributes:
        request_id: the caller's id; the internal ids of the request's samples contain it.
        key: the name under which the workers keep the request's readouts. Unlike the id, it is unique.
        prompt_len: number of prompt tokens.
        prompt, generated: entries for prompt tokens and for generated tokens.
        prompt_digest, generated_digest: content hashes of these entries; empty strings where there are none.
        readout: the requested readout, or None.
        contents: (slot, vector hash) of each slot in ``slots``; the worker compares them with its bank.
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
        """Every bank slot that the request reads, each once, sorted."""
        found = {slot for _, slot, _, _ in self.prompt}
        if self.generated != self.prompt:
            found |= {slot for _, slot, _, _ in self.generated}
        if self.readout is not None:
            found |= {slot for _, _, slot in (*self.readout.project, *self.readout.trace)}
        return tuple(sorted(found))

    def dump(self) -> dict[str, Any]:
        """Plain dicts and lists for ``load``. The lists are shared with this object, not copied."""
        return _shallow(self) | {"readout": None if self.readout is None else _shallow(self.readout)}

    @classmethod
    def load(cls, value: dict[str, Any]) -> Resolved:
        """Rebuild an object from the result of ``dump``."""
        readout = value["readout"]
        return cls(**{**value, "readout": None if readout is None else ResolvedReadout(**readout)})

    def plan(self) -> RequestPlan:
        """The same request in the form that ``batch_plan`` takes."""
        prompt = tuple(map(Entry._make, self.prompt))
        return RequestPlan(
            prompt_len=self.prompt_len,
            prompt_entries=prompt,
            generated_entries=prompt if self.generated == self.prompt else tuple(map(Entry._make, self.generated)),
            pooling=None if self.readout is None else self.readout.pooling(),
        )


def _shallow(value: Resolved | ResolvedReadout) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__match_args__}  # __match_args__ holds the field names


def digest(entries: Sequence[tuple[int, float, float, str]]) -> str:
    """SHA-256 of the entries (layer, a, b, vector hash) in order of application; an empty string for no entries.

    Names are left out: one vector under two names gives the same KV, and a name with a new vector gives different KV.
    """
    return sha256(json.dumps(entries).encode()).hexdigest() if entries else ""
