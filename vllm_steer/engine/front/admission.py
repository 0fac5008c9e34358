"""Admission: checks a request's spec against its engine before any part of the request is scheduled.

Every mistake in a spec is refused here, so no user's mistake can cause a failure in a worker. A valid spec is resolved
to slots and layer indices.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from operator import attrgetter
from typing import Any

from vllm.v1.engine.input_processor import InputProcessor

from vllm_steer import spans
from vllm_steer.engine.front.entry_limits import EntryLimits
from vllm_steer.engine.front.hooks import Hooks
from vllm_steer.engine.front.named_entry import NamedEntry, digest_of
from vllm_steer.engine.front.readout_admission import ReadoutAdmission
from vllm_steer.engine.front.slots_in_flight import InFlight
from vllm_steer.engine.patching import Attribute
from vllm_steer.engine.registry import DirectionBook, DirectionRegistry, configured_directions
from vllm_steer.engine.resolved_spec import Resolved, Window
from vllm_steer.errors import (
    BadCondition,
    BadOp,
    BadSpan,
    NotConfigured,
    SteerError,
)
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
        self._num_stages = num_stages
        self._hooks = Hooks(settings.layers)
        self._limits = EntryLimits(settings, dtype)
        self._readouts = ReadoutAdmission(settings, self._hooks, num_stages)

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
        entries = []
        for place, steering in enumerate(spec.entries):
            try:
                entries.append(self._entry(book, steering, prompt_len))
            except SteerError as error:
                error.param = f"steering[{place}]"
                raise
        if any(one.condition is not None for one in entries):
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
            content = digest_of(here, prompt_len)
            probed = {one.entry.gate for one in here if one.probed is not None and not one.looks_at_prompt}
            probed |= over_prompt if start < prompt_len else set()
            # A probe sees its layer's stream as the entries there leave it, so it comes behind them.
            here = sorted([*here, *(probes[number] for number in sorted(probed))], key=attrgetter("layer"))
            self._limits.check(here)
            window = Window(start, [one.counted if is_counted else one.entry for one in here], content)
            if not windows or windows[-1].digest != window.digest:
                windows.append(window)
        self._limits.check_windows(windows)
        if num_computed is not None and spec.steering is not self.settings.default_steering:
            _check_reach(dict.fromkeys(one.span for one in spec.entries), prompt_len, num_computed)
        if num_computed is not None and spec.readout is not None:
            _check_reach([spec.readout.span], prompt_len, num_computed)
        named = (one for entry in entries if entry.acts for one in (entry.direction, entry.condition) if one)
        contents = {one.slot: one.content_hash for one in named}
        readout = None
        if spec.readout is not None:
            readout = self._readouts.resolve(book, spec.readout, prompt_len, num_computed, entries)
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

    def _entry(self, book: DirectionBook, steering: Steering, prompt_len: int) -> NamedEntry:
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
        entry = NamedEntry(layer, steering, Entry(hook, direction.slot, *steering.coefficients, mode), direction)
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


def _check_reach(asked: Iterable[str], prompt_len: int, num_computed: int) -> None:
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
