"""Routes that make and remove steered aliases while the server runs."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from vllm_steer.errors import AliasNotFound, BadAlias, MalformedSpec
from vllm_steer.schema.request_spec import RequestSpec
from vllm_steer.schema.wire import parsed_json
from vllm_steer.server.openapi import ENTRIES, refusals
from vllm_steer.server.refusing_route import RefusingRoute
from vllm_steer.server.registry.routes import AdminKey, SteeredServer, check_admin, server_of
from vllm_steer.server.registry.upload import read_upload

alias_router = APIRouter(route_class=RefusingRoute)


@alias_router.get("/v1/steering/aliases")
def list_aliases(request: Request) -> dict[str, Any]:
    """All aliases with their entries."""
    return {"aliases": server_of(request).aliases.to_json()}


@alias_router.put("/v1/steering/aliases/{alias:path}", responses=refusals(400, 401, 403, 409), openapi_extra=ENTRIES)
async def put_alias(request: Request, alias: str, x_admin_key: AdminKey = None) -> JSONResponse:
    """Make a model name stand for a steering, ``{"steering": [entries]}``; requests in flight keep what they have."""
    server = server_of(request)
    check_admin(x_admin_key)
    _check_name(server, alias)
    length = request.headers.get("Content-Length")
    body = await read_upload(request.stream(), length, server.settings.max_upload_mib)
    spec = RequestSpec.from_json(parsed_json(body, "the body", '{"steering": [...]}. Send that'))
    if not spec.entries or spec.readout is not None:
        raise MalformedSpec('an alias needs entries and nothing else; allowed: {"steering": [...]}. Send that.')
    is_new = await server.registry.put_alias(alias, spec.entries, lambda: server.check(RequestSpec(spec.entries)))
    return JSONResponse(
        {"alias": alias, "steering": [one.to_json() for one in spec.entries]}, status_code=201 if is_new else 200
    )


@alias_router.delete("/v1/steering/aliases/{alias:path}", responses=refusals(401, 403, 404, 409))
async def delete_alias(request: Request, alias: str, x_admin_key: AdminKey = None) -> dict[str, str]:
    """Remove an alias that was put."""
    server = server_of(request)
    check_admin(x_admin_key)
    if alias in server.aliases.configured:
        raise BadAlias(_configured(alias))
    if not await server.registry.remove_alias(alias):
        put = ", ".join(name for name in server.aliases.current() if name not in server.aliases.configured) or "none"
        raise AliasNotFound(f"no alias {alias!r} was put; allowed: {put}. Name one of these.")
    return {"deleted": alias}


def _check_name(server: SteeredServer, alias: str) -> None:
    """Refuse a name that means something else.

    Raises:
        BadAlias: the message says what the name is.
    """
    if alias in server.aliases.configured:
        raise BadAlias(_configured(alias))
    taken = server.taken(alias)
    if taken is not None:
        raise BadAlias(f"{alias!r} is the name that {taken} is served by; allowed: any other name. Choose one.")
    if server.settings.steering_in_model_names and "@" in alias:
        raise BadAlias(
            f"{alias!r} has an @, after which this server reads entries; allowed: names without it. Choose one."
        )


def _configured(alias: str) -> str:
    return (
        f"{alias!r} is in the server's settings (served_aliases), which stay as they are while it runs; allowed: "
        "aliases with other names. Choose one, or change the settings and start the server again."
    )
