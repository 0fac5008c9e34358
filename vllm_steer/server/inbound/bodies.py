"""Takes the plugin's fields out of request bodies and checks them; the rest of the body goes to vLLM.

A request can ask for steering or a readout with ``"steering"`` and ``"readout"`` at the top of its body, with the wire
format in ``vllm_xargs["vllm_steer"]``, in the header ``X-Steering``, and with a model name that is an alias or says its
entries itself. None of this stays in the body; the request's ``Exchange`` carries it on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from vllm_steer.engine.front.permissions import allowed_for, check_allowed
from vllm_steer.errors import MalformedSpec, NotOnThisRoute, SteerError, TooManyEntries
from vllm_steer.messages import json_type
from vllm_steer.schema.request_spec import RequestSpec
from vllm_steer.schema.wire import WIRE_KEY, decoded, without_duplicates
from vllm_steer.server.inbound.misplaced import FIELDS, check_places, misplaced
from vllm_steer.server.inbound.model_names import ModelNames, NamedModel
from vllm_steer.server.inbound.steered_routes import CHAT_BATCH, LORA_NAMES, NAMING, RESPONSES, STEERED, SteeredRoute
from vllm_steer.settings import SteerSettings

_OURS = tuple(f'"{name}"'.encode() for name in (*FIELDS, WIRE_KEY, "vllm_xargs", "model"))


class Book(Protocol):
    """The registered directions, as in ``vllm_steer.engine.registry.DirectionBook``."""

    def current(self) -> Book:
        """The book as it is now."""

    def layers_of(self, name: str) -> Mapping[int, Any]:
        """Layer -> the direction of this name there.

        Raises:
            UnknownDirection: the name is not registered.
        """


class Checker(Protocol):
    """The checks for a body, as in ``vllm_steer.engine.front.admission.Admission``."""

    @property
    def settings(self) -> SteerSettings:
        """The engine's settings."""

    @property
    def registry(self) -> Book:
        """The registered directions."""

    def check(self, spec: RequestSpec) -> None:
        """Check a spec against the engine.

        Raises:
            SteerError: the engine cannot honour it.
        """


@dataclass(frozen=True, slots=True)
class Translated:
    """The result of translating a body.

    Attributes:
        body: the bytes for vLLM; None if vLLM gets the original bytes.
        spec: the request's steering and readout, an alias's entries included; None if it asks for neither.
        choices_per_prompt: the body's ``n``; 1 without it.
        is_background: whether the reply comes before anything is generated.
        model: the model's name in the body, if there is one.
        alias: the alias that this name is or begins with, if there is one.
    """

    body: bytes | None = None
    spec: RequestSpec | None = None
    choices_per_prompt: int = 1
    is_background: bool = False
    model: str | None = None
    alias: str | None = None


def translate(
    path: str,
    body: bytes,
    key: str | None,
    checker: Checker,
    names: ModelNames,
    query: Mapping[str, str] | None = None,
    header: Mapping[str, Any] | None = None,
) -> Translated:
    """Take the plugin's fields out of a body and check them.

    Args:
        path: the route.
        body: the original bytes. If they are not a JSON object, vLLM answers them unchanged.
        key: the request's API key, if any.
        checker: settings, registered directions and the checks of admission.
        names: the model names of the server.
        query: the parameters of the URL.
        header: the wire object of the header ``X-Steering``, if there is one.

    Raises:
        SteerError: the request is refused; no part of it has been scheduled.
    """
    settings, route = checker.settings, STEERED.get(path)
    if header is not None and route is None and path not in NAMING:
        raise not_on_this_route("the header X-Steering", path)
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return Translated()
    if not isinstance(fields, dict):
        return Translated()
    if path in LORA_NAMES:
        _check_lora_name(fields, LORA_NAMES[path], names)
    model = fields.get("model") if isinstance(fields.get("model"), str) else None
    named = NamedModel("") if model is None else names.read(model)
    if route is None:
        check_unsteered(path, fields, model if named.is_steered else None, query)
        changed = json.dumps({**fields, "model": named.name}).encode() if named.is_steered else None
        return Translated(changed, model=model, alias=named.alias)
    check_places(fields, route.extra, query or {})
    wire = _wire(fields, route.extra)
    if wire is not None or named.is_steered or any(body.count(name) > 1 for name in _OURS):
        json.loads(body, object_pairs_hook=without_duplicates)
    wire = _merged(wire, header, named)
    if wire is None and not named.is_steered:
        if settings.default_steering:
            _check_search(fields)
        return Translated(
            choices_per_prompt=_choices_per_prompt(fields), is_background=_is_background(path, fields), model=model
        )

    spec = _spec(route, path, fields, wire or {}, named, key, checker)
    rest = _without_ours(fields, route)
    if named.is_steered:
        rest["model"] = named.name
    return Translated(json.dumps(rest).encode(), spec, _choices_per_prompt(fields), model=model, alias=named.alias)


