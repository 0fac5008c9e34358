"""Reads and writes direction files. The suffix of the path selects the format."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from vllm_steer.directions.control_vector import read_control_vector, write_control_vector
from vllm_steer.directions.direction import Direction
from vllm_steer.directions.npy_file import read_npy
from vllm_steer.directions.quoting import MOST_QUOTED
from vllm_steer.directions.safetensors_file import read_safetensors, write_safetensors
from vllm_steer.directions.unchecked import Stored
from vllm_steer.errors import BadDirectionFile, BadVector, MalformedSpec

_WRITERS = {".safetensors": write_safetensors, ".gguf": write_control_vector}


def load_directions(path: str | os.PathLike[str], name: str | None = None, layer: int | None = None) -> list[Direction]:
    """Read every direction of a file, ordered by layer and name.

    Args:
        path: ``.safetensors`` (tensor keys ``name@layer``; float64, float32, float16, bfloat16 or whole numbers),
            ``.npy`` (one vector of any real dtype) or ``.gguf`` (a control vector; float64, float32, float16 or
            bfloat16).
        name: required for ``.npy``; for ``.gguf`` it replaces the stored name or the file's stem.
        layer: required for ``.npy``, ignored otherwise.

    Raises:
        BadDirectionFile: the file is missing, truncated, of another format or dtype, or holds no direction.
        BadVector: a vector is not finite, not one-dimensional, or zero.
    """
    file = Path(path)
    if not os.path.isfile(file):  # Path.is_file would raise for a name that is too long
        raise BadDirectionFile(f"no direction file at {file}; give the path of a .safetensors, .npy or .gguf file.")
    if file.suffix == ".safetensors":
        found = read_safetensors(file)
    elif file.suffix == ".npy":
        if name is None or layer is None:
            raise BadDirectionFile(
                f"{file} is a .npy file, which stores neither name nor layer; allowed here: files that do. Call "
                "load_directions(path, name=..., layer=...), or convert it: vllm-steer convert FILE.npy "
                "FILE.safetensors --name NAME --layer LAYER."
            )
        found = [Stored(name, layer, read_npy(file))]
    elif file.suffix == ".gguf":
        found = read_control_vector(file, name)
    else:
        raise BadDirectionFile(
            f"{file} ends in {file.suffix!r:.{MOST_QUOTED}}; allowed: .safetensors, .npy, .gguf. Read it with the "
            "library that wrote it, make a Direction of each vector and write them with save_directions."
        )
    if not found:
        raise BadDirectionFile(
            f"{file} holds no direction; allowed: at least one tensor, named name@layer (.safetensors) or direction.N "
            "(.gguf). Extract or export it again."
        )
    directions = [_checked(file, one) for one in found]
    return sorted(directions, key=lambda direction: (direction.layer, direction.name))


def save_directions(path: str | os.PathLike[str], directions: Sequence[Direction]) -> None:
    """Write directions to ``path`` (``.safetensors`` or ``.gguf``), atomically, as float32.

    A GGUF control vector holds one name, and no layer 0, because llama.cpp starts at layer 1; it loses the directions'
    metadata.

    Raises:
        BadDirectionFile: there are no directions, two have the same name and layer, the suffix is another one, or the
            format cannot hold the directions.
    """
    file = Path(path)
    if file.suffix not in _WRITERS:
        raise BadDirectionFile(
            f"{file} ends in {file.suffix!r:.{MOST_QUOTED}}; allowed: .safetensors, .gguf. Choose one of these endings."
        )
    if not directions:
        raise BadDirectionFile(f"no directions to write to {file}; allowed: at least one. Give one.")
    keys = [direction.key for direction in directions]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise BadDirectionFile(f"{twice[0]!r} comes twice; allowed: each name once a layer. Leave one of them out.")
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    os.close(descriptor)
    try:
        _WRITERS[file.suffix](Path(temporary), directions)
        Path(temporary).chmod(0o644)  # mkstemp makes private files, and a server may run as another user
        os.replace(temporary, file)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _checked(file: Path, one: Stored) -> Direction:
    """Validate a stored direction and compare it with the hash that `save_directions` wrote, if there is one."""
    try:
        direction = Direction(one.name, one.layer, one.vector, one.metadata)  # type: ignore[arg-type]  # any real dtype
    except BadVector as error:
        raise BadVector(f"{file}: {error}") from None
    except MalformedSpec as error:
        do = ""
        if file.suffix == ".gguf":
            do = " Another name is given by load_directions(path, name=...) or vllm-steer convert --name."
        raise BadDirectionFile(f"{file}: {error}{do}") from None
    if one.sha256 not in (None, direction.content_hash):
        raise BadDirectionFile(
            f"{file} holds other values for {direction.key!r} than were written (its SHA-256 differs); allowed: "
            "unchanged files. Copy it again; values that were changed on purpose are written with save_directions."
        )
    return direction
