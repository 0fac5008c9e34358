"""Sections of a study's steering grid: random control directions, and directions from files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

HUB_PREFIX = "hf://"
_CONTROL_ENDING = re.compile(r"(?P<name>.+)\.control(?P<number>\d+)")


def control_name(name: str, number: int) -> str:
    """Name of a control of the direction `name`: `empathy.control0`."""
    return f"{name}.control{number}"


def controlled_direction(name: str) -> str | None:
    """The direction whose control has this name; None for a name that is no control's."""
    match = _CONTROL_ENDING.fullmatch(name)
    return match["name"] if match else None


class Controls(BaseModel):
    """Random directions that go through the same grid, for what any push of that length does to the model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    random: int = Field(ge=1, le=100)
    """Controls of each steered direction at each of its layers, of the direction's length."""
    orthogonal: bool = True
    """Whether a control has nothing of its direction; false leaves it as it was drawn."""
    seed: int = Field(default=0, ge=0)
    """Seed of the controls; the seeds of their samples are those of the grid."""
    likelihood: bool = False
    """Read the controls' completions once more too, where the study's `likelihood` does so for the others."""


class DirectionFile(BaseModel):
    """A direction of a file, in place of a method's name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str = Field(min_length=1)
    """Any file or folder that `vllm_steer.load_directions` reads. Relative paths start at the config's folder."""
    name: str = Field(min_length=1)
    """What the direction is called in this study."""
    direction: Annotated[str, Field(min_length=1)] | None = None
    """Its name in the file; None where the file holds one name only."""
    layer: Annotated[int, Field(ge=0)] | None = None
    """The one layer at which it steers (0-based decoder block). None: every steered layer, each of which the file must
    have a vector for."""
    layer_index: Literal["block_output", "hidden_states"] | None = None
    """How the file counts layers, where its format does not say it."""
    feature: Annotated[int, Field(ge=0)] | None = None
    """Feature of a sparse autoencoder, for the files of such."""

    @field_validator("name")
    @classmethod
    def _is_no_controls_name(cls, name: str) -> str:
        if controlled_direction(name) is not None:
            raise ValueError(f"{name!r} is the name of a control; give a name that does not end in .control and digits")
        return name

    def layers(self, steered: Iterable[int]) -> tuple[int, ...]:
        """Those of the steered layers at which it steers."""
        return tuple(layer for layer in steered if self.layer in (None, layer))


def beside(folder: Path, name: str) -> str:
    """A path of a config, relative to the folder of the config; an address stays as it is."""
    return name if name.startswith(HUB_PREFIX) else str(folder / Path(name).expanduser())


def resolve_direction_files(document: Mapping[str, Any], folder: Path) -> None:
    """Make the paths of the direction files in a study's document relative to `folder`, in place."""
    steer = document.get("steer")
    directions = steer.get("directions") if isinstance(steer, Mapping) else None
    for entry in directions if isinstance(directions, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("file"), str):
            entry["file"] = beside(folder, entry["file"])


def without_file_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """A study's config, as a mapping, without the places of its direction files: their content counts instead."""
    steer = config.get("steer")
    directions = steer.get("directions") if isinstance(steer, Mapping) else None
    if not isinstance(steer, Mapping) or not isinstance(directions, list | tuple):
        return dict(config)
    placeless = [
        {field: value for field, value in one.items() if field != "file"} if isinstance(one, Mapping) else one
        for one in directions
    ]
    return {**config, "steer": {**steer, "directions": placeless}}
