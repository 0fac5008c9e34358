"""The steered aliases of a server: those of its settings, and those that were put over HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_steer.schema.steering import Steering
from vllm_steer.server.registry.shared_registry import SharedRegistry
from vllm_steer.settings import SteerSettings

Aliases = Mapping[str, tuple[Steering, ...]]


class ServedAliases:
    """Alias -> its entries, as all API server processes of a server see them.

    Args:
        settings: the server's settings; its ``served_aliases`` cannot be changed while it runs.
        registry: keeps the others.
    """

    def __init__(self, settings: SteerSettings, registry: SharedRegistry) -> None:
        self._settings = settings
        self._registry = registry
        self._put: Aliases = {}
        self._all: Aliases = settings.served_aliases

    @property
    def configured(self) -> Aliases:
        """The aliases of the settings."""
        return self._settings.served_aliases

    def current(self) -> Aliases:
        """All aliases; the same object until something changes. An alias of the settings wins over one put."""
        put = self._registry.aliases()
        if put is not self._put:
            self._put, self._all = put, {**put, **self._settings.served_aliases}
        return self._all

    def to_json(self) -> dict[str, list[dict[str, Any]]]:
        """All aliases with their entries as JSON objects."""
        return {alias: [one.to_json() for one in entries] for alias, entries in self.current().items()}

    def own_steering(self) -> dict[str, tuple[Steering, ...]]:
        """The operator's steering, label for messages -> entries: each alias, and the default if there is one."""
        put = {f"alias {alias!r}": entries for alias, entries in self.current().items()}
        return put | self._settings.own_steering()
