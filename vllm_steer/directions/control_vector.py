"""GGUF control vectors in the layout of llama.cpp and repeng. A file holds directions of one name.

Tensor ``direction.N`` is added to the output of the 0-based block N.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vllm_steer.directions.direction import Direction
from vllm_steer.directions.gguf_file import GgufFile, TensorTypeError
from vllm_steer.directions.quoting import MOST_QUOTED, one_line
from vllm_steer.directions.unchecked import LAYER, METADATA_KEY, Stored
from vllm_steer.errors import BadDirectionFile

_NAME_KEY = f"{METADATA_KEY}.name"


def read_control_vector(file: Path, name: str | None) -> list[Stored]:
    """Read the ``direction.N`` tensors of a file; other tensors are skipped.

    Args:
        file: path of the GGUF file.
        name: replaces the stored name; a file without a stored name uses its stem.

    Raises:
        BadDirectionFile: the file is damaged, or a vector is quantised.
    """
    try:
        stored = GgufFile(file)
        vectors = {
            int(match.group(1)): stored.values(tensor)
            for tensor in stored.tensors
            if (match := re.fullmatch(rf"direction\.{LAYER}", tensor.name)) is not None
        }
    except TensorTypeError as error:
        raise BadDirectionFile(
            f"{file}: {one_line(error)}. Export it again as one of these; or dequantise it (gguf.quants.dequantize), "
            "make a Direction of it and write it with save_directions to a .safetensors file."
        ) from None
    except (ValueError, OSError) as error:
        raise BadDirectionFile(
            f"{file} is not a readable GGUF file ({one_line(error)}); allowed: undamaged files. Copy it again, or "
            "export it again."
        ) from None
    if name is None:
        name = stored.texts.get(_NAME_KEY, file.stem)
    return [Stored(name, layer, vector) for layer, vector in vectors.items()]


def write_control_vector(file: Path, directions: Sequence[Direction]) -> None:
    """Write directions of one name as float32 tensors.

    Raises:
        BadDirectionFile: the directions have several names, or one has layer 0.
    """
    from gguf import GGUFWriter

    # Checked before the names: the advice there would lead to this refusal.
    if any(direction.layer == 0 for direction in directions):
        raise BadDirectionFile(
            "a GGUF control vector cannot hold layer 0 (llama.cpp starts at 1); allowed: layers from 1. Write a "
            ".safetensors file, which holds any layer."
        )
    names = sorted({direction.name for direction in directions})
    if len(names) > 1:
        raise BadDirectionFile(
            f"a GGUF control vector holds one name, got {names!s:.{MOST_QUOTED}}; allowed: one. Write a file for each "
            "name, or a .safetensors file, which holds any names."
        )
    writer = GGUFWriter(str(file), "controlvector")
    writer.add_string("controlvector.model_hint", "unknown")
    writer.add_uint32("controlvector.layer_count", len(directions))
    writer.add_string(_NAME_KEY, names[0])
    for direction in sorted(directions, key=lambda direction: direction.layer):
        writer.add_tensor(f"direction.{direction.layer}", np.ascontiguousarray(direction.vector))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
