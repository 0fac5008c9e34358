"""Directions of files that a study steers with: read, checked against the study and made unit vectors."""

from __future__ import annotations

from collections.abc import Sequence

from batch_jobs.config.steering import DirectionFile
from batch_jobs.config.study import Study, StudyError
from vllm_steer import Direction, load_directions
from vllm_steer.errors import BadDirectionFile, SteerError

UNIT_ROUNDING = 1e-6
"""A float32 vector that was divided by its length has a length within this of 1."""


def read_direction_files(study: Study, *, hidden_size: int | None = None) -> list[Direction]:
    """The directions of the files in `steer.directions`, at the layers where they steer, named as in the study.

    Each is made a unit vector, like the study's own, so that α means the same for all; the metadata keeps its length in
    the file as `stored_norm`, and its own name as `stored_name`. The sign stays: +α is towards where the vector points.

    Args:
        study: names the files.
        hidden_size: width of the model's residual stream, to refuse another model's directions; None checks nothing.

    Raises:
        StudyError: a file cannot be read, lacks a layer, holds several directions and the entry does not say which, or
            is of another width; the message names the entry.
    """
    return [
        direction
        for entry in study.steer.direction_files
        for direction in _read(entry, entry.layers(study.steer.layers), hidden_size)
    ]


def _read(entry: DirectionFile, layers: Sequence[int], hidden_size: int | None) -> list[Direction]:
    where = f"steer.directions entry {entry.name!r}, {entry.file}"
    try:
        stored = _load(entry)
    except SteerError as error:
        raise StudyError(f"{where}: {error}") from error
    names = sorted({one.name for one in stored})
    if entry.direction is not None:
        stored = [one for one in stored if one.name == entry.direction]
        if not stored:
            raise StudyError(f"{where}: holds no direction {entry.direction!r}; allowed: {', '.join(names)}.")
    elif len(names) > 1:
        raise StudyError(f"{where}: holds {len(names)} directions; say which by `direction`: {', '.join(names)}.")
    by_layer = {one.layer: one for one in stored}
    if lacking := [layer for layer in layers if layer not in by_layer]:
        raise StudyError(
            f"{where}: has no vector at the output of block {lacking}, only of {sorted(by_layer)}; set `layer` to one "
            "of these to steer there alone, or change steer.layers."
        )
    found = [_as_steered(entry, by_layer[layer]) for layer in layers]
    if hidden_size is not None and (widths := {one.vector.size for one in found} - {hidden_size}):
        raise StudyError(
            f"{where}: is {min(widths)} numbers wide and the model's residual stream {hidden_size}; give a direction "
            "of this model."
        )
    return found


def _load(entry: DirectionFile) -> list[Direction]:
    try:
        return load_directions(entry.file, layer_index=entry.layer_index, feature=entry.feature)
    except BadDirectionFile:
        # a format that stores no name or no layer, such as .npy: the entry's are the vector's
        counted = entry.layer
        if counted is not None and entry.layer_index == "hidden_states":
            counted += 1
        return load_directions(
            entry.file, name=entry.name, layer=counted, layer_index=entry.layer_index, feature=entry.feature
        )


def _as_steered(entry: DirectionFile, stored: Direction) -> Direction:
    # what is of length 1 already keeps its bits, and so its content hash
    unit = stored if abs(stored.norm - 1.0) <= UNIT_ROUNDING else stored.normalised()
    about = {**stored.metadata, "stored_name": stored.name, "stored_norm": stored.norm}
    return Direction(entry.name, stored.layer, unit.vector, about)
