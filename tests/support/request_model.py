"""A model of one request, for comparison with the planner: what it asked for, and what each of its tokens must get.

Nothing here knows of steps, rows, slots or accumulators, and no code is shared with the planner.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import strategies as st

from tests.support.runner_stand_ins import BLOCKS, SIZE
from tests.support.span_reference import parts_of, positions
from vllm_steer.schema.conditions import Watch, When
from vllm_steer.schema.readout import Readout
from vllm_steer.schema.steering import Steering

HOOKED = (1, 3)
HOMES = {"a": 1, "b": 3, "c": 1, "both": 1}  # name -> layer; "both" stands at layer 3 too
MOST_TRACED = 2
CONTENT = np.random.default_rng(0).standard_normal((997, BLOCKS + 1, SIZE)).astype(np.float32)


@dataclass(eq=False)
class Life:
    """One sample: its request, in terms that the planner does not know, and its progress.

    Attributes:
        entries: (layer, entry, vector, layer and vector of its condition), in the order given.
        projected, traced, largest: the vectors that its names stood for when it came.
        watched: each of its watches with the vector and the layer that it looks at.
        has_columns: whether there were trace columns for it.
        started, running: the worker knows it; it has not been preempted.
        drafted: draft tokens in its last step.
        steps: (known tokens, right draft tokens) of its last two steps.
        has_gap: the engine has skipped a token.
        has_sums: its whole prompt has been computed once.
        text: which text its prompt is the beginning of.
        steered_as: names its steering; equal for equal steering.
        may_fail: the worker may have given its sums up, see ``Schedule.empty_step``.
    """

    number: int
    index: int
    params: Any
    prompt_len: int
    total: int
    entries: list[tuple[int, Steering, Any, tuple[int, Any] | None]]
    readout: Readout | None
    projected: dict[tuple[str, int], Any] = field(default_factory=dict)
    traced: dict[str, tuple[int, Any]] = field(default_factory=dict)
    largest: dict[tuple[str, int], Any] = field(default_factory=dict)
    watched: list[tuple[Watch, int, Any]] = field(default_factory=list)
    has_columns: bool = True
    computed: int = 0
    started: bool = False
    running: bool = False
    drafted: int = 0
    steps: tuple[tuple[int, int], ...] = ()
    has_gap: bool = False
    has_sums: bool = False
    may_fail: bool = False
    outcomes: dict[tuple[int, int], bool] = field(default_factory=dict)
    streams: dict[tuple[int, bool], list[Any]] = field(default_factory=dict)
    text: int = 0
    steered_as: Any = None

    def __repr__(self) -> str:
        return self.request_id

    @property
    def external_id(self) -> str:
        """The id that the caller gave the request."""
        return f"request-{self.number}"

    @property
    def request_id(self) -> str:
        """The engine's id of this sample."""
        return f"{self.external_id}-x7" if self.index == 0 else f"{self.index}_{self.external_id}-x7"

    def content(self, position: int, is_wrong: bool = False) -> Any:
        """float32 (BLOCKS + 1, SIZE): a token's embedding and what each block adds; ``is_wrong``: of a wrong draft."""
        sample = 0 if position < self.prompt_len else self.index * 29
        return CONTENT[(self.text * 53 + sample + position + 500 * is_wrong) % len(CONTENT)]

    def hashes(self, size: int) -> list[Any]:
        """What stands for each of its blocks of ``size`` tokens: the text, and how its tokens are steered."""
        own = self.text, str(self.steered_as)
        ends = range(size, self.total + 1, size)
        return [(*own, end) if end <= self.prompt_len else (*own, self.prompt_len, self.index, end) for end in ends]

    def stream(self, position: int, is_wrong: bool = False) -> list[Any]:
        """The float64 (SIZE,) stream of one token after each block, by the definition of the ops."""
        if (position, is_wrong) not in self.streams:
            content = self.content(position, is_wrong).astype(np.float64)
            h, streams = content[0], []
            for block in range(BLOCKS):
                h = h + content[block + 1]
                for layer, entry, d, condition in self.entries:
                    if layer == block and position in positions(entry.span, self.prompt_len, position + 1):
                        if entry.when is not None and condition is not None:
                            if entry.when.over == "prompt":
                                prompt = (self.stream(p) if p != position else streams for p in range(self.prompt_len))
                                seen = np.mean([one[condition[0]] @ condition[1] for one in prompt])
                            else:
                                seen = (h if condition[0] == block else streams[condition[0]]) @ condition[1]
                            bounds = entry.when.above, entry.when.below
                            holds = bool(seen < bounds[1] if bounds[0] is None else seen > bounds[0])
                            if not is_wrong:
                                self.outcomes[id(entry), position] = holds
                            if not holds:
                                continue
                        h = steered_by(entry, h, d)
                streams.append(h)
            self.streams[position, is_wrong] = streams
        return self.streams[position, is_wrong]

    def first_steered_block(self, position: int) -> int:
        """The first block that steers the token at a position; BLOCKS where none does."""
        entries = ((layer, entry.span) for layer, entry, *_ in self.entries)
        held = (layer for layer, span in entries if position in positions(span, self.prompt_len, position + 1))
        return min(held, default=BLOCKS)

    @property
    def left_to_sum(self) -> int:
        """Prompt tokens that must come before any other, and not from the prefix cache; 0 if none must."""
        return self.prompt_len - self.computed if self.looks_at_prompt and not self.has_sums else 0

    @property
    def looks_at_prompt(self) -> bool:
        """Whether one of its conditions is over the prompt."""
        return any(entry.when is not None and entry.when.over == "prompt" for _, entry, *_ in self.entries)

    @property
    def has_row_before_last(self) -> bool:
        """Whether the row of the token before its last one is still known: no step has computed it with a later one."""
        (before, last) = ((0, 0), (0, 0), *self.steps)[-2:]
        return last[1] > 0 or (last[0] == 1 and before[1] == 0)

    @property
    def columns(self) -> set[tuple[int, tuple[float, ...]]]:
        """What it needs a trace column for: (layer, vector)."""
        wanted = [*self.traced.values(), *((layer, vector) for (_, layer), vector in self.largest.items())]
        wanted += [(layer, vector) for _, layer, vector in self.watched]
        counted = {(-1, (float(number),)) for number, entry in self.conditional if entry.when.over == "token"}
        return {(layer, tuple(vector)) for layer, vector in wanted} | counted

    @property
    def conditional(self) -> list[tuple[int, Any]]:
        """The entries whose conditions the readout tells of, by their number among those with a condition."""
        if self.readout is None or not self.readout.held:
            return []
        entries = [entry for _, entry, *_ in self.entries if entry.when is not None]
        return [(number, one) for number, one in enumerate(entries) if one.op == "clamp" or one.coefficients != (0, 0)]

    def held(self, positions_read: list[int]) -> list[int | bool | None]:
        """What the readout tells of the conditions over these positions."""
        told: list[int | bool | None] = [None for _, entry, *_ in self.entries if entry.when is not None]
        for number, entry in self.conditional:
            covered = positions(entry.span, self.prompt_len, self.total)
            told[number] = sum(self.holds(entry, one) for one in positions_read if one in covered)
            if entry.when.over == "prompt":
                first = min(positions(entry.span, self.prompt_len, self.prompt_len + 9))
                told[number] = self.holds(entry, first) if self.has_sums else None
        return told

    def holds(self, entry: Steering, position: int) -> bool:
        """Whether the condition of one of its entries holds at a position that the entry covers."""
        self.stream(position)
        return self.outcomes[id(entry), position]

    @property
    def first_read(self) -> int:
        """The first position that the readout covers, which a reader must compute; far away without a readout."""
        if self.readout is None:
            return 1 << 30
        first = min(self.span(self.prompt_len + 30))
        return min(first, self.prompt_len) if self.watched else first

    def crossing(self, watch: Watch, layer: int, vector: Any, computed: int) -> tuple[int, float] | None:
        """Position and value with which a watch holds first among the first ``computed`` tokens, or None."""
        in_a_row = 0
        for position in range(self.prompt_len, computed):
            value = float(self.stream(position)[layer] @ vector)
            is_beyond = value > watch.above if watch.above is not None else value < (watch.below or 0.0)
            in_a_row = in_a_row + 1 if is_beyond else 0
            if in_a_row == watch.patience:
                return position, value
        return None

    def span(self, computed: int) -> list[int]:
        """The positions that the readout covers once ``computed`` tokens have been through the model."""
        assert self.readout is not None
        held = sorted(positions(self.readout.span, self.prompt_len, computed))
        return [one for one in held if one >= self.readout.skip_first]


