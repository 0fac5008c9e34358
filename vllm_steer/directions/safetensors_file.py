"""Directions in safetensors files: one tensor per direction, named ``name@layer``; and what other packages write.

================  =====================================================  =============
writer            tensors                                                counts layers
================  =====================================================  =============
this package      ``name@layer``                                         block_output
saklas            ``layer_L``, beside a JSON file of the same stem        block_output
steerkit          ``direction.METHOD``, the layer in the file's metadata  block_output
persona-vectors   ``steering_vector`` beside ``metadata.json``            block_output
any other         one vector, one vector a layer, or keys that are layers as given
================  =====================================================  =============
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_steer.directions.bfloat16 import float32_of_bfloat16
from vllm_steer.directions.direction import Direction
from vllm_steer.directions.json_file import read_json_object
from vllm_steer.directions.layer_keys import layers_of_keys
from vllm_steer.directions.quoting import MOST_QUOTED, one_line
from vllm_steer.directions.said import NOTHING_SAID, Said, how_counted, member, number_of, of_array, one_vector, stored
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


def read_safetensors(file: Path, said: Said = NOTHING_SAID) -> list[Stored]:
    """Read all tensors of a file, in memory proportional to its size.

    Names and dtypes are checked first, so that a model's checkpoint is refused before its tensors are read.

    Raises:
        BadDirectionFile: the file is damaged, a tensor's name, dtype or shape is not allowed, the vectors belong to
            another site than the output of a block, or the caller must say what the file does not.
    """
    dtypes, metadata = _header(file)
    read = None if any("@" in key for key in dtypes) else _reader(file, list(dtypes), metadata, said)
    if read is not None:
        return read(file, metadata, said)
    for key, dtype in dtypes.items():
        _check_name(file, key)
        _check_dtype(file, key, dtype)
    return _own(file, metadata, said)


def own_keys(file: Path) -> list[str]:
    """The keys ``name@layer`` of a file of this package, from its header alone; none if another package wrote it.

    Raises:
        BadDirectionFile: the file is damaged, or a key or dtype is not allowed.
    """
    dtypes, _ = _header(file)
    if not any("@" in key for key in dtypes):
        return []
    for key, dtype in dtypes.items():
        _check_name(file, key)
        _check_dtype(file, key, dtype)
    return list(dtypes)


def read_some(file: Path, keys: Sequence[str]) -> list[Stored]:
    """The directions of these keys in a file that ``write_safetensors`` wrote; the others are not read.

    Raises:
        BadDirectionFile: the file is missing or damaged, or has no such key.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="numpy") as opened:
            written = _written(file, opened.metadata() or {})
            vectors = [opened.get_tensor(key) for key in keys]
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from None
    named = (key.rpartition("@") for key in keys)
    return [
        Stored(name, int(layer), vector, *written.get(key, (None, {})))
        for key, (name, _, layer), vector in zip(keys, named, vectors, strict=True)
    ]


def read_tensors(file: Path, only: str | None = None) -> dict[str, npt.NDArray[Any]]:
    """The tensors of a file by name; bfloat16 becomes float32.

    Args:
        file: the file.
        only: the name of the one tensor to return.

    Raises:
        BadDirectionFile: the file is damaged, or a dtype or shape is not allowed.
    """
    try:
        return tensors_in(file.read_bytes(), file, only)
    except OSError as error:
        raise _damaged(file, error) from None


def tensors_in(content: bytes, file: Path, only: str | None = None) -> dict[str, npt.NDArray[Any]]:
    """``read_tensors`` of the bytes of a safetensors file; ``file`` is for messages."""
    from safetensors import SafetensorError, deserialize

    try:
        # Not get_tensor(), which needs PyTorch for bfloat16. Every offset is checked against the size.
        tensors = deserialize(content)  # type: ignore[no-untyped-call]  # not annotated
    except SafetensorError as error:
        raise _damaged(file, error) from None
    return {key: _values(file, key, tensor) for key, tensor in tensors if only in (None, key)}