def _merged(body: dict[str, Any] | None, header: Mapping[str, Any] | None, named: NamedModel) -> dict[str, Any] | None:
    """The wire object of a request, from all places that may say something; None if none does.

    Raises:
        MalformedSpec: two places say the same field.
    """
    by_name = {"steering": [one.to_json() for one in named.asked]} if named.asked else None
    merged: dict[str, Any] = {}
    places: dict[str, str] = {}
    for place, told in (("the body", body), ("the header X-Steering", header), ("the model's name", by_name)):
        for name, value in (told or {}).items():
            if name in merged:
                raise MalformedSpec(
                    f"{name!r} came both in {places[name]} and in {place}; allowed: one of the two. Leave one out."
                )
            merged[name], places[name] = value, place
    return merged if merged or body is not None or header is not None else None


def check_unsteered(
    path: str, fields: Mapping[str, Any], alias: str | None = None, query: Mapping[str, str] | None = None
) -> None:
    """Refuse a body that asks for steering, a readout or an alias on a route that cannot honour it.

    Args:
        path: the route.
        fields: the body.
        alias: the body's model, if it is a steered alias.
        query: the parameters of the URL.

    Raises:
        NotOnThisRoute: the message names the first such field.
    """
    asked = next((repr(name) for name in FIELDS if fields.get(name) is not None), misplaced(fields, (), query or {}))
    if asked is None and alias is not None and path not in NAMING:
        asked = f"the steered alias {alias!r}"
    if asked is not None:
        raise not_on_this_route(asked, path)


def not_on_this_route(asked: str, path: str) -> NotOnThisRoute:
    """The refusal of what came to a route that cannot honour it."""
    return NotOnThisRoute(
        f"{asked} came to {path}, which cannot honour it; allowed: {', '.join(STEERED)}. Send it to one of these, or "
        "leave it out."
    )


def _spec(
    route: SteeredRoute,
    path: str,
    fields: Mapping[str, Any],
    wire: dict[str, Any],
    named: NamedModel,
    key: str | None,
    checker: Checker,
) -> RequestSpec:
    settings = checker.settings
    readout = wire.get("readout")
    if isinstance(readout, dict):
        wire = {**wire, "readout": _completed(readout, checker)}
    _check_count(wire.get("steering"), settings)
    if path == CHAT_BATCH and fields.get("stream"):
        raise MalformedSpec(
            f"stream came to {path} with steering, a readout or an alias, and vLLM answers it with the last token "
            "alone; allowed: whole replies. Leave stream out."
        )
    asked = RequestSpec.from_json(wire)
    if asked.readout is not None and not route.reads:
        raise NotOnThisRoute(
            f"a readout came to {path}, whose replies have no place for it; allowed: "
            f"{', '.join(one for one, its in STEERED.items() if its.reads)}. Send it to one of these, or leave it out."
        )
    check_allowed(asked, allowed_for(settings, key, named.alias))
    spec = asked if named.alias is None else replace(asked, steering=(*named.aliased, *asked.entries))
    whole = spec.with_default(settings.default_steering)
    if not whole.is_empty:
        _check_search(fields)
        if _is_background(path, fields):
            raise MalformedSpec(
                "background came with steering or a readout, and its reply comes before anything is generated; "
                "allowed: one of the two. Leave one out."
            )
        try:
            checker.check(whole)
        except SteerError as error:
            if named.aliased or asked.steering is None:
                error.param = None  # the entries are not the client's own
            raise
    return spec


