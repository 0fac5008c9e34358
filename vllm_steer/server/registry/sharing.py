"""Replaces an engine's own registry by the server's shared one."""

from __future__ import annotations

import atexit
from pathlib import Path
from typing import Any

from vllm_steer.directions import Direction
from vllm_steer.engine.front.admission import Admission
from vllm_steer.engine.front.in_flight import InFlight
from vllm_steer.engine.registry import bank_writes, configured_directions
from vllm_steer.server.registry.directory import RegistryDirectory, Server
from vllm_steer.server.registry.shared_registry import SharedRegistry


async def share_registry(admission: Admission, engine_client: Any) -> SharedRegistry:
    """Make ``admission`` use the registry that all API server processes share.

    Each process awaits it before it serves any request.

    Args:
        admission: the admission of this process.
        engine_client: vLLM's ``AsyncLLM``.

    Raises:
        SettingsError, SteerError: as ``SharedRegistry.start``.
    """

    async def write(writes: list[tuple[int, Direction]]) -> None:
        await engine_client.collective_rpc("vllm_steer_write", args=(bank_writes(writes),))

    config, settings = engine_client.vllm_config, admission.settings
    server = Server.of(config.parallel_config._api_process_count)
    if settings.registry_dir is None:
        directory = RegistryDirectory.private(server)
        atexit.register(directory.remove_if_unused)
    else:
        directory = RegistryDirectory(Path(settings.registry_dir))
    registry = SharedRegistry(directory, server, settings.max_directions, config.model_config.get_hidden_size(), write)
    atexit.register(registry.close)  # runs before remove_if_unused: atexit goes backwards
    await registry.start(configured_directions(settings))
    # The engine answers a process's messages in order, so an answer to is_sleeping means that all before are handled.
    admission.in_flight = InFlight(registry.use, engine_client.is_sleeping, registry.released)
    admission.registry = registry
    return registry