def _header(file: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Tensor -> its dtype, and the metadata."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="numpy") as opened:
            dtypes = {key: opened.get_slice(key).get_dtype() for key in opened.keys()}  # noqa: SIM118  (no mapping)
            return dtypes, opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from None


def _damaged(file: Path, error: Exception) -> BadDirectionFile:
    return BadDirectionFile(
        f"{file} is not a readable safetensors file ({one_line(error)}); allowed: undamaged files. Copy it again, "
        "or write it again with save_directions."
    )


def _reader(
    file: Path, keys: Sequence[str], metadata: Mapping[str, str], said: Said
) -> Callable[[Path, Mapping[str, str], Said], list[Stored]] | None:
    if "hidden_states" in keys and "token_ids" in keys:
        raise BadDirectionFile(
            f"{file} is a capture of hidden states; allowed: directions. Make one of it: make_direction of the rows of "
            "two kinds of texts."
        )
    if keys and all(re.fullmatch(rf"layer_{LAYER}", key) for key in keys):
        return _saklas
    if keys and "hook_site" in metadata and all(key.startswith("direction.") for key in keys):
        return _steerkit
    if list(keys) == ["steering_vector"] and (file.parent / "metadata.json").is_file():
        return _persona_vector
    if keys and layers_of_keys(file, keys) is not None:
        return _by_layer
    return _plain if len(keys) == 1 and (said.layer is not None or said.layer_index is not None) else None


def _saklas(file: Path, metadata: Mapping[str, str], said: Said) -> list[Stored]:
    beside = file.with_suffix(".json")
    method = read_json_object(beside).get("method") if beside.is_file() else None
    layers = {int(key.removeprefix("layer_")): vector for key, vector in read_tensors(file).items()}
    # Only the file beside it is a mark of saklas: any other writer may name layers so, and count them otherwise.
    counts = "block_output" if method is not None or said.layer_index is None else said.layer_index
    name = said.name or file.stem
    return [
        stored(file, name, layer, one_vector(file, vector, f"at layer {layer}"), counts, "saklas", method=method)
        for layer, vector in layers.items()
    ]


def _steerkit(file: Path, metadata: Mapping[str, str], said: Said) -> list[Stored]:
    site, layer = metadata["hook_site"], metadata.get("layer", "")
    if site != "resid_post" or re.fullmatch(LAYER, layer) is None or layer == metadata.get("n_total_layers"):
        raise BadDirectionFile(
            f"{file} belongs to {site!r:.{MOST_QUOTED}} of layer {layer!r:.{MOST_QUOTED}} (-1 is the embeddings, the "
            "number of layers the final norm); allowed: resid_post of a block. Train a probe there."
        )
    base = said.name or file.name.removesuffix(".safetensors").removesuffix(".probe")
    methods = {key.removeprefix("direction."): vector for key, vector in read_tensors(file).items()}
    return [
        stored(
            file, f"{base}.{method}", int(layer), one_vector(file, vector, f"of method {method!r}"), "block_output",
            "steerkit", method=method,
        )
        for method, vector in methods.items()
    ]  # fmt: skip


def _persona_vector(file: Path, metadata: Mapping[str, str], said: Said) -> list[Stored]:
    beside = file.parent / "metadata.json"
    about = read_json_object(beside)
    said = said._replace(layer=number_of(beside, member(beside, about, "layer"), "a layer"))
    name = str(about.get("persona_id") or file.stem)
    vector = read_tensors(file)["steering_vector"]
    alpha = about.get("suggested_alpha")
    return of_array(file, vector, said, "persona-vectors", "block_output", name, suggested_alpha=alpha)


def _by_layer(file: Path, metadata: Mapping[str, str], said: Said) -> list[Stored]:
    tensors = read_tensors(file)
    counts, name = how_counted(file, said, None, "vectors by layer"), said.name or file.stem
    return [
        stored(file, name, layer, one_vector(file, vector, f"under {key!r}"), counts, "safetensors")
        for layer, (key, vector) in zip(layers_of_keys(file, tensors) or (), tensors.items(), strict=True)
    ]


def _plain(file: Path, metadata: Mapping[str, str], said: Said) -> list[Stored]:
    ((_, vector),) = read_tensors(file).items()
    return of_array(file, vector, said, "safetensors")


def _own(file: Path, metadata: Mapping[str, str], said: Said) -> list[Stored]:
    written = _written(file, metadata)
    tensors = read_tensors(file)
    for key in tensors:
        _check_name(file, key)  # checked again: the file may have been replaced
    names = sorted({key.rpartition("@")[0] for key in tensors})
    if said.name is not None and len(names) > 1:
        raise BadDirectionFile(
            f"{file} holds the names {str(names)[:MOST_QUOTED]}, got one name for them; allowed: another name for a "
            "file with one. Leave it out."
        )
    found = []
    for key, vector in tensors.items():
        name, _, layer = key.rpartition("@")
        found.append(Stored(said.name or name, int(layer), vector, *written.get(key, (None, {}))))
    return found


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


def _check_name(file: Path, key: str) -> None:
    if re.fullmatch(LAYER, key.rpartition("@")[2]) is None or "@" not in key:
        raise BadDirectionFile(
            f"{file} has a tensor named {key!r:.{MOST_QUOTED}}; allowed: name@layer, layer {LAYERS_ALLOWED}. Rename "
            "it; or, if it is one vector or one vector a layer, give layer= or layer_index=."
        )


def _check_dtype(file: Path, key: str, dtype: str) -> None:
    if dtype not in _DTYPES:
        raise BadDirectionFile(
            f"{file} stores {key!r:.{MOST_QUOTED}} as {dtype}; allowed: {', '.join(_DTYPES)}. Convert it to float32 "
            "(tensor.float() in PyTorch), make a Direction of it and write it with save_directions."
        )


def _values(file: Path, key: str, tensor: Mapping[str, Any]) -> npt.NDArray[Any]:
    dtype, shape = tensor["dtype"], tensor["shape"]
    _check_dtype(file, key, dtype)
    values = np.frombuffer(tensor["data"], _DTYPES[dtype])
    try:
        return (float32_of_bfloat16(values) if dtype == _BFLOAT16 else values).reshape(shape)
    except ValueError:  # (0, 2**63), or more dimensions than an array can have
        raise BadDirectionFile(
            f"{file} holds {key!r:.{MOST_QUOTED}} of shape {shape!s:.{MOST_QUOTED}}; allowed: [D] with D the hidden "
            "size. Write one vector a tensor."
        ) from None


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
