"""``.brainpatch`` files: a ZIP archive with interventions in ``manifest.json`` and ``vectors.safetensors``."""

from __future__ import annotations

import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from vllm_steer.directions.quoting import MOST_QUOTED, one_line
from vllm_steer.directions.safetensors_file import read_tensors
from vllm_steer.directions.said import Said, member, number_of, stored
from vllm_steer.directions.unchecked import Stored
from vllm_steer.errors import BadDirectionFile

_MOST_BYTES = 256 << 20


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
        if said.layer in (None, layer):
            name = said.name or key
            coefficient = one.get("coefficient")
            vector = tensors[key].reshape(-1)
            found.append(stored(file, name, layer, vector, "block_output", "brainpatch", coefficient=coefficient))
    return found


def _opened(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        with zipfile.ZipFile(file) as archive:
            sizes = {one.filename: one.file_size for one in archive.infolist()}
            names = ("manifest.json", "vectors.safetensors")
            if any(sizes.get(name, 0) > _MOST_BYTES for name in names):
                raise ValueError(f"members of more than {_MOST_BYTES >> 20} MiB")
            text, vectors = (_bounded(archive, name) for name in names)
        manifest = json.loads(text)
    except (zipfile.BadZipFile, OSError, KeyError, ValueError, RecursionError, NotImplementedError, RuntimeError,
            EOFError) as error:  # fmt: skip
        raise BadDirectionFile(
            f"{file} is not a readable .brainpatch file ({one_line(error)}); allowed: undamaged ones. Copy it again."
        ) from None
    if not isinstance(manifest, dict):
        raise BadDirectionFile(f"{file} has a manifest that is no object; allowed: what its writer writes.")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "vectors.safetensors")
        copy.write_bytes(vectors)
        return manifest, dict(read_tensors(copy, shown=file))


def _bounded(archive: zipfile.ZipFile, name: str) -> bytes:
    with archive.open(name) as opened:  # the size that the archive claims may be wrong
        content = opened.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError(f"{name} has more than {_MOST_BYTES >> 20} MiB")
    return content
