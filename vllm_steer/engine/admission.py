"""Admission: what a request asks is checked against the engine that it is for, before anything of it is scheduled.

Whatever is wrong with a request's spec is refused here, so that nothing that reaches a worker can fail for a user's
mistake. What passes is resolved to slots and hook numbers.
"""

from __future__ import annotations

import sys
from collections import Counter
from operator import itemgetter

from vllm.v1.engine.input_processor import InputProcessor

from vllm_steer.directions import Direction, load_directions
from vllm_steer.engine.in_flight import InFlight
from vllm_steer.engine.registry import DirectionBook, DirectionRegistry
from vllm_steer.engine.resolved import Resolved, ResolvedReadout, Row, digest
from vllm_steer.errors import (
    AmbiguousDirection,
    BadAlpha,
    BadOp,
    BadReadout,
    LayerNotHooked,
    NotConfigured,
    TooManyEntries,
)  # fmt: skip
from vllm_steer.schema import Readout, RequestSpec, Steering
from vllm_steer.settings import SteerSettings

_REMEMBERED_READOUTS = 1 << 20
_ATTRIBUTE = "vllm_steer_admission"

_Entry = tuple[int, str, Row, str]
"""Of one entry: layer, span, what the workers are told, and the hash of the vector."""


class Admission:
    """Checks and resolves the requests of one engine.

    Attributes:
        registry: the directions that requests can name.
        in_flight: counts the slots that running requests use; None where nothing reuses a slot while requests run.
        asked: id -> traced directions, of the requests that asked for a readout (the last million), oldest first.
    """

    def __init__(self, settings: SteerSettings, hidden_size: int) -> None:
        self.settings = settings
        registry = DirectionRegistry(settings.max_directions, hidden_size)
        registry.register(configured_directions(settings))
        self.registry: DirectionBook = registry
        self.in_flight: InFlight | None = None
        self.asked: dict[str, tuple[str, ...]] = {}
        self._index_of = {layer: index for index, layer in enumerate(settings.layers)}

    def resolve(self, request_id: str, spec: RequestSpec, prompt_len: int) -> Resolved:
        """Names to slots, layers to hook numbers.

        Raises:
            Any of ``SpecError``, ``UnknownDirection``, ``AmbiguousDirection``, ``LayerNotHooked``.
        """
        return self._resolve(self.registry.current(), request_id, spec, prompt_len)

    def admit(self, request_id: str, spec: RequestSpec, prompt_len: int) -> Resolved:
        """``resolve``, and count the slots as used from now on.

        Raises:
            What ``resolve`` raises.
        """
        while True:
            book = self.registry.current()
            resolved = self._resolve(book, request_id, spec, prompt_len)
            if self.in_flight is None:
                return resolved
            self.in_flight.acquire(request_id, resolved.slots)
            # Whoever changes the book reads the counts after that, so either our count was seen or the change is seen
            # here.
            if self.registry.current() is book:
                return resolved
            self.in_flight.withdraw(request_id, resolved.slots)

    def _resolve(self, book: DirectionBook, request_id: str, spec: RequestSpec, prompt_len: int) -> Resolved:
        entries = [self._entry(book, steering) for steering in spec.steering]
        # Adding 0·d changes no bit, so it takes no row and shares its KV with unsteered requests.
        entries = [entry for entry in entries if entry[2][2:] != (0.0, 0.0)]
        # Entries at different layers do not meet, so only the order within a layer is told to digest and workers.
        entries.sort(key=itemgetter(0))
        prompt = [entry for entry in entries if entry[1] != "generated"]
        generated = [entry for entry in entries if entry[1] != "prompt"]
        for which in (prompt, generated):
            self._check_room(which)
        contents = {row[1]: content for _, _, row, content in entries}
        readout = None
        if spec.readout is not None:
            readout = self._readout(book, spec.readout, prompt_len)
            for name, _, slot in (*readout.project, *readout.trace):
                contents[slot] = next(one.content_hash for one in book.layers_of(name).values() if one.slot == slot)
        prompt_digest = _digest(prompt)
        return Resolved(
            request_id=request_id,
            prompt_len=prompt_len,
            prompt=[row for _, _, row, _ in prompt],
            generated=[row for _, _, row, _ in generated],
            prompt_digest=prompt_digest,
            generated_digest=prompt_digest if generated == prompt else _digest(generated),
            readout=readout,
            contents=sorted(contents.items()),
        )

    def check(self, spec: RequestSpec) -> None:
        """Raise what ``resolve`` would raise, as far as it can be known without the prompt.

        Only a ``skip_first`` beyond the prompt's end is left for later.
        """
        self.resolve("", spec, prompt_len=sys.maxsize)

    def remember(self, request_id: str, readout: Readout) -> None:
        """Keep in mind that a request asked for a readout, for ``collect_readouts``."""
        self.asked[request_id] = tuple(readout.trace)
        if len(self.asked) > _REMEMBERED_READOUTS:
            del self.asked[next(iter(self.asked))]

    def _hooked(self, layer: int) -> int:
        if layer not in self._index_of:
            raise LayerNotHooked(
                f"layer {layer} is not hooked; hooked: {list(self.settings.layers)}. Choose one of these, or start "
                "the engine with steer_config(layers=[...]) naming it."
            )
        return self._index_of[layer]

    def _entry(self, book: DirectionBook, steering: Steering) -> _Entry:
        direction = book.find(steering.direction, steering.layer)
        layer = direction.layer if steering.layer is None else steering.layer
        hook = self._hooked(layer)
        assert steering.alpha is not None  # Steering fills it in
        if abs(steering.alpha) > self.settings.max_alpha:
            raise BadAlpha(
                f"alpha is {steering.alpha:g}; allowed: from {-self.settings.max_alpha:g} to "
                f"{self.settings.max_alpha:g}. Use a "
                "smaller one, or start the engine with steer_config(max_alpha=...) larger."
            )
        self._check_residual_norm(steering.alpha, layer)
        if steering.op != "add" and not direction.is_unit:
            raise BadOp(
                f"op {steering.op!r} was asked of {steering.direction!r}, whose norm is not 1; allowed: op 'add', "
                "or a unit direction. Register Direction(...).normalised()."
            )
        return layer, steering.span, (hook, direction.slot, *steering.coefficients), direction.content_hash

    def _check_residual_norm(self, alpha: float, layer: int) -> None:
        multiple = self.settings.max_alpha_residual_norm
        if multiple is None:
            return
        norm = self.settings.residual_norms[layer]
        if abs(alpha) > multiple * norm:
            raise BadAlpha(
                f"alpha is {alpha:g}, {abs(alpha) / norm:.3g} times the mean residual norm of layer {layer}, {norm:g}; "
                f"allowed: up to {multiple:g} times, that is {multiple * norm:g}. Use a smaller one, or start the "
                "engine with steer_config(max_alpha_residual_norm=...) larger."
            )

    def _check_room(self, entries: list[_Entry]) -> None:
        if len(entries) <= self.settings.max_entries:  # nearly always, and the count costs more than all else here
            return
        for layer, count in Counter(map(itemgetter(0), entries)).items():
            if count > self.settings.max_entries:
                raise TooManyEntries(
                    f"{count} entries at layer {layer}; allowed: {self.settings.max_entries}. Add the "
                    "directions up, or start the engine with steer_config(max_entries=...) larger."
                )

    def _readout(self, book: DirectionBook, readout: Readout, prompt_len: int) -> ResolvedReadout:
        indices = [self._hooked(layer) for layer in readout.layers]
        project = []
        for name in readout.project:
            layers = book.layers_of(name)
            shared = sorted(set(layers) & set(readout.layers))
            if not shared:
                raise BadReadout(
                    f"project names {name!r}, which belongs to layers {sorted(layers)}; read are "
                    f"{list(readout.layers)}. Add one of "
                    "its layers to the readout, or leave it out."
                )
            project += [(name, layer, layers[layer].slot) for layer in shared]
        if readout.span != "generated" and readout.skip_first >= prompt_len:
            raise BadReadout(
                f"skip_first is {readout.skip_first} and the prompt has {prompt_len} tokens; allowed: fewer than "
                "the prompt has. Lower it."
            )
        first = prompt_len if readout.span == "generated" else readout.skip_first
        end = prompt_len if readout.span == "prompt" else None
        trace = self._trace(book, readout)
        return ResolvedReadout(list(readout.layers), indices, first, end, project, readout.vectors, trace)

    def _trace(self, book: DirectionBook, readout: Readout) -> list[tuple[str, int, int]]:
        trace = []
        for name in readout.trace:
            layers = book.layers_of(name)
            # a trace has one value a token, so it is taken at one layer
            own = sorted(layers) if len(layers) == 1 else sorted(set(layers) & set(readout.layers))
            if len(own) != 1:
                raise AmbiguousDirection(
                    f"trace names {name!r}, which belongs to layers {sorted(layers)}, and the readout is of "
                    f"{list(readout.layers)}; allowed: exactly one of its layers among those read. Read one of them."
                )
            trace.append((name, self._hooked(own[0]), layers[own[0]].slot))
        distinct = len({(index, slot) for _, index, slot in trace})
        if distinct > self.settings.trace_columns:
            raise BadReadout(
                f"{distinct} directions to trace; allowed: {self.settings.trace_columns}. Trace fewer, or start the "
                "engine with steer_config(trace_columns=...) larger."
            )
        return trace


def _digest(entries: list[_Entry]) -> str:
    return digest([(layer, a, b, content) for layer, _, (_, _, a, b), content in entries])


def configured_directions(settings: SteerSettings) -> list[Direction]:
    """The directions of the configured files, in the order that front end and workers both give them slots."""
    return [direction for path in settings.directions for direction in load_directions(path)]


def admission_of(processor: InputProcessor) -> Admission:
    """The admission of an engine's front end.

    Raises:
        NotConfigured: the engine was started without ``steer_config``.
    """
    admission: Admission | None = getattr(processor, _ATTRIBUTE, None)
    if admission is None:
        settings = SteerSettings.of(processor.vllm_config.additional_config)
        if settings is None:
            raise NotConfigured(
                "this engine was started without steer_config, so it has no hooks; allowed: unsteered requests. "
                "Start it with additional_config=steer_config(layers=[...])."
            )
        admission = Admission(settings, processor.model_config.get_hidden_size())
        setattr(processor, _ATTRIBUTE, admission)
    return admission
