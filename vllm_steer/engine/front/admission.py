"""Admission: checks a request's spec against its engine before any part of the request is scheduled.

Every mistake in a spec is refused here, so no user's mistake can cause a failure in a worker. A valid spec is resolved
to slots and layer indices.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from vllm.v1.engine.input_processor import InputProcessor

from vllm_steer import spans
from vllm_steer.engine.front.entry_limits import EntryLimits
from vllm_steer.engine.front.entry_resolution import EntryResolution
from vllm_steer.engine.front.entry_shapes import EntryShapes
from vllm_steer.engine.front.hooks import Hooks
from vllm_steer.engine.front.readout_admission import ReadoutAdmission
from vllm_steer.engine.front.slots_in_flight import InFlight
from vllm_steer.engine.patching import Attribute
from vllm_steer.engine.registry import DirectionBook, DirectionRegistry, configured_directions
from vllm_steer.engine.resolved_spec import Resolved
from vllm_steer.errors import BadSpan, NotConfigured
from vllm_steer.schema.request_spec import RequestSpec
from vllm_steer.settings import SteerSettings

_REMEMBERED_READOUTS = 1 << 20

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
        self._hooks = Hooks(settings.layers)
        self._shapes = EntryShapes(EntryResolution(self._hooks, num_stages), EntryLimits(settings, dtype))
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
            slots = [slot for slot, _ in resolved.contents]
            self.in_flight.acquire(request_id, slots)
            # A change of the book reads the counts afterwards. So either it has seen our count, or we see the change.
            if self.registry.current() is book:
                return resolved
            self.in_flight.withdraw(request_id, slots)

    def _resolve(
        self,
        book: DirectionBook,
        request_id: str,
        spec: RequestSpec,
        prompt_len: int,
        key: str | None,
        num_computed: int | None,
    ) -> Resolved:
        is_counted = spec.readout is not None and spec.readout.held
        shape = self._shapes.of(book, spec.entries, prompt_len, is_counted=is_counted)
        windows = shape.windows(spec.entries, prompt_len)
        if num_computed is not None and spec.steering is not self.settings.default_steering:
            _check_reach(shape.spans, prompt_len, num_computed)
        if num_computed is not None and spec.readout is not None:
            _check_reach([spec.readout.span], prompt_len, num_computed)
        contents = shape.contents
        readout = None
        if spec.readout is not None:
            readout = self._readouts.resolve(book, spec.readout, prompt_len, num_computed, shape.entries)
            if readout.directions:
                found = dict(contents)
                for read in readout.directions:
                    own = book.layers_of(read.name).values()
                    found[read.slot] = next(one.content_hash for one in own if one.slot == read.slot)
                contents = sorted(found.items())
        return Resolved(
            request_id=request_id,
            key=request_id if key is None else key,
            prompt_len=prompt_len,
            windows=windows,
            readout=readout,
            contents=contents,
            looks_at_prompt=shape.looks_at_prompt,
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