def steered_by(entry: Steering, h: Any, d: Any) -> Any:
    """The float64 stream h after an entry with the direction d, by the definition of its op."""
    length, along = np.linalg.norm(h), h @ d
    unit = length if entry.relative else 1.0
    if entry.op == "clamp":
        low, high = (bound if bound is None else bound * unit for bound in (entry.low, entry.high))
        wanted = np.clip(along, low, high)
    else:
        assert entry.alpha is not None
        wanted = {
            "add": along + entry.alpha * unit,
            "ablate": along - entry.alpha * along,
            "set": entry.alpha * unit,
            "scale": entry.alpha * along,
        }[entry.op]
    moved = h + (wanted - along) * d
    return moved * length / np.linalg.norm(moved) if entry.keep_norm else moved


STEERED_SPANS = [
    *("all", "prompt", "generated", "response", "prompt[-2:]", "prompt[1:]"),
    *("all[2:5]", "generated[:2]", "generated[1:]", "prompt[0] + generated[1]"),
]
BEHIND_PROMPT = ["generated", "generated[:2]", "generated[1:]", "response", "prompt[-1]", "prompt[-1] + generated[1]"]
READ_SPANS = ["all", "prompt", "generated", "response", "prompt[-2:]", "prompt[:2]", "all[1:]", "generated[1:]"]


