"""Entry point of ``vllm.endpoint_plugins``: adds the plugin to vLLM's OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import os
from argparse import Namespace
from typing import Any

from fastapi import FastAPI, Request
from starlette.datastructures import State
from vllm.entrypoints.launchers.launcher import terminate_if_errored

from vllm_steer.engine.background import run_in_background
from vllm_steer.engine.front.admission import Admission, admission_of
from vllm_steer.engine.front.all_engines import call_workers
from vllm_steer.engine.log import logger
from vllm_steer.engine.patching import Attribute
from vllm_steer.engine.vllm_versions import is_disabled
from vllm_steer.engine.worker_answers import whole_model
from vllm_steer.errors import NotConfigured, SettingsError, SteerError, UnknownDirection
from vllm_steer.schema.request_spec import RequestSpec
from vllm_steer.server.middleware import SERVED, Served, SteerMiddleware
from vllm_steer.server.playground.page import playground_router
from vllm_steer.server.registry.routes import ADMIN_KEY_VARIABLE, SERVER, SteeredServer, router
from vllm_steer.server.registry.shared_registry import share_registry

WATCH_SECONDS = 0.5
"""Time between two checks of the engine."""


class SteerEndpoints:
    """The ``EndpointPlugin`` of vllm-steer (vllm/plugins/endpoint_plugins/interface.py, 0.32.0)."""

    name = "vllm_steer"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes and the middleware. vLLM later adds its own middleware around it, including authentication.

        If ``VLLM_STEER_DISABLE`` turns the plugin off, this adds nothing.
        """
        if is_disabled():
            return
        app.include_router(router)
        app.include_router(playground_router(_has_playground))
        app.add_middleware(SteerMiddleware)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Join the server's registry and start to serve. Without ``steer_config``, the routes refuse every request.

        Raises:
            SettingsError: an alias is the name of the model itself or of a LoRA module, or an alias or the default
                steering can never be honoured.
            SteerError: as ``share_registry``.
        """
        if engine_client is None:  # a server that only renders prompts
            return
        try:
            admission = admission_of(engine_client.input_processor)
        except NotConfigured:
            return
        models = state.openai_serving_models
        for alias in admission.settings.served_aliases:
            is_lora = alias in models.lora_requests
            if is_lora or models.is_base_model(alias):
                raise SettingsError(
                    f"served_aliases has {alias!r}, the name that {'a LoRA module' if is_lora else 'the model itself'} "
                    "is served by; allowed: any other name. Rename one of them."
                )
        registry = await share_registry(admission, engine_client)
        _check_own_steering(admission)
        model = whole_model(await call_workers(engine_client, "vllm_steer_model"))
        SERVER.put(state, SteeredServer(admission.settings, registry, model))
        SERVED.put(state, Served(admission, models.model_name()))
        WATCHDOG.put(state, run_in_background(_end_with(engine_client, state), "The watch of the engine"))


async def _end_with(engine_client: Any, state: State) -> None:
    """End the server soon after its engine dies. vLLM checks every five seconds, or when a request hits the error."""
    while True:
        await asyncio.sleep(WATCH_SECONDS)
        server = getattr(state, "server", None)  # vLLM sets it after the plugins have started
        if server is not None:
            terminate_if_errored(server, engine_client)


def _check_own_steering(admission: Admission) -> None:
    """Refuse aliases and a default that can never be honoured; warn of those whose directions may still come.

    Raises:
        SettingsError: the message names the alias or the default.
    """
    for who, entries in admission.settings.own_steering().items():
        try:
            admission.check(RequestSpec(entries))
        except SteerError as error:
            if not isinstance(error, UnknownDirection) or not os.environ.get(ADMIN_KEY_VARIABLE):
                raise SettingsError(f"{who} could never be honoured: {error}") from None
            logger.warning("Requests to %s will be refused until its direction is registered: %s", who, error)


def _has_playground(request: Request) -> bool:
    server = SERVER.of(request.app.state)
    return server is not None and server.settings.playground


WATCHDOG: Attribute[asyncio.Task[None]] = Attribute(
    "the server's application state",
    "vllm_steer_watchdog",
    why="The task that ends the server soon after its engine; vLLM itself looks every five seconds.",
    gone_when="vLLM ends a server as soon as its engine is dead.",
)
