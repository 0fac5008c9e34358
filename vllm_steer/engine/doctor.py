"""Predicts from the checkpoint's config alone whether an engine would start with steering."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from huggingface_hub.errors import StrictDataclassError
from pydantic import ValidationError
from vllm.engine.arg_utils import EngineArgs

from vllm_steer.directions import Direction, load_directions
from vllm_steer.engine.model_families import FAMILIES
from vllm_steer.engine.registry import DirectionRegistry
from vllm_steer.engine.startup_checks import refusals, refused_features
from vllm_steer.errors import SettingsError, SteerError
from vllm_steer.settings import CONFIG_KEY, SteerSettings, steer_config

Files = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The result of ``diagnose``.

    Attributes:
        model: the argument of ``diagnose``.
        architecture: as vLLM resolves it: the name in the checkpoint's config, or a name such as
            ``TransformersForCausalLM`` where vLLM has no class for that one or ``model_impl="transformers"`` was given.
        model_class: name of vLLM's class for the architecture.
        layer_class: class of its decoder layers, with the module; None for a family that is not supported.
        num_layers: number of decoder layers, which are counted from 0.
        hidden_size: number of elements of a direction's vector.
        dtype: the dtype that the engine would compute in, such as ``bfloat16``.
        runner: the vLLM model runner that would be chosen.
        layers: the layers that would be hooked.
        directions: ``name@layer`` of every direction in the direction files.
        problems: one sentence for each thing that would be refused; empty if the engine would start.
        refused_features: engine features that are refused together with steering if they are switched on.
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
        """True if nothing would be refused."""
        return not self.problems


def diagnose(
    model: str | os.PathLike[str],
    *,
    layers: Sequence[int] | None = None,
    directions: Files = (),
    **engine_args: Any,
) -> Diagnosis:
    """Check a model as the start of an engine would, without starting one and without loading weights.

    Args:
        model: local folder or hub id; only its config is read.
        layers: decoder layers to hook, counted from 0. Default: the layers of the directions, or all layers if there
            are no directions.
        directions: path of a direction file, or several paths.
        **engine_args: further arguments of ``vllm.LLM`` to include in the check.

    Raises:
        SettingsError: the config cannot be read, vLLM does not take the model, or ``layers`` is invalid.
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
            _engine_config(name, {**engine_args, "additional_config": steering})  # the check of an engine's start
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
    # A faulty config can raise any of these: no code between here and the file checks for it.
    except (OSError, ValueError, TypeError, AttributeError, KeyError, StrictDataclassError) as error:
        raise SettingsError(
            f"vLLM cannot configure an engine for {model}: {_first_line(error)}. Give a folder with a config.json, or "
            "a hub id that this machine can reach."
        ) from error


def _first_line(error: Exception) -> str:
    """The first line of an error message, without the paragraphs after it."""
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