def spans_of(spans: list[str], prompt_len: int) -> st.SearchStrategy[str]:
    """Draw one of these spans of which no part is empty with this prompt."""
    return st.sampled_from([span for span in spans if all(parts_of(span, prompt_len, prompt_len + 9))])


@st.composite
def steerings(draw: st.DrawFn, prompt_len: int) -> Steering:
    """Draw an allowed steering entry over the names of HOMES."""
    name = draw(st.sampled_from(sorted(HOMES)))
    op = draw(st.sampled_from(["add", "add", "ablate", "set", "scale", "clamp"]))
    fields: dict[str, Any] = {"alpha": draw(st.sampled_from([-4.0, -1.0, 2.0, 5.0]))}
    if op == "ablate":
        fields = {"alpha": draw(st.sampled_from([None, 0.5, 2.0]))}
    if op == "clamp":
        fields = draw(st.sampled_from([{"low": 1.0}, {"high": -0.5}, {"low": -0.2, "high": 0.3}]))
    layer = draw(st.sampled_from(HOOKED if name == "both" else (None, *HOOKED)))
    when, span = None, draw(spans_of(STEERED_SPANS, prompt_len))
    if draw(st.integers(0, 2)) == 0:
        acts_at = HOMES[name] if layer is None else layer
        # Thresholds that no projection of these streams comes near.
        bound = draw(st.sampled_from([{"above": 0.1234567}, {"below": -0.7654321}, {"above": -9.0}]))
        seen_at = draw(st.sampled_from([1, acts_at]))
        over = draw(st.sampled_from(["token", "prompt"]))
        if over == "prompt":
            span = draw(st.sampled_from(BEHIND_PROMPT if seen_at < acts_at else BEHIND_PROMPT[:3]))
        when = When(draw(st.sampled_from(["a", "b", "c"])), layer=seen_at, over=over, **bound)
    return Steering(
        name,
        **fields,
        when=when,
        relative=op in ("add", "set", "clamp") and draw(st.integers(0, 3)) == 0,
        keep_norm=draw(st.integers(0, 3)) == 0,
        layer=layer,
        op=op,
        span=span,
    )


@st.composite
def readouts(draw: st.DrawFn, prompt_len: int, num_counted: int = 0) -> Readout:
    """Draw an allowed readout over HOOKED layers, of a request with so many conditions on tokens."""
    held = num_counted <= MOST_TRACED and draw(st.booleans())
    most_traced = MOST_TRACED - num_counted * held
    layers = draw(st.lists(st.sampled_from(HOOKED), min_size=1, unique=True))
    span = draw(spans_of(READ_SPANS, prompt_len))
    own = [name for name in sorted(HOMES) if name == "both" or HOMES[name] in layers]
    pool = draw(
        st.sampled_from(["mean", "mean", "mean", "last", "last", "rows", *(["max"] * (most_traced == MOST_TRACED))])
    )
    project = draw(
        st.lists(st.sampled_from(own), min_size=pool == "max", max_size={"max": 1, "rows": 0}.get(pool, 9), unique=True)
    )
    # "both" takes two columns
    most = most_traced if pool != "max" else MOST_TRACED - len(project) - (project == ["both"] and len(layers) == 2)
    is_traced = draw(st.integers(0, 2)) == 0  # one that is not may begin within its span
    trace = draw(st.lists(st.sampled_from(["a", "b", "c"]), max_size=most, unique=True)) if is_traced else []
    watches: list[Watch] = []
    for name in draw(st.lists(st.sampled_from(["a", "b", "c"]), max_size=2)) if pool != "max" else []:
        if len({*trace, name, *(one.direction for one in watches)}) <= most_traced:
            # Bounds that no projection of these streams comes near.
            bound = draw(st.sampled_from([{"above": 0.1234567}, {"below": 0.7654321}, {"above": 99.0}]))
            watches.append(Watch(name, patience=draw(st.integers(1, 3)), **bound))
    has_stop = bool(watches) and draw(st.booleans())
    if watches and pool == "mean" and not project and (trace or held) and draw(st.booleans()):
        layers = []
    return Readout(
        layers,
        span=span,
        project=project,
        vectors=not project or draw(st.booleans()),
        skip_first=0 if span not in ("prompt", "all") else draw(st.integers(0, prompt_len - 1)),
        trace=trace,
        pool=pool,
        stop=watches[0] if has_stop else None,
        flag=watches[has_stop:],
        held=held,
    )
