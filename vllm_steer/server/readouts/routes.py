"""``GET /v1/steering/readouts/{reply id}``: the readouts of a finished reply, for clients that drop them."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from vllm_steer.engine.patching import Attribute
from vllm_steer.errors import NotConfigured
from vllm_steer.server.inbound.api_key import api_key
from vllm_steer.server.openapi import refusals
from vllm_steer.server.readouts.kept_readouts import KeptReadouts
from vllm_steer.server.refusing_route import RefusingRoute

readout_router = APIRouter(route_class=RefusingRoute)
KEPT: Attribute[KeptReadouts] = Attribute(
    "the server's application state",
    "vllm_steer_kept_readouts",
    why="Where the middleware keeps readouts for the route that gives them.",
    gone_when="an endpoint plugin has a state of its own.",
)


@readout_router.get("/v1/steering/readouts/{reply_id:path}", responses=refusals(404))
def get_readouts(request: Request, reply_id: str) -> Response:
    """The readouts of the choices of a reply, asked with the API key of its request."""
    kept = KEPT.of(request.app.state)
    if kept is None:
        raise NotConfigured(
            "this server was started without steer_config, so it reads nothing; allowed: plain requests. Start it with "
            "vllm-steer serve."
        )
    return Response(kept.load(reply_id, api_key(request.scope)), media_type="application/json")
