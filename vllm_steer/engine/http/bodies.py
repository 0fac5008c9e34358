"""Request bodies: the plugin's own fields, aliases and defaults become what stock vLLM lets through.

``"steering"`` and ``"readout"`` at the top of a body, or the wire in ``vllm_xargs["vllm_steer"]``, or a model name that
is an alias: all of them leave here as ``vllm_xargs["vllm_steer"]``, checked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, Protocol

from vllm_steer.errors import DirectionNotAllowed, MalformedSpec, UnknownField
from vllm_steer.schema import WIRE_KEY, RequestSpec, decoded
from vllm_steer.settings import SteerSettings

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
PATHS = frozenset({CHAT, COMPLETIONS, RESPONSES})
_FIELDS = ("steering", "readout")
_KEY_DIGITS = 12


class Book(Protocol):
    """Registered directions: ``vllm_steer.engine.registry.DirectionBook``."""

    def current(self) -> Book: ...

    def layers_of(self, name: str) -> Mapping[int, Any]: ...


class Checker(Protocol):
    """What a body is checked against: ``vllm_steer.engine.admission.Admission``."""

    @property
    def settings(self) -> SteerSettings: ...

    @property
    def registry(self) -> Book: ...

    def check(self, spec: RequestSpec) -> None: ...


@dataclass(frozen=True, slots=True)
class Translated:
    """What becomes of a body.

    Attributes:
        body: the bytes for vLLM; None where those that came are right.
        spec: what the request asks of the plugin; None for nothing.
        choices_per_prompt: the body's ``n``, 1 where it has none.
    """

    body: bytes | None = None
    spec: RequestSpec | None = None
    choices_per_prompt: int = 1


def translate(path: str, body: bytes, key: str | None, checker: Checker, base_model: str) -> Translated:
    """Turn a body into vLLM's terms.

    Args:
        path: one of ``PATHS``.
        body: as it came. What is not a JSON object stays as it is: vLLM answers it.
        key: the API key it came with, if any.
        checker: settings, registered directions and the checks of admission.
        base_model: the name that vLLM serves its model by; it replaces an alias.

    Raises:
        SteerError: the request is refused; nothing of it has been scheduled.
    """
    settings = checker.settings
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return Translated()
    if not isinstance(fields, dict):
        return Translated()
    model = fields.get("model")
    alias = settings.served_aliases.get(model) if isinstance(model, str) else None
    wire = _wire(fields)
    if wire is None and alias is None and not settings.default_steering:
        return Translated()

    xargs = fields.get("vllm_xargs") or {}
    if not isinstance(xargs, dict):
        raise MalformedSpec(f"vllm_xargs is a JSON {type(xargs).__name__}; allowed: an object. Leave it out.")
    wire = {} if wire is None else wire
    readout = wire.get("readout")
    if isinstance(readout, dict):
        wire["readout"] = _completed(readout, checker)
    asked = RequestSpec.from_json(wire)
    check_allowed(asked, allowed_for(settings, key, None if alias is None else model))
    if alias is not None:
        spec = replace(asked, steering=(*alias, *asked.steering))
    elif "steering" in wire:
        spec = asked
    else:
        spec = replace(asked, steering=settings.default_steering)
    silent = not spec.steering and spec.readout is None
    if not silent:
        _check_fields(path, fields, spec)
        checker.check(spec)

    changed = {name: value for name, value in fields.items() if name not in _FIELDS}
    xargs = {name: value for name, value in xargs.items() if name != WIRE_KEY}
    if not silent:
        xargs[WIRE_KEY] = spec.dumps()
    if xargs or "vllm_xargs" in fields:
        changed["vllm_xargs"] = xargs
    if alias is not None:
        changed["model"] = base_model
    n = fields.get("n")
    return Translated(
        body=json.dumps(changed).encode(),
        spec=None if silent else spec,
        choices_per_prompt=n if isinstance(n, int) and n > 0 else 1,
    )


def allowed_for(settings: SteerSettings, key: str | None, alias: str | None = None) -> frozenset[str] | None:
    """The directions that a caller with this API key, speaking to this alias, may name; None is any.

    The entries that an alias or the default steering stand for are the operator's own and need no leave.
    """
    callers = [] if alias is None else [alias]
    if key is not None:
        callers.append(f"key:{sha256(key.encode()).hexdigest()[:_KEY_DIGITS]}")
    lists = [frozenset(settings.allowed_directions[who]) for who in callers if who in settings.allowed_directions]
    return frozenset.intersection(*lists) if lists else None


def check_allowed(spec: RequestSpec, allowed: frozenset[str] | None) -> None:
    """Refuse a spec that names a direction outside ``allowed``, be it to steer with or to read; None is any.

    Raises:
        DirectionNotAllowed
    """
    if allowed is None:
        return
    read = () if spec.readout is None else (*spec.readout.project, *spec.readout.trace)
    for name in (*(entry.direction for entry in spec.steering), *read):
        if name not in allowed:
            raise DirectionNotAllowed(
                f"direction {name!r} is not open to this API key or alias; allowed: "
                f"{', '.join(sorted(allowed)) or 'none'}. Name one of these, or ask the server's operator."
            )


def _wire(fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """The wire object of a body, from whichever of the two places it came in; None where there is none."""
    own = {name: fields[name] for name in _FIELDS if fields.get(name) is not None}
    xargs = fields.get("vllm_xargs")
    if not isinstance(xargs, dict):
        return own or None
    for name in xargs:
        if name.startswith(WIRE_KEY) and name != WIRE_KEY:
            raise UnknownField(f"vllm_xargs has {name!r}; allowed: {WIRE_KEY!r}. Remove it.")
    if WIRE_KEY not in xargs:
        return own or None
    if own:
        raise MalformedSpec(
            f"steering came both in the body's fields ({', '.join(own)}) and in vllm_xargs[{WIRE_KEY!r}]; allowed: one "
            "of the two. Leave one out."
        )
    wire = decoded(xargs[WIRE_KEY])
    if not isinstance(wire, dict):
        raise MalformedSpec(
            f"vllm_xargs[{WIRE_KEY!r}] is a JSON {type(wire).__name__}; allowed: an object with v, steering, readout."
        )
    return wire


def _completed(readout: Mapping[str, Any], checker: Checker) -> dict[str, Any]:
    """A readout with what HTTP requests may leave out: vectors are moved only when they are asked or nothing else is,
    and the layers are those of the directions that it names.
    """
    named = [
        name
        for part in ("project", "trace")
        if isinstance(names := readout.get(part), list)
        for name in names
        if isinstance(name, str)
    ]
    completed = {"vectors": not named, **readout}
    if named and "layers" not in readout:
        book = checker.registry.current()
        layers = {layer for name in named for layer in book.layers_of(name)}
        # A name may also belong to layers that this engine does not hook; where it belongs to no other, admission says.
        completed["layers"] = sorted(layers & set(checker.settings.layers) or layers)
    return completed


def _check_fields(path: str, fields: Mapping[str, Any], spec: RequestSpec) -> None:
    """Refuse other fields of a body that would have the spec ignored."""
    if fields.get("use_beam_search"):
        raise MalformedSpec(
            "use_beam_search came with steering or a readout, which vLLM's beam search drops; allowed: sampling. Leave "
            "it out."
        )
    if path == RESPONSES and fields.get("background") and spec.readout is not None:
        raise MalformedSpec(
            "background came with a readout, which only the reply itself can carry; allowed: one of the two. Leave one "
            "out."
        )
