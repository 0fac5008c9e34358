"""Directions in safetensors files: one tensor per direction, named ``name@layer``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vllm_steer.directions.bfloat16 import float32_of_bfloat16
from vllm_steer.directions.direction import Direction
from vllm_steer.directions.quoting import MOST_QUOTED, one_line
from vllm_steer.directions.unchecked import LAYER, LAYERS_ALLOWED, METADATA_KEY, Stored
from vllm_steer.errors import BadDirectionFile

_FORMAT = 1
_Written = tuple[str | None, Mapping[str, Any]]
"""SHA-256 of a direction, None if it is not known, and the direction's metadata."""
_BFLOAT16 = "BF16"
# safetensors dtype -> NumPy dtype. bfloat16, which NumPy lacks, is read as its bits.
_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    _BFLOAT16: "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "|u1",
}


def read_safetensors(file: Path) -> list[Stored]:
    """Read all tensors of a file, in memory proportional to its size.

    Names and dtypes are checked first, so that a model's checkpoint is refused before its tensors are read.

    Raises:
        BadDirectionFile: the file is damaged, or a tensor's name, dtype or shape is not allowed.
    """
    from safetensors import SafetensorError, deserialize, safe_open

    try:
        with safe_open(str(file), framework="numpy") as opened:
            written = _written(file, opened.metadata() or {})
            for key in opened.keys():  # noqa: SIM118  (safe_open is no mapping)
                _check(file, key, opened.get_slice(key).get_dtype())
        # Not get_tensor(), which needs PyTorch for bfloat16. Both calls check every offset against the file's size.
        tensors = deserialize(file.read_bytes())  # type: ignore[no-untyped-call]  # not annotated
    except (SafetensorError, OSError) as error:
        raise BadDirectionFile(
            f"{file} is not a readable safetensors file ({one_line(error)}); allowed: undamaged files. Copy it again, "
            "or write it again with save_directions."
        ) from None
    return [_stored(file, key, tensor, written.get(key, (None, {}))) for key, tensor in tensors]


def write_safetensors(file: Path, directions: Sequence[Direction]) -> None:
    """Write directions as float32 tensors, with their hashes, norms and own metadata in the file's metadata."""
    from safetensors.numpy import save_file

    about: dict[str, dict[str, Any]] = {one.key: {"sha256": one.content_hash, "norm": one.norm} for one in directions}
    for one in directions:
        if one.metadata:
            about[one.key]["metadata"] = dict(one.metadata)
    save_file(
        {direction.key: np.ascontiguousarray(direction.vector) for direction in directions},
        str(file),
        metadata={METADATA_KEY: json.dumps({"format": _FORMAT, "directions": about}, sort_keys=True)},
    )


def _check(file: Path, key: str, dtype: str) -> None:
    if re.fullmatch(LAYER, key.rpartition("@")[2]) is None or "@" not in key:
        raise BadDirectionFile(
            f"{file} has a tensor named {key!r:.{MOST_QUOTED}}; allowed: name@layer, layer {LAYERS_ALLOWED}. Rename it."
        )
    if dtype not in _DTYPES:
        raise BadDirectionFile(
            f"{file} stores {key!r:.{MOST_QUOTED}} as {dtype}; allowed: {', '.join(_DTYPES)}. Convert it to float32 "
            "(tensor.float() in PyTorch), make a Direction of it and write it with save_directions."
        )


def _stored(file: Path, key: str, tensor: Mapping[str, Any], written: _Written) -> Stored:
    dtype, shape = tensor["dtype"], tensor["shape"]
    _check(file, key, dtype)  # checked again: the file may have been replaced
    values = np.frombuffer(tensor["data"], _DTYPES[dtype])
    try:
        vector = (float32_of_bfloat16(values) if dtype == _BFLOAT16 else values).reshape(shape)
    except ValueError:  # (0, 2**63), or more dimensions than an array can have
        raise BadDirectionFile(
            f"{file} holds {key!r:.{MOST_QUOTED}} of shape {shape!s:.{MOST_QUOTED}}; allowed: [D] with D the hidden "
            "size. Write one vector a tensor."
        ) from None
    name, _, layer = key.rpartition("@")
    return Stored(name, int(layer), vector, *written)


def _written(file: Path, metadata: Mapping[str, str]) -> dict[str, _Written]:
    """Key -> what `save_directions` wrote about it; empty for files from other software."""
    try:
        noted = json.loads(metadata.get(METADATA_KEY, "{}")).get("directions", {})
        return {key: (about["sha256"], about.get("metadata", {})) for key, about in noted.items()}
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise BadDirectionFile(
            f"{file} has unreadable metadata ({one_line(error)}); allowed: none, or what save_directions writes. Write "
            "it again with save_directions."
        ) from None