def _check_count(entries: Any, settings: SteerSettings) -> None:
    """Refuse a list that is longer than all hooked layers allow, before its entries are checked one by one."""
    most = settings.max_windows * settings.max_entries * len(settings.layers)
    if isinstance(entries, list) and len(entries) > most:
        raise TooManyEntries(
            f"{len(entries)} entries in steering; allowed: {settings.max_entries} at each of {len(settings.layers)} "
            "layers. Add the directions up, or start the engine with steer_config(max_entries=...) larger."
        )


def _choices_per_prompt(fields: Mapping[str, Any]) -> int:
    n = fields.get("n")
    return n if isinstance(n, int) and n > 0 else 1


def _without_ours(fields: Mapping[str, Any], route: SteeredRoute) -> dict[str, Any]:
    """The body without the plugin's fields, at its top and in ``extra_args``."""
    changed = {name: value for name, value in fields.items() if name not in FIELDS}
    inner = changed
    for name in route.extra:
        if not isinstance(inner.get(name), dict):
            return changed
        inner[name] = dict(inner[name])
        inner = inner[name]
    inner.pop(WIRE_KEY, None)
    return changed


def _check_lora_name(fields: Mapping[str, Any], field: str, names: ModelNames) -> None:
    name = fields.get(field)
    if isinstance(name, str) and name in names.aliases:
        raise MalformedSpec(
            f"{field} is {name!r}, which is a steered alias of this server; allowed: any other name. Rename one."
        )


def _wire(fields: Mapping[str, Any], extra: tuple[str, ...]) -> dict[str, Any] | None:
    """The wire object of a body, from either of its two places; None if there is none."""
    own = {name: fields[name] for name in FIELDS if fields.get(name) is not None}
    inner: Any = fields
    for name in extra:
        inner = inner.get(name) if isinstance(inner, dict) else None
    if not extra or not isinstance(inner, dict) or WIRE_KEY not in inner:
        return own or None
    place = f"{'.'.join(extra)}[{WIRE_KEY!r}]"
    if own:
        raise MalformedSpec(
            f"steering came both in the body's fields ({', '.join(own)}) and in {place}; allowed: one of the two. "
            "Leave one out."
        )
    wire = decoded(inner[WIRE_KEY])
    if not isinstance(wire, dict):
        raise MalformedSpec(f"{place} is a JSON {json_type(wire)}; allowed: an object with v, steering, readout.")
    return wire


def _completed(readout: Mapping[str, Any], checker: Checker) -> dict[str, Any]:
    """Fill in the fields of a readout that HTTP requests may leave out.

    ``layers`` are by default those of the directions to project onto or to trace. ``vectors`` is true by default only
    if no direction is named so, or with the pool ``rows``; without ``layers`` too, a stop or flag alone pools nothing.
    """
    named = [
        name
        for part in ("project", "trace")
        if isinstance(names := readout.get(part), list)
        for name in names
        if isinstance(name, str)
    ]
    completed = {"vectors": not named or readout.get("pool") == "rows", **readout}
    if named and "layers" not in readout:
        book = checker.registry.current()
        layers = {layer for name in named for layer in book.layers_of(name)}
        # Layers that this engine does not hook are dropped. If no other is left, admission refuses them.
        completed["layers"] = sorted(layers & set(checker.settings.layers) or layers)
    return completed


def _check_search(fields: Mapping[str, Any]) -> None:
    if fields.get("use_beam_search"):
        raise MalformedSpec(
            "use_beam_search came with steering or a readout, or on a server with default_steering, and beam search "
            "computes generated tokens again as prompts; allowed: sampling. Leave it out."
        )


def _is_background(path: str, fields: Mapping[str, Any]) -> bool:
    return path == RESPONSES and bool(fields.get("background"))
