"""Resolves the entries of a request: names to slots, layers to layer indices, conditions to what they look at."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from operator import attrgetter

from vllm_steer import spans
from vllm_steer.engine.front.hooks import Hooks
from vllm_steer.engine.front.named_entry import NamedEntry
from vllm_steer.engine.registry import DirectionBook
from vllm_steer.errors import BadCondition, BadOp, SteerError
from vllm_steer.plan.entry_rows import (
    ABOVE,
    BELOW,
    CLAMP,
    KEEP_NORM,
    MOST_PROBES,
    PROBE,
    PROMPT,
    RELATIVE,
    STORED,
    Entry,
)
from vllm_steer.schema.checks import MOST_FLOAT32
from vllm_steer.schema.conditions import When, bound_of
from vllm_steer.schema.steering import Steering

_PROBING = Steering("probe", 0.0)  # what a probe counts as: an entry that changes nothing


class EntryResolution:
    """Resolves the entries of one engine's requests.

    Args:
        hooks: its hooked layers.
        num_stages: pipeline stages, whose layers see nothing of each other but the stream.
    """

    def __init__(self, hooks: Hooks, num_stages: int) -> None:
        self._hooks = hooks
        self._num_stages = num_stages

    def resolve(
        self, book: DirectionBook, steering: Sequence[Steering], prompt_len: int
    ) -> tuple[list[NamedEntry], list[NamedEntry]]:
        """The entries in the order in which they act, and the probes that their conditions read, by number.

        Args:
            book: the directions.
            steering: the entries as asked for.
            prompt_len: number of prompt tokens.

        Raises:
            SteerError: an entry is refused; ``param`` names its place.
        """
        entries = []
        for place, one in enumerate(steering):
            try:
                entries.append(self._entry(book, one, place, prompt_len))
            except SteerError as error:
                error.param = f"steering[{place}]"
                raise
        is_conditional = any(one.condition is not None for one in entries)
        if is_conditional:
            number = count()
            entries = [one if one.condition is None else one._replace(number=next(number)) for one in entries]
        # Entries at different layers do not interact, so digest and workers get only the order within a layer.
        entries.sort(key=attrgetter("layer"))
        return self._with_probes(entries) if is_conditional else (entries, [])

    def _entry(self, book: DirectionBook, steering: Steering, place: int, prompt_len: int) -> NamedEntry:
        direction = book.find(steering.direction, steering.layer, self._hooks.index_of)
        layer = direction.layer if steering.layer is None else steering.layer
        hook = self._hooks.index(layer)
        if steering.op != "add" and not direction.is_unit:
            raise BadOp(
                f"op {steering.op!r} was asked of {steering.direction!r}, whose norm is not 1; allowed: op 'add', "
                "or a unit direction. Register Direction(...).normalised()."
            )
        mode = 0
        if steering.relative or steering.keep_norm or steering.op == "clamp":
            mode = RELATIVE * steering.relative | KEEP_NORM * steering.keep_norm | CLAMP * (steering.op == "clamp")
        a, b = steering.coefficients
        # -0.0 counts as 0.0, since what is remembered by value cannot tell them apart.
        resolved = Entry(hook, direction.slot, a + 0.0, b + 0.0, mode)
        entry = NamedEntry(layer, steering, resolved, direction, place=place)
        return entry if steering.when is None else self._conditional(book, entry, steering.when, prompt_len)

    def _conditional(self, book: DirectionBook, named: NamedEntry, when: When, prompt_len: int) -> NamedEntry:
        condition, layer = self._hooks.look(book, when)
        if layer > named.layer:
            raise BadCondition(
                f"when looks at layer {layer} and its entry acts at layer {named.layer}; allowed: the entry's layer or "
                "an earlier hooked one, since later ones are not computed yet. Choose one of these."
            )
        if layer < named.layer and self._num_stages > 1:
            raise BadCondition(
                f"when looks at layer {layer} and its entry acts at layer {named.layer}; allowed with pipeline "
                "parallelism: the entry's own layer, since stages hand on nothing but the stream. Look there."
            )
        bound, is_above = bound_of(when)
        bound += 0.0
        mode = named.entry.mode | (ABOVE if is_above else BELOW)
        if when.over == "prompt":
            if layer == named.layer and spans.reach_back(named.steering.span):
                raise BadCondition(
                    f"an entry at layer {layer} with span {named.steering.span!r} has a condition over the prompt at "
                    "the same layer, where the prompt's last token is not known before it is steered; allowed: a "
                    "condition at an earlier hooked layer, or generated and its slices. Use one of these."
                )
            # The device compares the sum over the prompt with so many times the bound.
            total = min(max(bound * prompt_len, -MOST_FLOAT32), MOST_FLOAT32)
            entry = named.entry._replace(mode=mode | PROMPT, threshold=total)
            return named._replace(entry=entry, condition=condition, probed=layer)
        if layer == named.layer:
            entry = named.entry._replace(mode=mode, gate=condition.slot, threshold=bound)
            return named._replace(entry=entry, condition=condition)
        entry = named.entry._replace(mode=mode | STORED, threshold=bound)
        return named._replace(entry=entry, condition=condition, probed=layer)

    def _with_probes(self, entries: Sequence[NamedEntry]) -> tuple[list[NamedEntry], list[NamedEntry]]:
        """The entries, which now say what probes their conditions read, and these probes by number.

        A probe stores what a condition at a later layer looks at. Conditions on the same direction and layer share it.
        """
        probes: dict[tuple[int, int], NamedEntry] = {}
        linked = []
        for named in entries:
            if named.probed is not None and named.condition is not None and named.acts:
                key = named.probed, named.condition.slot
                if key not in probes:
                    entry = Entry(
                        self._hooks.index(named.probed), named.condition.slot, 0.0, 0.0, PROBE, gate=len(probes)
                    )
                    probes[key] = NamedEntry(named.probed, _PROBING, entry, named.condition)
                named = named._replace(entry=named.entry._replace(gate=probes[key].entry.gate))
            linked.append(named)
        if len(probes) > MOST_PROBES:
            raise BadCondition(
                f"the conditions look at {len(probes)} pairs of a direction and an earlier layer, or a layer of the "
                f"prompt; allowed: {MOST_PROBES}. Use fewer, or conditions on tokens at their entries' own layers."
            )
        return linked, list(probes.values())
