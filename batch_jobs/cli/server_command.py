"""`vllm-steer serve`: vLLM's own server with the plugin switched on. What is built here is a command, nothing else."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from batch_jobs.config.server import ServerConfig
from batch_jobs.config.study import DEMO_MODEL
from batch_jobs.engine.start_engine import decoder_blocks, model_location
from vllm_steer import Direction, Steering, When, load_directions
from vllm_steer.errors import LayerNotHooked, SettingsError, UnknownDirection

PLUGIN = "vllm_steer"
ADMIN_KEY_VARIABLE = "VLLM_STEER_ADMIN_KEY"
_WRITTEN_HERE = {
    "--additional-config": "--layers, --directions, --alias and --config",
    "--model": "the first argument of vllm-steer serve",
}


@dataclass(frozen=True)
class ServerCommand:
    """A process to run: vLLM's server, its arguments, and what its environment has beyond this process's."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    secrets: Mapping[str, str]
    """The same, but never shown."""
    remarks: tuple[str, ...] = ()
    """What the operator may not have meant, a line each."""

    def shown(self) -> str:
        """The command for a shell, without the secrets."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*settings, shlex.join(self.arguments)])

    def run(self) -> None:
        """Become the server: its signals and its exit code are this process's. Does not return.

        Raises SettingsError where no vLLM is installed.
        """
        if importlib.util.find_spec("vllm") is None:
            raise SettingsError("no vLLM is installed here; install vllm-steer[cuda] or vllm-steer[cpu].")
        sys.stdout.flush()
        sys.stderr.flush()
        os.execvpe(self.arguments[0], self.arguments, {**os.environ, **self.environment, **self.secrets})


def server_command(config: ServerConfig, passed_on: Sequence[str], admin_key: str | None = None) -> ServerCommand:
    """The command that serves `config`. `passed_on` are further flags of vLLM, which win over the config's.

    Layers and aliases are checked here, from the model's config and the direction files, because vLLM takes a minute to
    get as far. Raises SettingsError for flags that are written here and for layers that the model lacks or nothing
    names, LayerNotHooked and UnknownDirection for an alias that could not steer, StudyError where there is no model.
    """
    flags = [*config.vllm_arguments(), *passed_on]
    given = {flag.partition("=")[0].replace("_", "-") for flag in flags if flag.startswith("--")}
    for flag, instead in _WRITTEN_HERE.items():
        if any(name.partition(".")[0] == flag for name in given):
            raise SettingsError(f"{flag} was given, which vllm-steer serve writes itself; use {instead} instead.")
    directions = [direction for file in config.directions for direction in load_directions(file)]
    layers = config.layers or tuple(sorted({direction.layer for direction in directions}))
    if not layers:
        raise SettingsError("no layers to hook; give --layers 8,12 or --directions FILE, whose layers are taken.")
    location = model_location(config.model)
    blocks = decoder_blocks(location, trust_remote_code="--trust-remote-code" in given)
    if lacking := [layer for layer in layers if layer >= blocks]:
        raise SettingsError(
            f"layers {lacking} do not exist: {config.model} has {blocks} decoder blocks; allowed: 0 to {blocks - 1}."
        )
    if beyond := next((one for one in directions if one.layer >= blocks), None):
        raise SettingsError(
            f"direction {beyond.name!r} belongs to layer {beyond.layer}: {config.model} has {blocks} decoder blocks; "
            f"allowed: 0 to {blocks - 1}. Give the directions of this model."
        )
    _check_aliases(config, layers, directions)
    if config.model == DEMO_MODEL and "--served-model-name" not in given:
        flags = ["--served-model-name", DEMO_MODEL, *flags]
    arguments = (
        sys.executable,
        "-m",
        "vllm_steer.server.vllm_serve",
        "serve",
        location,
        "--additional-config",
        json.dumps(config.additional_config(layers)),
        *flags,
    )
    # vLLM loads plugins that add routes only where this variable names them
    plugins = os.environ.get("VLLM_PLUGINS") or PLUGIN
    secrets = {ADMIN_KEY_VARIABLE: admin_key} if admin_key else {}
    return ServerCommand(arguments, {"VLLM_PLUGINS": plugins}, secrets, _remarks(layers, directions))


def _remarks(layers: Sequence[int], directions: Sequence[Direction]) -> tuple[str, ...]:
    """A line for each name of which no direction is at a hooked layer."""
    own: dict[str, set[int]] = {}
    hooked = ", ".join(map(str, layers))
    for direction in directions:
        own.setdefault(direction.name, set()).add(direction.layer)
    return tuple(
        f"direction {name!r} belongs to layer {', '.join(map(str, sorted(at)))}, and only {hooked} "
        "are hooked: a request that names no layer is refused. Add its layer to --layers."
        for name, at in own.items()
        if not at & set(layers)
    )


def _check_aliases(config: ServerConfig, layers: Sequence[int], directions: Sequence[Direction]) -> None:
    named: dict[str, set[int]] = {}
    for direction in directions:
        named.setdefault(direction.name, set()).add(direction.layer)
    everywhere = {**config.served_aliases, "default_steering": config.default_steering}
    for alias, entries in everywhere.items():
        named_by: list[Steering | When] = [*entries, *(entry.when for entry in entries if entry.when is not None)]
        for one in named_by:
            # what a registry folder holds is known to the server alone
            if one.direction not in named and config.registry_dir is None:
                raise UnknownDirection(
                    f"{alias} names {one.direction!r}; the direction files hold "
                    f"{', '.join(sorted(named)) or 'none'}. Add its file with --directions."
                )
            own = named.get(one.direction, set()) if one.layer is None else {one.layer}
            if own and not own & set(layers):
                raise LayerNotHooked(
                    f"{alias} names layer {' or '.join(map(str, sorted(own)))}; hooked: {list(layers)}. Add the "
                    "layer to --layers."
                )
