"""The routes under ``/v1/steering``: settings and registry of a server. The API key of ``/v1`` guards them all."""

from __future__ import annotations

import hmac
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from vllm_steer import __version__
from vllm_steer.directions import Direction
from vllm_steer.directions.said import LayerIndex
from vllm_steer.engine.patching import Attribute
from vllm_steer.engine.registry import DirectionBook, Registered
from vllm_steer.engine.worker_answers import ModelRecord, classes_in
from vllm_steer.errors import (
    AdminKeyMissing,
    AmbiguousDirection,
    BadDirectionFile,
    ChangeNotAllowed,
    DirectionNeeded,
    LayerNotHooked,
    NotConfigured,
    UnknownDirection,
)
from vllm_steer.schema.request_spec import RequestSpec
from vllm_steer.schema.steering import Steering
from vllm_steer.server.openapi import BINARY, refusals
from vllm_steer.server.refusing_route import RefusingRoute
from vllm_steer.server.registry.aliases import ServedAliases
from vllm_steer.server.registry.preconditions import Preconditions, entries_of, etag_of
from vllm_steer.server.registry.shared_registry import SharedRegistry
from vllm_steer.server.registry.upload import FileForm, packed_directions, read_upload, uploaded_directions
from vllm_steer.settings import SteerSettings

ADMIN_KEY_VARIABLE = "VLLM_STEER_ADMIN_KEY"
_MOST_LAYERS = 10**6  # the keys of direction files have six digits for the layer

Layer = Annotated[int | None, Query(ge=0, lt=_MOST_LAYERS)]
Condition = Annotated[str | None, Header()]
AdminKey = Annotated[str | None, Header()]


router = APIRouter(route_class=RefusingRoute)


@dataclass(frozen=True, slots=True)
class SteeredServer:
    """The data that the routes serve.

    Attributes:
        settings: the server's settings.
        registry: its directions.
        model: how its model returns the residual stream, as ``model_record`` gives it.
        aliases: its steered aliases.
        check: the checks of admission.
        taken: who else is served by a name, for messages; None if nobody is.
        num_layers: decoder layers of its model.
    """

    settings: SteerSettings
    registry: SharedRegistry
    model: ModelRecord
    aliases: ServedAliases
    check: Callable[[RequestSpec], None]
    taken: Callable[[str], str | None]
    num_layers: int


SERVER: Attribute[SteeredServer] = Attribute(
    "the server's application state",
    "vllm_steer_server",
    why="What the routes of this plugin serve.",
    gone_when="an endpoint plugin has a state of its own.",
)


@router.get("/v1/steering")
def show_steering(request: Request) -> dict[str, Any]:
    """Hooked layers, limits, aliases, use of the bank and registered directions."""
    server = server_of(request)
    settings = server.settings
    registered, held, free = server.registry.show_bank()
    return {
        "version": __version__,
        "model": {
            "architecture": server.model["architecture"],
            "proof": server.model["proof"],
            "layer_classes": classes_in(server.model),
        },
        "layers": list(settings.layers),
        "max_alpha": settings.max_alpha,
        "max_alpha_residual_norm": settings.max_alpha_residual_norm,
        "residual_norms": settings.residual_norms,
        "max_entries": settings.max_entries,
        "max_windows": settings.max_windows,
        "max_directions": settings.max_directions,
        "trace_columns": settings.trace_columns,
        "max_rows": settings.max_rows,
        "max_upload_mib": settings.max_upload_mib,
        "bank": {"registered": registered, "held": held, "free": free},
        "aliases": server.aliases.to_json(),
        "default_steering": [one.to_json() for one in settings.default_steering],
        "steering_in_model_names": settings.steering_in_model_names,
        "kept_readouts_mib": settings.kept_readouts_mib,
        "kept_readouts_seconds": settings.kept_readouts_seconds,
        "directions": _listed(server, server.registry.all()),
        "changes": bool(os.environ.get(ADMIN_KEY_VARIABLE)),
    }


@router.get("/v1/steering/directions")
def list_directions(request: Request) -> dict[str, Any]:
    """The registered directions, without their vectors."""
    server = server_of(request)
    return {"directions": _listed(server, server.registry.all())}


@router.get("/v1/steering/directions/{name:path}", responses=refusals(404, 412))
def get_direction(
    request: Request, name: str, layer: Layer = None, if_match: Condition = None, if_none_match: Condition = None
) -> Response:
    """The vectors of a name, at one layer or at all, as a safetensors file."""
    registry = server_of(request).registry
    conditions = Preconditions(if_match, if_none_match)
    while True:
        book = registry.current()
        entries = entries_of(book, name, layer)
        if not entries:
            layers = sorted(book.layers_of(name))  # raises for an unknown name
            raise UnknownDirection(f"direction {name!r} belongs to layers {layers}, not {layer}; name one of these.")
        if conditions.is_known(entries):
            return Response(status_code=304, headers={"ETag": etag_of(entries)})
        Preconditions(if_match).check(entries)
        try:
            body = packed_directions(registry.load_vectors(entries))
        except BadDirectionFile:
            if registry.current() is book:
                raise
            continue  # replaced or removed in the meantime
        return Response(body, media_type="application/octet-stream", headers={"ETag": etag_of(entries)})


