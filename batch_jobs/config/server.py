"""The config of `vllm-steer serve`: one typed schema, read from YAML and the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from batch_jobs.config.entry_text import parse_entry
from batch_jobs.files.documents import read_yaml
from vllm_steer import Steering
from vllm_steer.errors import SettingsError
from vllm_steer.settings import SteerSettings, steer_config

Flag = bool | int | float | str | list[str | int | float] | dict[str, Any]


class ServerConfig(SteerSettings):
    """The plugin's settings, the model, and flags of vLLM.

    Attributes:
        model: hub id, local path, or `demo-model`.
        layers: as in SteerSettings; if empty, the layers of the directions are hooked.
        vllm: flag of vLLM's server, without the dashes -> its value. true gives the flag alone, false its `no-` form,
            a list several values, a mapping JSON.
    """

    model: Annotated[str, Field(min_length=1)]
    layers: tuple[Annotated[int, Field(ge=0, strict=True)], ...] = ()
    vllm: dict[str, Flag] = Field(default_factory=dict)

    def additional_config(self, layers: Sequence[int]) -> dict[str, Any]:
        """The value of vLLM's `--additional-config`, with `layers` hooked."""
        own = set(SteerSettings.model_fields) - {"layers", "directions", "plugin_build"}
        return steer_config(layers, self.directions, **self.model_dump(mode="json", include=own))

    def vllm_arguments(self) -> list[str]:
        """The flags in `vllm` as command-line arguments."""
        return [word for name, value in self.vllm.items() for word in _words(name, value)]


def load_server_config(path: Path | None, options: Mapping[str, Any]) -> ServerConfig:
    """Read a server's YAML and lay the command line's options over it.

    Paths in the YAML are relative to its own folder. `directions` and `served_aliases` of `options` are added to those
    of the YAML; every other option replaces the YAML's value.

    Raises:
        SettingsError: the YAML or an option is wrong; the message names file, field, what was got and what is allowed.
    """
    document = {} if path is None else _read_yaml(path)
    where = "the command line" if path is None else str(path)
    merged = {**document, **options}
    if options.get("directions"):
        merged["directions"] = [*document.get("directions", ()), *options["directions"]]
    if options.get("served_aliases"):
        merged["served_aliases"] = {**(document.get("served_aliases") or {}), **options["served_aliases"]}
    if "model" not in merged:
        raise SettingsError(
            "no model was given; name it first: vllm-steer serve MODEL ..., or put it into the --config YAML."
        )
    try:
        return ServerConfig.model_validate(merged)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "settings"
        allowed = ", ".join(name for name in ServerConfig.model_fields if name != "plugin_build")
        raise SettingsError(
            f"{where}: {field} is {first['input']!r}: {first['msg']}; allowed fields: {allowed}. Correct it."
        ) from None


def parse_layers(text: str) -> list[int]:
    """Parse layer numbers such as `8,12`.

    Raises:
        SettingsError: `text` has another form.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise SettingsError(f"--layers is {text!r}; allowed: layer numbers separated by commas, such as 8,12.")
    return [int(part) for part in parts]


def parse_alias(text: str) -> tuple[str, Steering]:
    """Parse `NAME=direction:alpha` or `NAME=direction:alpha@layer` into the alias and its Steering.

    Raises:
        SettingsError: `text` has another form.
        SteerError: `Steering` refuses the values.
    """
    name, _, entry = text.partition("=")
    steering = parse_entry(entry)
    if not name or steering is None:
        raise SettingsError(
            f"--alias is {text!r}; allowed: NAME=direction:alpha or NAME=direction:alpha@layer, such as "
            "demo-kind=kind:8@12. Correct it."
        )
    return name, steering


def _read_yaml(path: Path) -> dict[str, Any]:
    document = read_yaml(path, advice="give the path of a server's YAML file", error=SettingsError)
    if not isinstance(document, dict):
        raise SettingsError(
            f"{path}: got {type(document).__name__} at the top level; a server config is a mapping of fields."
        )
    directions = document.get("directions", [])
    if isinstance(directions, str):
        directions = [directions]
    if isinstance(directions, list) and all(isinstance(file, str) for file in directions):
        document["directions"] = [_beside(path, file) for file in directions]
    if isinstance(document.get("registry_dir"), str):
        document["registry_dir"] = _beside(path, document["registry_dir"])
    return document


def _beside(path: Path, name: str) -> str:
    return str((path.parent / Path(name).expanduser()).resolve())


def _words(name: str, value: Flag) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    if isinstance(value, list):
        return [flag, *map(str, value)]
    return [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
