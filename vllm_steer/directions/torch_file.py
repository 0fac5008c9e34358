"""PyTorch files of tensors, without running code from them: stacks of layers, and dicts of several packages.

=======================  ==============================================================  =============
writer                   content                                                         counts layers
=======================  ==============================================================  =============
persona_vectors          ``{trait}_response_avg_diff.pt``, a tensor (layers + 1, D)      hidden_states
refusal_direction        ``direction.pt``, (D,), beside ``direction_metadata.json``      hidden_states
rotalabs-steer           ``layer_L.pt``, (D,), beside ``layer_L.json``                   block_output
lm-eval                  {hook point: {steering_vector, steering_coefficient, action}}   block_output
wisent                   {vectors: {"k": (D,)}, method, metadata}                        hidden_states
any other                a tensor, or a dict from layer or name to (D,)                  as given
=======================  ==============================================================  =============

A layer as a key of a dict is 12, "12", "layer_12", "layers.12" or "model.layers.12".
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vllm_steer.directions.direction import Direction
from vllm_steer.directions.json_file import read_json_object
from vllm_steer.directions.layer_keys import layers_of_keys, quoted
from vllm_steer.directions.quoting import MOST_QUOTED, one_line
from vllm_steer.directions.said import (
    LayerIndex,
    Said,
    how_counted,
    is_one_vector,
    member,
    number_of,
    of_array,
    one_vector,
    stored,
)
from vllm_steer.directions.unchecked import LAYER, Stored
from vllm_steer.errors import BadDirectionFile

if TYPE_CHECKING:
    import torch

_PERSONA = re.compile(r"(.+)_(?:prompt|response)_(?:avg|last)_diff")
HOOK_POINT = re.compile(rf"(?:[\w.]+\.)?(?:layers|h|blocks)\.{LAYER}")
"""The modules of whole blocks, as lm-eval names them."""
_UNREADABLE = (
    *(zipfile.BadZipFile, OSError, RuntimeError, ValueError, EOFError, KeyError, TypeError, AttributeError),
    *(IndexError, OverflowError, MemoryError, AssertionError),
)
"""What zipfile and torch.load raise for damaged files."""
_LOADED = "torch.save of tensors, or of dicts and lists of them"


def read_torch(file: Path, said: Said) -> list[Stored]:
    """Read the directions of a file; needs PyTorch.

    Raises:
        BadDirectionFile: it is damaged, holds code, is of another layout, or means something else than an addition; or
            the caller must say what it does not.
    """
    content = _loaded(file)
    if isinstance(content, Mapping):
        return _of_dict(file, content, said)
    array = _array(file, content)
    if (persona := _PERSONA.fullmatch(file.stem)) is not None:
        return of_array(file, array, said, "persona_vectors", "hidden_states", persona[1])
    if is_one_vector(array):
        # What the file beside it says holds, also where the caller names a layer.
        if (beside := file.with_name(f"{file.stem}_metadata.json")).is_file():
            layer = number_of(beside, member(beside, read_json_object(beside), "layer"), "layer")
            return of_array(file, array, said._replace(layer=layer), "refusal_direction", "hidden_states")
        if (beside := file.with_suffix(".json")).is_file() and (said.layer is None or _is_rotalabs(beside)):
            return [read_rotalabs(file, said)]
    return of_array(file, array, said, "torch")


def _is_rotalabs(beside: Path) -> bool:
    try:
        return read_json_object(beside).keys() >= {"layer_index", "behavior"}
    except BadDirectionFile:  # notes of the user's own
        return False


def read_rotalabs(file: Path, said: Said) -> Stored:
    """Read one vector of rotalabs-steer: a tensor beside a JSON file of the same stem.

    Raises:
        BadDirectionFile: one of them is damaged.
    """
    beside = file.with_suffix(".json")
    about = read_json_object(beside)
    layer = number_of(beside, member(beside, about, "layer_index"), "layer_index")
    name, method = str(member(beside, about, "behavior")), about.get("extraction_method")
    (found,) = of_array(
        file, _array(file, _loaded(file)), said._replace(layer=layer), "rotalabs-steer", "block_output", name,
        method=method,
    )  # fmt: skip
    return found


def write_torch(file: Path, directions: Sequence[Direction]) -> None:
    """Write directions as lm-eval's ``steered`` model reads them: one a layer, to be added with coefficient 1.

    Raises:
        BadDirectionFile: two directions have the same layer, or PyTorch is not installed.
    """
    torch = _torch(file)
    layers = [one.layer for one in directions]
    if len(set(layers)) < len(layers):
        raise BadDirectionFile(
            "a .pt file for lm-eval holds one direction a layer, got several; allowed: one name. Write a file for each."
        )
    content = {
        f"layers.{one.layer}": {
            "steering_vector": torch.from_numpy(one.vector.copy()),
            "steering_coefficient": 1.0,
            "action": "add",
            "bias": None,
            "head_index": None,
        }
        for one in directions
    }
    torch.save(content, file)


def _torch(file: Path) -> Any:
    try:
        import torch
    except ModuleNotFoundError:
        raise BadDirectionFile(f"{file} is a PyTorch file and PyTorch is not installed; install torch.") from None
    return torch


def _loaded(file: Path) -> Any:
    torch = _torch(file)
    try:
        with zipfile.ZipFile(file) as archive:
            # What PyTorch writes is not compressed, so no file takes more memory than its size.
            if any(one.compress_type != zipfile.ZIP_STORED for one in archive.infolist()):
                raise ValueError("compressed members")
            if sum(one.file_size for one in archive.infolist()) > file.stat().st_size:
                raise ValueError("members that are larger than the file")
        return torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError:
        raise BadDirectionFile(
            f"{file} holds objects of other classes than PyTorch's tensors, which only running code from it would "
            f"restore; allowed: {_LOADED}. Load it with the package that wrote it, and save the vectors by torch.save "
            "of a dict from layer to tensor, or with save_directions."
        ) from None
    except _UNREADABLE as error:
        raise BadDirectionFile(
            f"{file} is not a readable PyTorch file ({one_line(error)}); allowed: {_LOADED}, by PyTorch 1.6 or later. "
            "Copy it again, or save it again."
        ) from None


def _array(file: Path, value: object) -> npt.NDArray[Any]:
    import torch

    if not isinstance(value, torch.Tensor):
        raise BadDirectionFile(
            f"{file} holds a {type(value).__name__}; allowed: a tensor, or a dict of tensors. Save one of these."
        )
    return _numpy(file, value)


def _numpy(file: Path, tensor: torch.Tensor) -> npt.NDArray[Any]:
    import torch

    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_complex() or tensor.device.type == "meta":
        raise BadDirectionFile(
            f"{file} holds a tensor of {tensor.dtype}, {tensor.layout} on {tensor.device}; allowed: dense tensors of "
            "real numbers. Convert it to float32."
        )
    if tensor.numel() * tensor.element_size() > file.stat().st_size:  # an expanded tensor repeats its storage
        raise BadDirectionFile(
            f"{file} holds a tensor of shape {str(tuple(tensor.shape))[:MOST_QUOTED]}, larger than the file; allowed: "
            "tensors that are stored in full. Save tensor.contiguous()."
        )
    tensor = tensor.detach().cpu()
    return np.asarray((tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy())


def _of_dict(file: Path, content: Mapping[Any, Any], said: Said) -> list[Stored]:
    if content and all(isinstance(one, Mapping) and "steering_vector" in one for one in content.values()):
        return [_of_lm_eval(file, str(key), one, said) for key, one in content.items()]
    if isinstance(vectors := content.get("vectors"), Mapping):
        return _by_layer(file, vectors, said, "wisent", "hidden_states", method=content.get("method"))
    if content and layers_of_keys(file, content) is not None:
        return _by_layer(file, content, said, "torch", None)
    return _by_name(file, content, said)


def _by_name(file: Path, content: Mapping[Any, Any], said: Said) -> list[Stored]:
    """A dict from name to one vector, or to a stack of layers."""
    arrays = {str(key): _array(file, value) for key, value in content.items()}
    if len(arrays) > 1 and said.name is not None:
        raise BadDirectionFile(
            f"{file} holds the names {quoted(list(arrays))}, got one name for them; allowed: another name for a file "
            "with one. Leave it out."
        )
    if said.layer is None and (without := [key for key, array in arrays.items() if is_one_vector(array)]):
        raise BadDirectionFile(
            f"{file} holds one vector each under {quoted(without)}, and no key names a layer; allowed: keys such as "
            "12, layer_12 or model.layers.12, or names whose layer is given. Give it, if all belong to one layer: "
            "load_directions(path, layer=...), or vllm-steer convert --layer LAYER."
        )
    return [one for key, array in arrays.items() for one in of_array(file, array, said, "torch", name=key)]


def _by_layer(
    file: Path, vectors: Mapping[Any, Any], said: Said, writer: str, known: LayerIndex | None, **more: Any
) -> list[Stored]:
    layers = layers_of_keys(file, vectors)
    if layers is None:
        raise BadDirectionFile(
            f"{file} has vectors under {quoted([str(key) for key in vectors])}; allowed: layers, such as 12. Export "
            "it again."
        )
    counts, name = how_counted(file, said, known, "vectors by layer"), said.name or file.stem
    return [
        stored(file, name, layer, one_vector(file, _array(file, value), f"under {key!r}"), counts, writer, **more)
        for layer, (key, value) in zip(layers, vectors.items(), strict=True)
    ]


def _of_lm_eval(file: Path, hook_point: str, one: Mapping[str, Any], said: Said) -> Stored:
    match = HOOK_POINT.fullmatch(hook_point)
    head = one.get("head_index")
    if match is None or head is not None:
        of_head = "" if head is None else f", head {head!s:.{MOST_QUOTED}}"
        raise BadDirectionFile(
            f"{file} steers at {hook_point!r:.{MOST_QUOTED}}{of_head}; allowed: the output of a whole block, such as "
            "layers.12. A vector of another site is no direction of the residual stream."
        )
    if (action := one.get("action", "add")) != "add":
        do = (
            "It sets the projection: make a unit Direction of the vector, and steer with op='set' and the coefficient "
            "as alpha."
            if action == "clamp"
            else "Correct the action."
        )
        raise BadDirectionFile(
            f"{file} has the action {action!r:.{MOST_QUOTED}} at {hook_point!r:.{MOST_QUOTED}}; allowed: add. {do}"
        )
    vector = one_vector(file, _array(file, one["steering_vector"]), f"at {hook_point!r}")
    coefficient = one.get("steering_coefficient")
    return stored(
        file, said.name or file.stem, int(match[1]), vector, "block_output", "lm-eval",
        coefficient=coefficient if isinstance(coefficient, int | float) else None,
    )  # fmt: skip
