"""Entry point of ``vllm.endpoint_plugins``: adds the plugin to vLLM's OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import os
from argparse import Namespace
from functools import partial
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
from vllm_steer.server.inbound.model_names import ModelNames
from vllm_steer.server.middleware import SERVED, Served, SteerMiddleware
from vllm_steer.server.playground.page import playground_router
from vllm_steer.server.readouts.kept_readouts import KeptReadouts
from vllm_steer.server.readouts.routes import KEPT, readout_router
from vllm_steer.server.registry.alias_routes import alias_router
from vllm_steer.server.registry.aliases import ServedAliases
from vllm_steer.server.registry.routes import ADMIN_KEY_VARIABLE, SERVER, SteeredServer, router
from vllm_steer.server.registry.shared_registry import share_registry
from vllm_steer.settings import SteerSettings

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
        for one in (router, alias_router, readout_router):
            app.include_router(one)
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
        settings, models = admission.settings, state.openai_serving_models
        registry = await share_registry(admission, engine_client)
        aliases = ServedAliases(settings, registry)
        taken = partial(_owner_of, models)
        for alias in aliases.current():
            if owner := taken(alias):
                where = (
                    "served_aliases has" if alias in settings.served_aliases else "the registry's folder has the alias"
                )
                raise SettingsError(
                    f"{where} {alias!r}, the name that {owner} is served by; allowed: any other name. Rename one of "
                    "them."
                )
        _check_own_steering(admission, aliases)
        model = whole_model(await call_workers(engine_client, "vllm_steer_model"))
        processes = engine_client.vllm_config.parallel_config._api_process_count
        kept = KeptReadouts(
            registry.directory.readouts, settings.kept_readouts_mib, settings.kept_readouts_seconds, processes
        )
        KEPT.put(state, kept)
        blocks = engine_client.vllm_config.model_config.get_total_num_hidden_layers()
        SERVER.put(state, SteeredServer(settings, registry, model, aliases, admission.check, taken, blocks))
        SERVED.put(state, Served(admission, partial(_names, models.model_name(), aliases, settings)))
        WATCHDOG.put(state, run_in_background(_end_with(engine_client, state), "The watch of the engine"))


async def _end_with(engine_client: Any, state: State) -> None:
    """End the server soon after its engine dies. vLLM checks every five seconds, or when a request hits the error."""
    while True:
        await asyncio.sleep(WATCH_SECONDS)
        server = getattr(state, "server", None)  # vLLM sets it after the plugins have started
        if server is not None:
            terminate_if_errored(server, engine_client)


def _names(base: str, aliases: ServedAliases, settings: SteerSettings) -> ModelNames:
    return ModelNames(base, aliases.current(), settings.steering_in_model_names)


def _owner_of(models: Any, name: str) -> str | None:
    """What vLLM serves by a name; None if nothing."""
    if name in models.lora_requests:
        return "a LoRA module"
    return "the model itself" if models.is_base_model(name) else None


def _check_own_steering(admission: Admission, aliases: ServedAliases) -> None:
    """Refuse aliases and a default that can never be honoured; warn of those whose directions may still come.

    An alias that was put over HTTP under an earlier server only warns, since its owner may not be able to change it
    while the server is down.

    Raises:
        SettingsError: the message names the alias or the default.
    """
    configured = admission.settings.own_steering()
    for who, entries in aliases.own_steering().items():
        try:
            admission.check(RequestSpec(entries))
        except SteerError as error:
            may_come = isinstance(error, UnknownDirection) and bool(os.environ.get(ADMIN_KEY_VARIABLE))
            if who in configured and not may_come:
                raise SettingsError(f"{who} could never be honoured: {error}") from None
            logger.warning("Requests to %s will be refused until this is mended: %s", who, error)


def _has_playground(request: Request) -> bool:
    server = SERVER.of(request.app.state)
    return server is not None and server.settings.playground


WATCHDOG: Attribute[asyncio.Task[None]] = Attribute(
    "the server's application state",
    "vllm_steer_watchdog",
    why="The task that ends the server soon after its engine; vLLM itself looks every five seconds.",
    gone_when="vLLM ends a server as soon as its engine is dead.",
)