@router.put(
    "/v1/steering/directions/{name:path}",
    responses=refusals(400, 401, 403, 409, 412, 413),
    openapi_extra=BINARY,
)
async def put_direction(
    request: Request,
    name: str,
    layer: Layer = None,
    format: FileForm | None = None,
    layer_index: LayerIndex | None = None,
    if_match: Condition = None,
    if_none_match: Condition = None,
    x_admin_key: AdminKey = None,
) -> JSONResponse:
    """Register or replace a name at the layers in the body; other layers of the name stay as they are.

    Requests in flight keep the vectors they were admitted with. The body is a safetensors file; with ``?format=`` a
    file of another format, which ``layer`` and ``layer_index`` explain as in ``load_directions``; or with ``?layer=``
    alone one vector of float32 little-endian numbers. A layer that the model lacks is refused; of one that is not
    hooked the reply says so.
    """
    server = server_of(request)
    check_admin(x_admin_key)
    length = request.headers.get("Content-Length")
    body = await read_upload(request.stream(), length, server.settings.max_upload_mib)
    directions = await run_in_threadpool(uploaded_directions, name, layer, body, format, layer_index)
    _check_layers(server, directions)
    if layer is not None:
        layer = directions[0].layer  # a file may count layers in another way
    is_new = True

    def check(before: DirectionBook, after: DirectionBook) -> None:
        nonlocal is_new
        entries = entries_of(before, name, layer)
        is_new = not entries
        Preconditions(if_match, if_none_match).check(entries)
        _check_needed(server, before, after)

    entries = entries_of(await server.registry.put(directions, check), name, layer)
    return JSONResponse(
        {"directions": _listed(server, entries)}, status_code=201 if is_new else 200, headers={"ETag": etag_of(entries)}
    )


@router.delete("/v1/steering/directions/{name:path}", responses=refusals(401, 403, 404, 409, 412))
async def delete_direction(
    request: Request,
    name: str,
    layer: Layer = None,
    if_match: Condition = None,
    x_admin_key: AdminKey = None,
) -> dict[str, Any]:
    """Remove a name, at one layer or at all. Requests in flight keep its vectors."""
    server = server_of(request)
    check_admin(x_admin_key)

    def check(before: DirectionBook, after: DirectionBook) -> None:
        Preconditions(if_match).check(entries_of(before, name, layer))
        _check_needed(server, before, after)

    return {"deleted": _listed(server, await server.registry.remove(name, layer, check))}


def server_of(request: Request) -> SteeredServer:
    server = SERVER.of(request.app.state)
    if server is None:
        raise NotConfigured(
            "this server was started without steer_config, so it has no hooks; allowed: unsteered requests. Start it "
            'with --additional-config \'{"vllm_steer": {"layers": [...]}}\'.'
        )
    return server


def _check_layers(server: SteeredServer, directions: Iterable[Direction]) -> None:
    """Refuse directions of layers that the model lacks.

    Raises:
        LayerNotHooked: the message names the first.
    """
    for one in directions:
        if one.layer >= server.num_layers:
            raise LayerNotHooked(
                f"direction {one.name!r} belongs to layer {one.layer}; the model has layers 0 to "
                f"{server.num_layers - 1}. Send the direction of one of these."
            )


def _listed(server: SteeredServer, entries: Iterable[Registered]) -> list[dict[str, Any]]:
    return [
        {
            "name": one.name,
            "layer": one.layer,
            "content_hash": one.content_hash,
            "is_unit": one.is_unit,
            "norm": one.norm,
            "hooked": one.layer in server.settings.layers,
        }
        for one in entries
    ]


def check_admin(sent: str | None) -> None:
    key = os.environ.get(ADMIN_KEY_VARIABLE)
    if not key:
        raise ChangeNotAllowed(
            f"this server has no admin key, so nothing can be changed; start it with {ADMIN_KEY_VARIABLE} in "
            "its environment."
        )
    if sent is None:
        raise AdminKeyMissing("changes need the admin key; send it as the header X-Admin-Key.")
    if not hmac.compare_digest(sent.encode(), key.encode()):
        raise ChangeNotAllowed("X-Admin-Key is not this server's admin key; send the right one.")


def _check_needed(server: SteeredServer, before: DirectionBook, after: DirectionBook) -> None:
    """Refuse a change that makes a usable alias or a usable default steering unusable.

    Raises:
        DirectionNeeded: the message names the alias or the default.
    """
    settings = server.settings
    needs = [(who, one) for who, entries in server.aliases.own_steering().items() for one in entries]
    for who, steering in needs:
        if _is_usable(before, steering, settings) and not _is_usable(after, steering, settings):
            raise DirectionNeeded(
                f"{who} needs {steering.direction!r} and could not be used after this change; allowed: replacing the "
                f"direction. To delete it, remove {who} first."
            )


def _is_usable(book: DirectionBook, steering: Steering, settings: SteerSettings) -> bool:
    try:
        direction = book.find(steering.direction, steering.layer, settings.layers)
        if steering.when is not None:
            book.find(steering.when.direction, steering.when.layer, settings.layers)
    except (UnknownDirection, AmbiguousDirection, LayerNotHooked):
        return False
    return steering.op == "add" or direction.is_unit
