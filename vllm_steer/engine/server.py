"""Entry point of ``vllm.endpoint_plugins``: what a server says of its steering, under ``/v1`` for its key to guard."""

from __future__ import annotations

import contextlib
from argparse import Namespace
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import State

from vllm_steer import __version__
from vllm_steer.engine.requests import admission_of
from vllm_steer.errors import NotConfigured

router = APIRouter()
_STATE = "vllm_steer_admission"


class SteerEndpoints:
    """The ``EndpointPlugin`` of vllm-steer (vllm/plugins/endpoint_plugins/interface.py, 0.32.0)."""

    name = "vllm_steer"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes."""
        app.include_router(router)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Find the engine's admission; without one the route says so."""
        setattr(state, _STATE, None)
        if engine_client is not None:
            with contextlib.suppress(NotConfigured):  # then the route answers 404
                setattr(state, _STATE, admission_of(engine_client.input_processor))


@router.get("/v1/steering")
async def show_steering(request: Request) -> JSONResponse:
    """Hooked layers, limits and registered directions."""
    admission = getattr(request.app.state, _STATE, None)
    if admission is None:
        message = "this server was started without steer_config; start it with --additional-config to steer."
        return JSONResponse({"error": {"message": message, "type": "NotFoundError", "code": 404}}, status_code=404)
    settings = admission.settings
    return JSONResponse(
        {
            "version": __version__,
            "layers": list(settings.layers),
            "max_alpha": settings.max_alpha,
            "max_entries": settings.max_entries,
            "max_directions": settings.max_directions,
            "directions": [
                {"name": one.name, "layer": one.layer, "content_hash": one.content_hash}
                for one in admission.registry.all()
            ],
        }
    )
