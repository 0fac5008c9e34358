"""Predicts whether an engine would start with steering, from the checkpoint's config and without its weights."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from huggingface_hub.errors import StrictDataclassError
from pydantic import ValidationError
from vllm.engine.arg_utils import EngineArgs

from vllm_steer.directions import Direction, load_directions
from vllm_steer.engine.layer_classes import LAYER_CLASSES, classes_compared_for
from vllm_steer.engine.registry import DirectionRegistry
from vllm_steer.engine.shrunken_model import examine_shrunken
from vllm_steer.engine.startup_checks import REFUSED_REQUESTS, refusals, refused_features
from vllm_steer.engine.worker_answers import ModelRecord, classes_in
from vllm_steer.errors import BankFull, SettingsError, SteerError, UnsupportedModel
from vllm_steer.settings import CONFIG_KEY, SteerSettings, UnprovenModel, steer_config

# Prefix of vLLM's classes that run Hugging Face's modules: TransformersForCausalLM, TransformersMoEForCausalLM.
_BY_HUGGING_FACE = "Transformers"
Files = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The result of ``diagnose``.

    Attributes:
        model: the argument of ``diagnose``.
        architecture: as vLLM resolves it: the name in the checkpoint's config, or a name such as
            ``TransformersForCausalLM`` where vLLM has no class for that one or ``model_impl="transformers"`` was given.
        model_class: name of vLLM's class for the architecture.
        layer_classes: the classes of its decoder layers: those with which this architecture was compared with Hugging
            Face, or, after a run, those of the copy; empty if neither is known.
        proof: why steering it is taken to be right: ``parity``, its layers' classes were compared with Hugging Face;
            ``experiment``, the experiment of a start alone, on the copy; ``unknown``, the architecture was not
            compared and no copy was run; ``refused``.
        experiment: the record of the experiment on the copy, see ``model_record``; None without a run.
        num_layers: number of decoder layers, which are counted from 0.
        hidden_size: number of elements of a direction's vector.
        dtype: the dtype that the engine would compute in, such as ``bfloat16``.
        runner: the vLLM model runner that would be chosen.
        layers: the layers that would be hooked.
        directions: ``name@layer`` of every direction in the direction files.
        problems: one sentence for each thing that would be refused; empty if the engine would start.
        refused_features: engine features that are refused together with steering if they are switched on, with why.
        refused_requests: kinds of requests that may neither be steered nor read, with why.
    """

    model: str
    architecture: str
    model_class: str
    layer_classes: tuple[str, ...]
    proof: Literal["parity", "experiment", "unknown", "refused"]
    experiment: ModelRecord | None
    num_layers: int
    hidden_size: int
    dtype: str
    runner: Literal["classic", "V2"]
    layers: tuple[int, ...]
    directions: tuple[str, ...]
    problems: tuple[str, ...]
    refused_features: tuple[str, ...]
    refused_requests: tuple[str, ...]

    @property
    def is_fit(self) -> bool:
        """True if nothing would be refused."""
        return not self.problems


def diagnose(
    model: str | os.PathLike[str],
    *,
    layers: Sequence[int] | None = None,
    directions: Files = (),
    unproven_model: UnprovenModel = "refuse",
    run: bool = False,
    **engine_args: Any,
) -> Diagnosis:
    """Check a model as the start of an engine would, without starting one and without loading weights.

    Args:
        model: local folder or hub id; only its config is read.
        layers: decoder layers to hook, counted from 0. Default: the layers of the directions, or all layers if there
            are no directions.
        directions: path of a direction file, or several paths.
        unproven_model: the setting of this name, see ``steer_config``.
        run: perform the experiment of an engine's start too, on a small copy of the model with random weights, in
            another process; about as long as vLLM takes to start.
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
    steering = steer_config(layers, files, unproven_model=unproven_model)
    settings = SteerSettings.parse(steering[CONFIG_KEY])
    found_at_start = list(refusals(config, settings))
    problems = [str(refusal) for refusal in found_at_start]
    if not problems:
        try:
            _engine_config(name, {**engine_args, "additional_config": steering})  # the check of an engine's start
        except BankFull:
            pass  # _misfits says so below
        except SteerError as error:
            problems.append(str(error))
    model_class: str = model_config._model_info.architecture
    is_refused = any(isinstance(refusal, UnsupportedModel) for refusal in found_at_start)
    classes = _compared(model_config.architectures[0], model_class)
    record = None
    if run and not is_refused:
        try:
            kept: dict[str, Any] = {
                one: engine_args[one] for one in ("model_impl", "trust_remote_code") if one in engine_args
            }
            if model_config.is_multimodal_model:
                kept["language_model_only"] = True
            record = examine_shrunken(name, model_config.hf_config, kept)
            classes = tuple(classes_in(record))
        except UnsupportedModel as error:
            problems.append(str(error))
            is_refused = True
    proof = "refused" if is_refused else _proof(classes)
    if proof in ("unknown", "experiment") and unproven_model == "refuse":
        problems.append(_unproven(model_config.architectures[0], model_class, classes))
    return Diagnosis(
        model=name,
        architecture=model_config.architecture,
        model_class=model_class,
        layer_classes=classes,
        proof=proof,
        experiment=record,
        num_layers=num_layers,
        hidden_size=hidden_size,
        dtype=str(model_config.dtype).removeprefix("torch."),
        runner="V2" if config.use_v2_model_runner else "classic",
        layers=settings.layers,
        directions=tuple(direction.key for direction in found),
        problems=(*problems, *_misfits(found, settings, hidden_size)),
        refused_features=tuple(refused_features(config)),
        refused_requests=REFUSED_REQUESTS,
    )


def _compared(architecture: str, model_class: str) -> tuple[str, ...]:
    """The classes with which an architecture was compared, if vLLM runs it through the same kind of model now."""
    by_hugging_face = model_class.startswith(_BY_HUGGING_FACE)
    rows = classes_compared_for(architecture)
    return tuple(row.path for row in rows if row.path.startswith("transformers.") == by_hugging_face)


def _proof(classes: Sequence[str]) -> Literal["parity", "experiment", "unknown"]:
    if not classes:
        return "unknown"
    return "parity" if all(path in LAYER_CLASSES for path in classes) else "experiment"


def _unproven(architecture: str, model_class: str, classes: Sequence[str]) -> str:
    as_run = f", which vLLM runs as {model_class}," if model_class != architecture else ""
    allowed = (
        "allowed: architectures in docs/conformance.md, others whose decoder layers are of a class that is listed "
        "there, and any with steer_config(unproven_model='experiment')"
    )
    if not classes:
        return (
            f"steering of {architecture}{as_run} was never compared with Hugging Face, and what its decoder layers are "
            f"is known once it is loaded; {allowed}. Run the experiment on a copy to see: vllm-steer doctor --run."
        )
    unproven = ", ".join(path for path in classes if path not in LAYER_CLASSES)
    return (
        f"the decoder layers of {architecture}{as_run} are of {unproven}, whose steering was never compared with "
        f"Hugging Face; {allowed}. Set it, or use another model."
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
