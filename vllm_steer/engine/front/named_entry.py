"""One entry of a request with the registered directions that it names."""

from __future__ import annotations

from typing import Any, NamedTuple

from vllm_steer import spans
from vllm_steer.engine.registry import Registered
from vllm_steer.engine.resolved_spec import Held
from vllm_steer.plan.entry_rows import ABOVE, HELD_SHIFT, PROMPT, Entry
from vllm_steer.schema.steering import Steering


class NamedEntry(NamedTuple):
    """See the module.

    Attributes:
        layer: the layer at which it acts.
        steering: the entry as asked for.
        entry: its row in the tables.
        direction: the direction that it adds.
        condition: the direction of its condition.
        probed: the layer of the condition, if a probe must look there.
        number: its number among the entries with a condition.
        place: its place among the request's entries; -1 for a probe.
    """

    layer: int
    steering: Steering
    entry: Entry
    direction: Registered
    condition: Registered | None = None
    probed: int | None = None
    number: int = -1
    place: int = -1

    @property
    def counted(self) -> Entry:
        """The entry, marked if it has a condition on tokens: for a readout that counts these."""
        is_counted = self.condition is not None and not self.looks_at_prompt
        return self.entry._replace(
            mode=self.entry.mode | (self.number + 1) << HELD_SHIFT if is_counted else self.entry.mode
        )

    @property
    def looks_at_prompt(self) -> bool:
        """Whether its condition is one over the prompt."""
        return bool(self.entry.mode & PROMPT)

    @property
    def acts(self) -> bool:
        """Adding 0·d changes no bit, so it takes no row and shares its KV with unsteered requests."""
        entry = self.entry
        return entry.a != 0.0 or entry.b != 0.0 or self.steering.op == "clamp"

    @property
    def multiplier(self) -> float:
        """|α| of the added vector; ablation adds none."""
        return self.steering.multiplier

    @property
    def added(self) -> float:
        """|α| of what is added whatever the stream is."""
        steering = self.steering
        return 0.0 if steering.relative or steering.op == "scale" else steering.multiplier

    @property
    def growth(self) -> float:
        """The most by which this entry can multiply the length of the stream."""
        steering = self.steering
        if steering.keep_norm or not (steering.relative or steering.op == "scale"):
            return 1.0
        if self.steering.op == "scale":
            return max(1.0, abs(1.0 + self.entry.b))
        return 1.0 + self.multiplier * self.direction.length


def held_by(one: NamedEntry, prompt_len: int) -> Held:
    """What a readout that counts conditions keeps of an entry with a condition."""
    runs = spans.runs(one.steering.span, prompt_len)
    if not one.looks_at_prompt:
        return Held(one.number, one.entry.layer_index, runs)
    is_above = bool(one.entry.mode & ABOVE)
    return Held(one.number, one.entry.layer_index, runs, one.entry.gate, one.entry.threshold, is_above)


def content_of(one: NamedEntry, prompt_len: int) -> tuple[Any, ...]:
    """What an entry does to a token, but for its a: by content, so that it does not depend on names and slots."""
    entry = one.entry
    plain = one.layer, entry.b, entry.mode, one.direction.content_hash
    if one.condition is None:
        return plain
    condition = entry.threshold, one.condition.content_hash, one.probed
    # The tokens do not say how many of them are the prompt.
    return (*plain, *condition, prompt_len) if one.looks_at_prompt else (*plain, *condition)
