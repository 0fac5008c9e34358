"""The model arguments of lm-eval's model `vllm-steer`, checked before an engine starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batch_jobs.config.entry_text import parse_entries
from batch_jobs.engine.scored_spans import refuse_prompt_conditions
from vllm_steer import Direction, Steering, load_directions, spans
from vllm_steer.errors import LayerNotHooked, SettingsError, UnknownDirection

STEER_SETTINGS = (
    "max_alpha",
    "max_alpha_residual_norm",
    "max_directions",
    "max_entries",
    "max_windows",
    "residual_norms",
    "unproven_model",
)
"""Settings of `steer_config` that a model argument may set; what servers and readouts need is not among them."""
IN_GEN_KWARGS = ("steering", "readout", "vllm_steer")
_NESTS = ("extra_args", "extra_body", "vllm_xargs")


@dataclass(frozen=True)
class HookSettings:
    """What is hooked, which directions are registered, and the steering of all requests.

    Attributes:
        layers: hooked decoder blocks.
        directions: the directions of the files.
        entries: the steering; empty for the unsteered model.
        steer: other settings of `steer_config`.
    """

    layers: tuple[int, ...]
    directions: tuple[Direction, ...]
    entries: tuple[Steering, ...]
    steer: Mapping[str, Any]

    @classmethod
    def parse(
        cls, *, layers: object, directions: object, steering: object, span: object, steer: Mapping[str, Any]
    ) -> HookSettings:
        """Read the model arguments.

        Args:
            layers: block indices, as a number, a list or text such as `8;12`; None for those of the directions.
            directions: a direction file or several; text may join them by `;`.
            steering: see `parse_entries`; None for the unsteered model.
            span: the span of entries that have none of their own.
            steer: settings of `steer_config`.

        Raises:
            SettingsError: an argument is empty or has another form.
            SteerError: a file or an entry cannot be used.
        """
        loaded = tuple(one for file in _files(directions) for one in load_directions(file))
        hooked = _layers(layers) if layers is not None else tuple(sorted({one.layer for one in loaded}))
        if not hooked:
            raise SettingsError(
                "no layers to hook; give the model argument directions=FILE, whose layers are taken, or layers=12."
            )
        if span is not None:
            spans.check(span)
            if steering is None:
                raise SettingsError(f"span is {span!r} and there is no steering; allowed: both. Give steering too.")
        of_entries = "all" if span is None else str(span)
        entries = () if steering is None else parse_entries(steering, where="steering", span=of_entries)
        return cls(hooked, loaded, check_entries(entries, loaded, hooked), steer)


def check_entries(
    entries: Sequence[Steering], directions: Sequence[Direction], layers: Sequence[int]
) -> tuple[Steering, ...]:
    """The entries, if the engine can apply all of them to generations and to scored texts alike.

    Raises:
        UnknownDirection, LayerNotHooked, BadCondition: it cannot.
    """
    known: dict[str, set[int]] = {}
    for direction in directions:
        known.setdefault(direction.name, set()).add(direction.layer)
    for entry in entries:
        for one in (entry, *(() if entry.when is None else (entry.when,))):
            if one.direction not in known:
                raise UnknownDirection(
                    f"steering names {one.direction!r}; the direction files hold {', '.join(sorted(known)) or 'none'}. "
                    "Add its file to directions."
                )
            own = known[one.direction] if one.layer is None else {one.layer}
            if not own & set(layers):
                raise LayerNotHooked(
                    f"steering names layer {' or '.join(map(str, sorted(own)))}; hooked: {list(layers)}. Add it to "
                    "layers."
                )
    refuse_prompt_conditions(entries)
    return tuple(entries)


def refuse_steering_in(gen_kwargs: Mapping[str, Any]) -> None:
    """Check that a task's generation arguments do not steer: they reach no log-likelihood.

    Raises:
        SettingsError: they do.
    """
    nested = [gen_kwargs[name] for name in _NESTS if isinstance(gen_kwargs.get(name), Mapping)]
    named = [name for one in (gen_kwargs, *nested) for name in IN_GEN_KWARGS if name in one]
    if named:
        raise SettingsError(
            f"gen_kwargs has {named[0]!r}, which would steer what is generated and no log-likelihood; allowed: the "
            "model argument steering=..., which steers both. Move it there."
        )


def _files(value: object) -> list[str]:
    if value is None:
        return []
    listed = value if isinstance(value, list | tuple) else [value]
    parts = [part.strip() for one in listed for part in str(one).split(";")]
    if not parts or not all(parts) or not all(isinstance(one, str | Path) for one in listed):
        raise SettingsError(
            f"directions is {value!r}; allowed: the path of a direction file, or several joined by ; or in a list. "
            "Correct it, or leave it out."
        )
    return parts


def _layers(value: object) -> tuple[int, ...]:
    parts: Any = value.replace(",", ";").split(";") if isinstance(value, str) else value
    listed = list(parts) if isinstance(parts, list | tuple) else [parts]
    try:
        found = tuple(sorted({int(part) for part in listed if not isinstance(part, bool | float)}))
    except (TypeError, ValueError):
        found = ()
    if not found or found[0] < 0 or any(isinstance(part, bool | float) for part in listed):
        raise SettingsError(
            f"layers is {value!r}; allowed: block indices from 0, such as 12, 8;12 or a JSON list. Correct it."
        )
    return found
