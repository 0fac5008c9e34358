"""What would happen if an engine of a model were started with steering, told from the checkpoint's config alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from huggingface_hub.errors import StrictDataclassError
from pydantic import ValidationError
from vllm.engine.arg_utils import EngineArgs

from vllm_steer.directions import Direction, load_directions
from vllm_steer.engine.config import refusals, refused_features
from vllm_steer.engine.decoder_layers import FAMILIES
from vllm_steer.engine.registry import DirectionRegistry
from vllm_steer.errors import SettingsError, SteerError
from vllm_steer.settings import CONFIG_KEY, SteerSettings, steer_config

Files = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What ``diagnose`` found.

    Attributes:
        model: as it was given.
        architecture: as vLLM resolves it: the name in the checkpoint's config, or ``TransformersForCausalLM`` and the
            like where vLLM has no class for that name or was started with ``model_impl="transformers"``.
        model_class: vLLM's class for it.
        layer_class: class of its decoder layers with their module; None for a family that is not supported.
        num_layers: how many decoder layers it has; they are numbered from 0.
        hidden_size: elements of a direction's vector.
        dtype: what the engine would compute in, such as ``bfloat16``.
        runner: which of vLLM's model runners would be chosen.
        layers: what was asked to be hooked.
        directions: ``name@layer`` of all that the direction files hold.
        problems: everything that would be refused, a sentence each; empty where the engine would start.
        refused_features: engine features that would be refused beside steering if they were switched on.
    """

    model: str
    architecture: str
    model_class: str
    layer_class: str | None
    num_layers: int
    hidden_size: int
    dtype: str
    runner: Literal["classic", "V2"]
    layers: tuple[int, ...]
    directions: tuple[str, ...]
    problems: tuple[str, ...]
    refused_features: tuple[str, ...]

    @property
    def is_fit(self) -> bool:
        """Whether nothing would be refused."""
        return not self.problems


def diagnose(
    model: str | os.PathLike[str],
    *,
    layers: Sequence[int] | None = None,
    directions: Files = (),
    **engine_args: Any,
) -> Diagnosis:
    """Check a model as an engine's start would, without an engine and without its weights.

    Args:
        model: local folder or hub id; only its config is read.
        layers: decoder blocks to hook, 0-based. By default those of the directions, or else all.
        directions: direction files.
        **engine_args: further arguments of ``vllm.LLM`` to check with.

    Raises:
        SettingsError: the config cannot be read, or vLLM takes no such model; or ``layers`` make no sense.
        BadDirectionFile, BadVector: a direction file cannot be read.
    """
    name = os.fspath(model)
    files = (directions,) if isinstance(directions, str | os.PathLike) else tuple(directions)
    found = [direction for file in files for direction in load_directions(file)]
    config = _engine_config(name, engine_args)
    model_config = config.model_config
    num_layers, hidden_size = model_config.get_total_num_hidden_layers(), model_config.get_hidden_size()
    if layers is None:
        layers = sorted({direction.layer for direction in found}) or range(num_layers)
    steering = steer_config(layers, files)
    settings = SteerSettings.parse(steering[CONFIG_KEY])
    problems = [str(refusal) for refusal in refusals(config, settings)]
    if not problems:
        try:
            _engine_config(name, {**engine_args, "additional_config": steering})  # an engine's start has the last word
        except SteerError as error:
            problems.append(str(error))
    family = FAMILIES.get(model_config.architecture)
    return Diagnosis(
        model=name,
        architecture=model_config.architecture,
        model_class=model_config._model_info.architecture,
        layer_class=None if family is None else family.layer_class,
        num_layers=num_layers,
        hidden_size=hidden_size,
        dtype=str(model_config.dtype).removeprefix("torch."),
        runner="V2" if config.use_v2_model_runner else "classic",
        layers=settings.layers,
        directions=tuple(direction.key for direction in found),
        problems=(*problems, *_misfits(found, settings, hidden_size)),
        refused_features=tuple(refused_features(config)),
    )


def _engine_config(model: str, engine_args: dict[str, Any]) -> Any:
    try:
        return EngineArgs(model=model, **engine_args).create_engine_config()
    except SteerError:
        raise
    # What a fault of the config ends in, which nobody between here and the file looks for.
    except (OSError, ValueError, TypeError, AttributeError, KeyError, StrictDataclassError) as error:
        raise SettingsError(
            f"vLLM makes no engine of {model}: {_first_line(error)}. Give a folder with a config.json, or a hub id "
            "that this machine can reach."
        ) from error


def _first_line(error: Exception) -> str:
    """What an error says, without the paragraphs behind it."""
    text = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
    first, *others = text.strip().splitlines() or [type(error).__name__]
    if first.endswith(":") and others:
        first = f"{first} {others[0].strip()}"
    return first.rstrip(".")


def _misfits(directions: Sequence[Direction], settings: SteerSettings, hidden_size: int) -> Iterator[str]:
    try:
        DirectionRegistry(settings.max_directions, hidden_size).register(directions)
    except SteerError as error:
        yield str(error)
    for direction in directions:
        if direction.layer not in settings.layers:
            yield (
                f"direction {direction.key!r} belongs to layer {direction.layer}; hooked: {list(settings.layers)}. "
                "Hook its layer too."
            )
