"""Steering vectors in JSON, ``.svec``: of IBM's activation-steering, and of AISteer360 with several rows a layer."""

from __future__ import annotations

from pathlib import Path

from vllm_steer.directions.json_file import read_json_object
from vllm_steer.directions.said import Said, member, number_of, stored, vector_of
from vllm_steer.directions.unchecked import Stored
from vllm_steer.errors import BadDirectionFile


def read_svec(file: Path, said: Said) -> list[Stored]:
    """Read the vectors of all layers. The K rows of a layer are named ``name.0`` to ``name.K-1`` if there are several.

    Both writers read block L's output for layer L. activation-steering then adds the vector to block L's input, which
    this package does not: a direction is added where it was read.

    Raises:
        BadDirectionFile: the file is damaged.
    """
    directions = member(file, read_json_object(file), "directions")
    if not isinstance(directions, dict):
        raise BadDirectionFile(f"{file} has directions that are no object; allowed: layer -> numbers. Export it again.")
    name, found = said.name or file.stem, []
    for key, value in directions.items():
        layer = number_of(file, key, "a layer")
        nested = bool(value) and isinstance(value, list) and all(isinstance(row, list) for row in value)
        rows = value if nested else [value]
        for number, row in enumerate(rows):
            called = name if len(rows) == 1 else f"{name}.{number}"
            writer = "aisteer360" if nested else "activation-steering"
            found.append(stored(file, called, layer, vector_of(file, row), "block_output", writer))
    return found
