"""Admission: checks a request's spec against its engine before any part of the request is scheduled.

Every mistake in a spec is refused here, so no user's mistake can cause a failure in a worker. A valid spec is resolved
to slots and layer indices.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count, groupby
from math import prod
from operator import attrgetter
from typing import Any, NamedTuple

from vllm.v1.engine.input_processor import InputProcessor

from vllm_steer import spans
from vllm_steer.engine.front.slots_in_flight import InFlight
from vllm_steer.engine.patching import Attribute
from vllm_steer.engine.registry import DirectionBook, DirectionRegistry, Registered, configured_directions
from vllm_steer.engine.resolved_spec import Held, Projected, Resolved, ResolvedReadout, Traced, Watched, Window, digest
from vllm_steer.errors import (
    AmbiguousDirection,
    BadAlpha,
    BadCondition,
    BadOp,
    BadReadout,
    BadSpan,
    LayerNotHooked,
    NotConfigured,
    TooManyEntries,
)
from vllm_steer.ops.stream_range import LARGEST_ADDITION, LARGEST_GROWTH
from vllm_steer.plan.entry_rows import (
    ABOVE,
    BELOW,
    CLAMP,
    HELD_SHIFT,
    KEEP_NORM,
    MOST_PROBES,
    PROBE,
    PROMPT,
    RELATIVE,
    STORED,
    Entry,
)
from vllm_steer.schema.checks import MOST_FLOAT32
from vllm_steer.schema.conditions import Watch, When, bound_of
from vllm_steer.schema.readout import Readout
from vllm_steer.schema.request_spec import RequestSpec
from vllm_steer.schema.steering import Steering
from vllm_steer.settings import SteerSettings

_REMEMBERED_READOUTS = 1 << 20
_PROBING = Steering("probe", 0.0)  # what a probe counts as: an entry that changes nothing

_keys = count()
_KEY_PREFIX = os.urandom(6).hex()  # keeps keys unique: workers may serve several front-end processes


def _new_key() -> str:
    return f"{_KEY_PREFIX}{next(_keys):x}"


@dataclass(frozen=True, slots=True)
class Asked:
    """A request's spec on its way through this process; it replaces the wire form in ``extra_args``.

    Attributes:
        spec: the parsed spec.
        key: the unique name under which the workers will keep the request's readouts.
        admitted: called when the request is admitted.
    """

    spec: RequestSpec
    key: str = field(default_factory=_new_key)
    admitted: Callable[[], object] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Asked:
        return self  # vLLM deep-copies a request's parameters


class _NamedEntry(NamedTuple):
    """One entry of a request, and the registered directions that it names."""

    layer: int
    steering: Steering
    entry: Entry
    direction: Registered
    condition: Registered | None = None
    probed: int | None = None  # the layer of the condition, if a probe must look there
    number: int = -1  # among the entries with a condition

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
        return self.steering.op == "clamp" or (self.entry.a, self.entry.b) != (0.0, 0.0)

    @property
    def multiplier(self) -> float:
        """|α| of the added vector; ablation adds none."""
        return self.steering.multiplier

    @property
    def added(self) -> float:
        """|α| of what is added whatever the stream is."""
        return 0.0 if self.steering.is_multiple else self.steering.multiplier

    @property
    def growth(self) -> float:
        """The most by which this entry can multiply the length of the stream."""
        if not self.steering.is_multiple or self.steering.keep_norm:
            return 1.0
        if self.steering.op == "scale":
            return max(1.0, abs(1.0 + self.entry.b))
        return 1.0 + self.multiplier * self.direction.length


class Admission:
    """Checks and resolves the requests of one engine.

    Args:
        settings: the engine's settings.
        hidden_size: D, the required length of every direction.
        dtype: dtype of the residual stream: ``float16``, ``bfloat16`` or ``float32``.
        num_stages: pipeline stages, whose layers see nothing of each other but the stream.

    Attributes:
        registry: the directions that requests can name.
        in_flight: counts the slots that running requests use; None if slots are not reused while requests run.
        asked: request id -> its spec, for ``collect_readouts``: the last million requests with a readout, oldest first.

    Raises:
        BadDirectionFile, BadVector, WrongDimension, BankFull: a configured direction file cannot be used.
    """

    def __init__(self, settings: SteerSettings, hidden_size: int, dtype: str = "float32", num_stages: int = 1) -> None:
        self.settings = settings
        registry = DirectionRegistry(settings.max_directions, hidden_size)
        registry.register(configured_directions(settings))
        self.registry: DirectionBook = registry
        self.in_flight: InFlight | None = None
        self.asked: dict[str, Asked] = {}
        self._dtype = dtype
        self._num_stages = num_stages
        self._index_of = {layer: index for index, layer in enumerate(settings.layers)}

    def resolve(
        self,
        request_id: str,
        spec: RequestSpec,
        prompt_len: int,
        key: str | None = None,
        num_computed: int | None = None,
    ) -> Resolved:
        """Resolve names to slots and layers to layer indices.

        Args:
            request_id: the caller's id of the request.
            spec: the request's spec, the engine's default included.
            prompt_len: number of prompt tokens.
            key: the name under which the workers keep its readouts. None means the id, which must then be unique.
            num_computed: the most tokens that the model computes, which is all but the last generated one; None if
                that is not known.

        Raises:
            SpecError, UnknownDirection, AmbiguousDirection, LayerNotHooked: the spec is refused.
        """
        return self._resolve(self.registry.current(), request_id, spec, prompt_len, key, num_computed)

    def admit(
        self,
        request_id: str,
        spec: RequestSpec,
        prompt_len: int,
        key: str | None = None,
        num_computed: int | None = None,
    ) -> Resolved:
        """Like ``resolve``, and count the slots as used from now on.

        Raises:
            SpecError, UnknownDirection, AmbiguousDirection, LayerNotHooked: see ``resolve``.
        """
        while True:
            book = self.registry.current()
            resolved = self._resolve(book, request_id, spec, prompt_len, key, num_computed)
            if self.in_flight is None:
                return resolved
            self.in_flight.acquire(request_id, resolved.slots)
            # A change of the book reads the counts afterwards. So either it has seen our count, or we see the change.
            if self.registry.current() is book:
                return resolved
            self.in_flight.withdraw(request_id, resolved.slots)

    def _resolve(
        self,
        book: DirectionBook,
        request_id: str,
        spec: RequestSpec,
        prompt_len: int,
        key: str | None,
        num_computed: int | None,
    ) -> Resolved:
        entries = [self._entry(book, steering, prompt_len) for steering in spec.entries]
        number = count()
        entries = [one if one.condition is None else one._replace(number=next(number)) for one in entries]
        is_counted = spec.readout is not None and spec.readout.held
        # Entries at different layers do not interact, so digest and workers get only the order within a layer.
        entries.sort(key=attrgetter("layer"))
        entries, probes = self._with_probes(entries)
        over_prompt = {one.entry.gate for one in entries if one.looks_at_prompt and one.acts}
        windows: list[Window] = []
        for start, numbers in spans.windows([entry.steering.span for entry in entries], prompt_len):
            here = [entry for number in numbers if (entry := entries[number]).acts]
            content = _digest(here, prompt_len)
            probed = {one.entry.gate for one in here if one.probed is not None and not one.looks_at_prompt}
            probed |= over_prompt if start < prompt_len else set()
            # A probe sees its layer's stream as the entries there leave it, so it comes behind them.
            here = sorted([*here, *(probes[number] for number in sorted(probed))], key=attrgetter("layer"))
            self._check_bounds(here)
            window = Window(start, [one.counted if is_counted else one.entry for one in here], content)
            if not windows or windows[-1].digest != window.digest:
                windows.append(window)
        self._check_windows(windows)
        if num_computed is not None and spec.steering is not self.settings.default_steering:
            _check_reach([one.span for one in spec.entries], prompt_len, num_computed)
        if num_computed is not None and spec.readout is not None:
            _check_reach([spec.readout.span], prompt_len, num_computed)
        named = (one for entry in entries if entry.acts for one in (entry.direction, entry.condition) if one)
        contents = {one.slot: one.content_hash for one in named}
        readout = None
        if spec.readout is not None:
            readout = self._readout(book, spec.readout, prompt_len, entries)
            if readout.pool == "rows":
                self._check_rows(readout, prompt_len, num_computed)
            for read in readout.directions:
                own = book.layers_of(read.name).values()
                contents[read.slot] = next(one.content_hash for one in own if one.slot == read.slot)
        return Resolved(
            request_id=request_id,
            key=request_id if key is None else key,
            prompt_len=prompt_len,
            windows=windows,
            readout=readout,
            contents=sorted(contents.items()),
        )

    def check(self, spec: RequestSpec) -> None:
        """Raise what ``resolve`` would raise, as far as that is known without the prompt.

        The exceptions are parts of a span and a ``skip_first`` beyond the prompt's end.

        Raises:
            SpecError, UnknownDirection, AmbiguousDirection, LayerNotHooked: see ``resolve``.
        """
        self.resolve("", spec, prompt_len=sys.maxsize)

    def remember(self, request_id: str, asked: Asked) -> None:
        """Store the spec of a request with a readout, for ``collect_readouts``."""
        self.asked[request_id] = asked
        if len(self.asked) > _REMEMBERED_READOUTS:
            del self.asked[next(iter(self.asked))]

    def _hooked(self, layer: int) -> int:
        if layer not in self._index_of:
            raise LayerNotHooked(
                f"layer {layer} is not hooked; hooked: {list(self.settings.layers)}. Choose one of these, or start "
                "the engine with steer_config(layers=[...]) naming it."
            )
        return self._index_of[layer]

    def _entry(self, book: DirectionBook, steering: Steering, prompt_len: int) -> _NamedEntry:
        direction = book.find(steering.direction, steering.layer, self._index_of)
        layer = direction.layer if steering.layer is None else steering.layer
        hook = self._hooked(layer)
        if steering.op != "add" and not direction.is_unit:
            raise BadOp(
                f"op {steering.op!r} was asked of {steering.direction!r}, whose norm is not 1; allowed: op 'add', "
                "or a unit direction. Register Direction(...).normalised()."
            )
        mode = RELATIVE * steering.relative | KEEP_NORM * steering.keep_norm | CLAMP * (steering.op == "clamp")
        entry = _NamedEntry(layer, steering, Entry(hook, direction.slot, *steering.coefficients, mode), direction)
        return entry if steering.when is None else self._conditional(book, entry, steering.when, prompt_len)

    def _conditional(self, book: DirectionBook, named: _NamedEntry, when: When, prompt_len: int) -> _NamedEntry:
        condition, layer = self._looked_at(book, when)
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

    def _with_probes(self, entries: Sequence[_NamedEntry]) -> tuple[list[_NamedEntry], list[_NamedEntry]]:
        """The entries, which now say what probes their conditions read, and these probes by number.

        A probe stores what a condition at a later layer looks at. Conditions on the same direction and layer share it.
        """
        probes: dict[tuple[int, int], _NamedEntry] = {}
        linked = []
        for named in entries:
            if named.probed is not None and named.condition is not None and named.acts:
                key = named.probed, named.condition.slot
                if key not in probes:
                    entry = Entry(self._hooked(named.probed), named.condition.slot, 0.0, 0.0, PROBE, gate=len(probes))
                    probes[key] = _NamedEntry(named.probed, _PROBING, entry, named.condition)
                named = named._replace(entry=named.entry._replace(gate=probes[key].entry.gate))
            linked.append(named)
        if len(probes) > MOST_PROBES:
            raise BadCondition(
                f"the conditions look at {len(probes)} pairs of a direction and an earlier layer, or a layer of the "
                f"prompt; allowed: {MOST_PROBES}. Use fewer, or conditions on tokens at their entries' own layers."
            )
        return linked, list(probes.values())

    def _check_windows(self, windows: Sequence[Window]) -> None:
        steered = sum(bool(window.entries) for window in windows)
        if steered > self.settings.max_windows:
            raise TooManyEntries(
                f"the spans cut the request into {steered} windows that are steered each in its own way; allowed: "
                f"{self.settings.max_windows}. Use fewer spans, or start the engine with steer_config(max_windows=...) "
                "larger."
            )

    def _check_bounds(self, entries: Sequence[_NamedEntry]) -> None:
        """Refuse entries for one token, sorted by layer, that together exceed a limit at any layer."""
        growth = _growth(entries)
        for layer, group in groupby(entries, attrgetter("layer")):
            here = list(group)
            if len(here) > self.settings.max_entries:
                raise TooManyEntries(
                    f"{len(here)} entries at layer {layer}; allowed: {self.settings.max_entries}. Add the "
                    "directions up, or start the engine with steer_config(max_entries=...) larger."
                )
            self._check_alpha(layer, here)
            self._check_residual_norm(layer, here)
            self._check_range(layer, here, growth)

    def _check_alpha(self, layer: int, here: Sequence[_NamedEntry]) -> None:
        total = sum(self.settings.counted(entry.steering, layer) for entry in here)
        most = self.settings.max_alpha
        if total > most:
            is_plain = len(here) == 1 and here[0].steering.alpha == here[0].entry.a and total == abs(here[0].entry.a)
            got = f"alpha is {here[0].entry.a:g}" if is_plain else f"|alpha| adds up to {total:g}"
            raise BadAlpha(
                f"{got} at layer {layer}; allowed: up to {most:g}, over all entries there together. Use smaller ones, "
                "or start the engine with steer_config(max_alpha=...) larger."
            )

    def _check_residual_norm(self, layer: int, here: Sequence[_NamedEntry]) -> None:
        multiple = self.settings.max_alpha_residual_norm
        if multiple is None:
            return
        norm = self.settings.residual_norms[layer]
        total = sum(
            entry.multiplier * entry.direction.length * (norm if entry.steering.is_multiple else 1.0) for entry in here
        )
        if total > multiple * norm:
            raise BadAlpha(
                f"the entries at layer {layer} can add a vector of length {total:g} (|alpha| times the direction's "
                f"length, over all of them), {total / norm:.3g} times the mean residual norm there, {norm:g}; allowed: "
                f"up to {multiple:g} times, that is {multiple * norm:g}. Use smaller ones, or start the engine with "
                "steer_config(max_alpha_residual_norm=...) larger."
            )

    def _check_range(self, layer: int, here: Sequence[_NamedEntry], growth: float) -> None:
        most = LARGEST_ADDITION[self._dtype] / growth
        total = sum(entry.added * entry.direction.peak for entry in here)
        if total > most:
            raise BadAlpha(
                f"the entries at layer {layer} can add {total:.6g} to an element of the {self._dtype} stream; allowed: "
                f"up to {most:g} (|alpha| times the direction's largest element, over all entries there), so that the "
                "stream stays finite. Use smaller ones"
                + (", or start the engine with dtype='bfloat16'." if self._dtype == "float16" else ".")
            )

    def _readout(
        self, book: DirectionBook, readout: Readout, prompt_len: int, entries: Sequence[_NamedEntry]
    ) -> ResolvedReadout:
        indices = [self._hooked(layer) for layer in readout.layers]
        project: list[Projected] = []
        for name in readout.project:
            layers = book.layers_of(name)
            shared = sorted(set(layers) & set(readout.layers))
            if not shared:
                raise BadReadout(
                    f"project names {name!r}, which belongs to layers {sorted(layers)}; the readout reads layers "
                    f"{list(readout.layers)}. Add one of its layers to the readout, or leave it out."
                )
            project += [Projected(name, layer, layers[layer].slot) for layer in shared]
        if readout.skip_first and readout.skip_first >= prompt_len:
            has = "no prompt is that long" if prompt_len == sys.maxsize else f"the prompt has {prompt_len} tokens"
            raise BadReadout(
                f"skip_first is {str(readout.skip_first)[:40]} and {has}; allowed: fewer than the prompt has. Lower it."
            )
        first, end = spans.read_run(readout.span, readout.skip_first, prompt_len)
        trace = self._trace(book, readout)
        vectors = readout.vectors and readout.pool not in ("max", "rows")
        if readout.pool == "max":
            known = {(one.name, one.layer) for one in trace}
            trace += [
                Traced(name, self._hooked(layer), slot, layer, is_shown=False)
                for name, layer, slot in project
                if (name, layer) not in known
            ]
            project = []
        watch = [self._watched(book, one, is_stop=one is readout.stop) for one in readout.watches]
        conditional = [one for one in entries if one.condition is not None] if readout.held else []
        held = [_held(one, prompt_len) for one in conditional if one.acts]
        self._check_columns([*trace, *watch], sum(one.gate < 0 for one in held))
        if not readout.layers and not trace and not readout.held:  # the watches alone need no token of the prompt
            first, end = prompt_len, None
        return ResolvedReadout(
            list(readout.layers),
            indices,
            first,
            end,
            project,
            vectors,
            trace,
            readout.pool,
            watch,
            prompt_len,
            held,
            len(conditional) if readout.held else None,
        )

    def _watched(self, book: DirectionBook, watch: Watch, *, is_stop: bool) -> Watched:
        direction, layer = self._looked_at(book, watch)
        if is_stop and self._num_stages > 1:
            raise BadReadout(
                "stop came to an engine with pipeline parallelism, whose last stage alone can end a request; allowed "
                "there: flag. Use it, or start the engine without pipeline parallelism."
            )
        bound, is_above = bound_of(watch)
        return Watched(
            watch.direction, self._hooked(layer), direction.slot, layer, is_above, bound, watch.patience, is_stop
        )

    def _looked_at(self, book: DirectionBook, condition: When | Watch) -> tuple[Registered, int]:
        """The direction that a condition names, and the hooked layer at which it looks."""
        direction = book.find(condition.direction, condition.layer, self._index_of)
        layer = direction.layer if condition.layer is None else condition.layer
        self._hooked(layer)
        return direction, layer

    def _trace(self, book: DirectionBook, readout: Readout) -> list[Traced]:
        trace: list[Traced] = []
        for name in readout.trace:
            layers = book.layers_of(name)
            # a trace has one value per token, so it is taken at one layer
            own = sorted(layers) if len(layers) == 1 else sorted(set(layers) & set(self._index_of))
            if len(own) != 1:
                own = sorted(set(own) & set(readout.layers))
            if len(own) != 1:
                raise AmbiguousDirection(
                    f"trace names {name!r}, which belongs to layers {sorted(layers)}, and the readout reads layers "
                    f"{list(readout.layers)}; allowed: exactly one of its layers among those read. Read one of them."
                )
            trace.append(Traced(name, self._hooked(own[0]), layers[own[0]].slot, own[0]))
        return trace

    def _check_rows(self, readout: ResolvedReadout, prompt_len: int, num_computed: int | None) -> None:
        """Refuse a readout that could store more rows than the operator allows."""
        most, layers = self.settings.max_rows, len(readout.layers)
        if not most:
            raise BadReadout(
                "pool 'rows' was asked of an engine with max_rows 0; allowed: the other pools. Start the engine with "
                "steer_config(max_rows=...), the most tokens times layers of one request."
            )
        if prompt_len == sys.maxsize:  # the prompt is not known yet
            return
        end = num_computed if readout.end is None else readout.end
        if end is None:
            raise BadReadout(
                f"pool 'rows' was asked of a span without an end and max_tokens is not set; allowed: up to {most} "
                "rows, tokens times layers. Set max_tokens, or read a span that ends with the prompt."
            )
        tokens = max(end - readout.first, 0)
        if tokens * layers > most:
            what = "lower max_tokens, " if readout.end is None else ""
            raise BadReadout(
                f"pool 'rows' could read {tokens} tokens at {layers} layers, {tokens * layers} rows; allowed: up to "
                f"{most} rows. Read a shorter span or fewer layers, {what}or start the engine with "
                "steer_config(max_rows=...) larger."
            )

    def _check_columns(self, followed: Sequence[Traced | Watched], num_counted: int) -> None:
        distinct = len({(one.layer_index, one.slot) for one in followed}) + num_counted
        if distinct > self.settings.trace_columns:
            raise BadReadout(
                f"{distinct} directions to trace (those of stop and flag too, and with pool 'max' those of project"
                f"{', and with held, conditions on tokens' if num_counted else ''}); "
                f"allowed: {self.settings.trace_columns}. Name fewer, or start the engine with "
                "steer_config(trace_columns=...) larger."
            )


def _held(one: _NamedEntry, prompt_len: int) -> Held:
    runs = spans.runs(one.steering.span, prompt_len)
    if not one.looks_at_prompt:
        return Held(one.number, one.entry.layer_index, runs)
    is_above = bool(one.entry.mode & ABOVE)
    return Held(one.number, one.entry.layer_index, runs, one.entry.gate, one.entry.threshold, is_above)


def _check_reach(asked: Sequence[str], prompt_len: int, num_computed: int) -> None:
    """Refuse a slice that begins where the request has already ended."""
    for span in asked:
        part = spans.beyond(span, prompt_len, num_computed)
        if part is not None:
            raise BadSpan(
                f"span part {part!r} begins behind the last token that this request computes (its prompt has "
                f"{prompt_len} tokens, and with max_tokens {num_computed - prompt_len + 1} the model computes "
                f"{num_computed}: the last generated token is never computed); allowed: parts with at least one token. "
                "Leave it out, or raise max_tokens."
            )


def _growth(entries: Sequence[_NamedEntry]) -> float:
    """The most by which entries for one token can multiply the length of its stream, at all layers together.

    Raises:
        BadAlpha: it is more than ``LARGEST_GROWTH``.
    """
    growth = prod(entry.growth for entry in entries)
    if growth > LARGEST_GROWTH:
        raise BadAlpha(
            f"the entries can make a token's stream {growth:.3g} times as long, over all layers; allowed: up to "
            f"{LARGEST_GROWTH:.3g} times (1 + |alpha| for each that is relative, |alpha| for each scale), so that it "
            "stays finite. Use smaller ones."
        )
    return growth


def _digest(entries: Sequence[_NamedEntry], prompt_len: int) -> str:
    return digest([_content(one, prompt_len) for one in entries])


def _content(one: _NamedEntry, prompt_len: int) -> tuple[Any, ...]:
    entry = one.entry
    plain = one.layer, entry.a, entry.b, entry.mode, one.direction.content_hash
    if one.condition is None:
        return plain
    condition = entry.threshold, one.condition.content_hash, one.probed
    # The tokens do not say how many of them are the prompt.
    return (*plain, *condition, prompt_len) if one.looks_at_prompt else (*plain, *condition)


def admission_of(processor: InputProcessor) -> Admission:
    """The admission of an engine's front end.

    Raises:
        NotConfigured: the engine was started without ``steer_config``.
    """
    admission = configured_admission_of(processor)
    if admission is None:
        raise NotConfigured(
            "this engine was started without steer_config, so it has no hooks; allowed: unsteered requests. "
            "Start it with additional_config=steer_config(layers=[...])."
        )
    return admission


def configured_admission_of(processor: InputProcessor) -> Admission | None:
    """The admission of an engine's front end; None if the engine was started without ``steer_config``."""
    known = ADMISSION.of(processor)
    if known is None:
        settings = SteerSettings.of(processor.vllm_config.additional_config)
        admission = None
        if settings is not None:
            model = processor.model_config
            dtype, stages = str(model.dtype).removeprefix("torch."), processor.vllm_config.parallel_config
            admission = Admission(settings, model.get_hidden_size(), dtype, stages.pipeline_parallel_size)
        known = (admission,)
        ADMISSION.put(processor, known)
    return known[0]


ADMISSION: Attribute[tuple[Admission | None]] = Attribute(
    "InputProcessor",
    "vllm_steer_admission",
    why="The admission of an engine's front end, made at its first request; (None,) if steering is not configured.",
    gone_when="there is an admission hook.",
)
