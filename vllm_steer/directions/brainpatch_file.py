"""``.brainpatch`` files: a ZIP archive with interventions in ``manifest.json`` and ``vectors.safetensors``."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

from vllm_steer.directions.json_file import MOST_BYTES, json_object_in
from vllm_steer.directions.quoting import MOST_QUOTED, one_line
from vllm_steer.directions.safetensors_file import tensors_in
from vllm_steer.directions.said import Said, member, number_of, one_vector, stored
from vllm_steer.directions.unchecked import Stored
from vllm_steer.errors import BadDirectionFile

_UNREADABLE = (zipfile.BadZipFile, zlib.error, OSError, EOFError, KeyError, ValueError, RuntimeError)
"""What zipfile raises for damaged archives, for members that are missing, and for those that it cannot unpack."""


def read_brainpatch(file: Path, said: Said) -> list[Stored]:
    """Read the vector of every intervention, without its coefficient, which is in the metadata.

    Raises:
        BadDirectionFile: the archive is damaged or larger than allowed, or an intervention is not an addition to the
            output of a block.
    """
    manifest, tensors = _opened(file)
    interventions = member(file, manifest, "interventions")
    if not isinstance(interventions, list):
        raise BadDirectionFile(f"{file} has interventions that are no list; allowed: a list of objects.")
    found = []
    for one in interventions:
        if not isinstance(one, dict) or one.get("hook", "residual_post") != "residual_post":
            raise BadDirectionFile(
                f"{file} has the intervention {str(one)[:MOST_QUOTED]}; allowed: those at residual_post, the output of "
                "a block."
            )
        key = str(member(file, one, "vector"))
        if key not in tensors:
            raise BadDirectionFile(f"{file} has no vector {key!r:.{MOST_QUOTED}}; allowed: those that it names.")
        layer = number_of(file, member(file, one, "layer"), "a layer")
        vector, coefficient = one_vector(file, tensors[key], f"under {key!r}"), one.get("coefficient")
        found.append(
            stored(file, said.name or key, layer, vector, "block_output", "brainpatch", coefficient=coefficient)
        )
    return found


def _opened(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        with zipfile.ZipFile(file) as archive:
            manifest, vectors = (_bounded(archive, name) for name in ("manifest.json", "vectors.safetensors"))
    except _UNREADABLE as error:
        raise BadDirectionFile(
            f"{file} is not a readable .brainpatch file ({one_line(error)}); allowed: undamaged ones. Copy it again."
        ) from None
    return json_object_in(manifest, file), tensors_in(vectors, file)


def _bounded(archive: zipfile.ZipFile, name: str) -> bytes:
    with archive.open(name) as opened:  # the size that the archive claims may be wrong
        content = opened.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"{name} has more than {MOST_BYTES >> 20} MiB")
    return content
