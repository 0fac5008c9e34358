"""Reads and writes direction files. The suffix of the path selects the format."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from vllm_steer.directions.brainpatch_file import read_brainpatch
from vllm_steer.directions.control_vector import read_control_vector, write_control_vector
from vllm_steer.directions.direction import Direction
from vllm_steer.directions.first_bytes import looks_like
from vllm_steer.directions.folders import own_files, read_folder
from vllm_steer.directions.hub import PREFIX, WEB, fetched, hub_address
from vllm_steer.directions.npy_file import read_npy, write_npy
from vllm_steer.directions.quoting import MOST_QUOTED
from vllm_steer.directions.repsteer_folder import SUFFIX as FOLDER
from vllm_steer.directions.repsteer_folder import write_repsteer
from vllm_steer.directions.safetensors_file import own_keys, read_safetensors, read_some, write_safetensors
from vllm_steer.directions.said import LAYER_INDICES, LayerIndex, Said, of_array
from vllm_steer.directions.steered_csv import read_steered_csv
from vllm_steer.directions.svec_file import read_svec
from vllm_steer.directions.torch_file import read_torch, write_torch
from vllm_steer.directions.unchecked import Stored
from vllm_steer.errors import BadDirectionFile, BadVector, MalformedSpec

_WRITERS = {
    ".safetensors": write_safetensors,
    ".gguf": write_control_vector,
    ".npy": write_npy,
    ".pt": write_torch,
}


def load_directions(
    path: str | os.PathLike[str],
    name: str | None = None,
    layer: int | None = None,
    *,
    layer_index: LayerIndex | None = None,
    feature: int | None = None,
) -> list[Direction]:
    """Read every direction of a file or folder, ordered by layer and name.

    The metadata of a direction from another package has its ``writer``, the ``layer_index`` that was taken, and what
    else the file says, such as a method or a coefficient. Vectors are taken as they are, without the coefficient.

    Args:
        path: a ``.safetensors``, ``.gguf``, ``.npy``, ``.pt``, ``.svec``, ``.brainpatch`` or ``.csv`` file; a folder of
            ``.safetensors`` files that ``save_directions`` wrote; a folder of rotalabs-steer, repsteer, sae-lens,
            persona-vectors or concept-probes; or ``hf://owner/repository/path``.
        name: replaces the name, which is otherwise the stored one or the file's stem.
        layer: reads this layer only, counted as the file does. Required where one vector comes without a layer.
        layer_index: how the file counts layers: ``block_output`` if index L is the output of block L, ``hidden_states``
            if index 0 is the embeddings and L the output of block L − 1. Required where the format does not say it;
            refused where the format says the other.
        feature: number of the feature of a sparse autoencoder; of a ``.csv`` file, the one feature to read. Refused for
            files without features.

    Raises:
        BadDirectionFile: the file is missing, truncated, of another format or dtype, holds no direction, or means
            something else than an addition to the output of a block; or an argument that it needs is missing, or
            contradicts it.
        BadVector: a vector is not finite, not one-dimensional, or zero.
        MalformedSpec: an argument is of another type, or ``layer_index`` is another one.
    """
    said = _checked_arguments(name, layer, layer_index, feature)
    if WEB.match(str(path)):
        raise BadDirectionFile(
            f"{str(path)!r:.{MOST_QUOTED}} is a web address; allowed: a path, or {hub_address(str(path))} for a file "
            "on the Hugging Face Hub. Give that, or download the file."
        )
    file = fetched(str(path)) if str(path).startswith(PREFIX) else Path(path)
    if os.path.isdir(file):
        found = read_folder(file, said)
    elif not os.path.isfile(file):  # Path.is_file would raise for a name that is too long
        raise BadDirectionFile(
            f"no direction file at {file}; give the path of a file ({', '.join(_READERS)}) or of another package's "
            "folder."
        )
    else:
        _check_first_bytes(file)
        found = _READERS[file.suffix](file, said)
    found = _chosen(file, found, said)
    directions = [_checked(file, one) for one in found]
    return sorted(directions, key=lambda direction: (direction.layer, direction.name))


def load_some(path: Path, keys: Sequence[str]) -> list[Direction]:
    """Directions of a ``.safetensors`` file of this package, in the order of ``keys``, without reading the others.

    Args:
        path: the file.
        keys: ``Direction.key`` of each.

    Raises:
        BadDirectionFile, BadVector: as ``load_directions``; also if a key is not in the file.
    """
    return [_checked(path, one) for one in read_some(path, keys)]


def direction_keys(path: str | os.PathLike[str]) -> list[str]:
    """``Direction.key`` of every direction that ``load_directions(path)`` returns, in any order.

    Files of this package tell them without their vectors; files of other packages are read.

    Raises:
        BadDirectionFile, BadVector: as ``load_directions``; vectors that are not read are not checked.
    """
    file = Path(path)
    own = own_files(file) if file.is_dir() else [file] if file.suffix == ".safetensors" and file.is_file() else []
    keys = [own_keys(one) for one in own]
    if keys and all(keys):
        return [key for some in keys for key in some]
    return [one.key for one in load_directions(path)]


def _checked_arguments(
    name: str | None, layer: int | None, layer_index: LayerIndex | None, feature: int | None
) -> Said:
    """What the caller says.

    Raises:
        MalformedSpec: it is of another type.
    """
    if name is not None and not isinstance(name, str):
        raise MalformedSpec(f"name is {name!r:.{MOST_QUOTED}}; allowed: a string. Give one, or leave it out.")
    if layer_index is not None and layer_index not in LAYER_INDICES:
        raise MalformedSpec(
            f"layer_index is {layer_index!r:.{MOST_QUOTED}}; allowed: {', '.join(LAYER_INDICES)}. Give one of them."
        )
    for what, number in (("layer", layer), ("feature", feature)):
        is_whole = isinstance(number, int | np.integer) and not isinstance(number, bool)
        if number is not None and not (is_whole and number >= 0):
            raise MalformedSpec(
                f"{what} is {number!r:.{MOST_QUOTED}}; allowed: a whole number from 0. Give int(...) of it."
            )
    return Said(name, None if layer is None else int(layer), layer_index, None if feature is None else int(feature))


def _check_first_bytes(file: Path) -> None:
    """Refuse a file whose ending is none of those allowed, or not that of what its first bytes say.

    Raises:
        BadDirectionFile: it is such a file.
    """
    look = looks_like(file)
    own = ".pt" if file.suffix == ".pth" else file.suffix
    if file.suffix in _READERS and (look is None or look.ending == own):
        return
    if look is not None:
        raise BadDirectionFile(
            f"{file} ends in {file.suffix!r:.{MOST_QUOTED}} and looks like {look.what}, by its first bytes; allowed: "
            f"{', '.join(_READERS)}, each for its own format. {look.do}."
        )
    raise BadDirectionFile(
        f"{file} ends in {file.suffix!r:.{MOST_QUOTED}}; allowed: {', '.join(_READERS)}. Read it with the "
        "library that wrote it, make a Direction of each vector and write them with save_directions."
    )


def _chosen(file: Path, found: list[Stored], said: Said) -> list[Stored]:
    """The directions of the layer that the caller says, after a comparison of the file with what the caller says.

    Raises:
        BadDirectionFile: the file says otherwise, or holds nothing of it.
    """
    if said.layer_index is not None and (other := next((one for one in found if one.counts != said.layer_index), None)):
        raise BadDirectionFile(
            f"{file} counts layers by {other.counts}, which its format says, got layer_index={said.layer_index!r}; "
            f"allowed: {other.counts}. Leave layer_index out."
        )
    if said.feature is not None and any(one.metadata.get("feature") != said.feature for one in found):
        raise BadDirectionFile(
            f"{file} holds directions and no feature {said.feature} of an autoencoder; allowed: feature= for sae-lens "
            "folders and .csv files. Leave it out."
        )
    found = [one for one in found if said.layer in (None, one.layer if one.file_layer is None else one.file_layer)]
    if not found:
        what = "".join(
            f" of {what} {number}" for what, number in (("layer", said.layer), ("feature", said.feature))
            if number is not None
        )  # fmt: skip
        raise BadDirectionFile(
            f"{file} holds no direction{what}; allowed: at least one tensor, named name@layer (.safetensors) or "
            "direction.N (.gguf). Extract or export it again, or leave the choice out."
        )
    keys = Counter((one.name, one.layer) for one in found)
    if twice := next((key for key, times in keys.items() if times > 1), None):
        raise BadDirectionFile(
            f"{file} holds several vectors for {twice[0]!r:.{MOST_QUOTED}} at layer {twice[1]}; allowed: one. Leave "
            "the others out, or save them under other names."
        )
    return found


def _read_safetensors(file: Path, said: Said) -> list[Stored]:
    is_sae = file.name == "sae_weights.safetensors" and (file.parent / "cfg.json").is_file()
    return read_folder(file.parent, said) if is_sae else read_safetensors(file, said)


def _read_npy(file: Path, said: Said) -> list[Stored]:
    if (file.parent / "bias.json").is_file() and file.name == "weights.npy":
        return read_folder(file.parent, said)
    return of_array(file, read_npy(file), said, "numpy")


_READERS: dict[str, Callable[[Path, Said], list[Stored]]] = {
    ".safetensors": _read_safetensors,
    ".gguf": read_control_vector,
    ".npy": _read_npy,
    ".pt": read_torch,
    ".pth": read_torch,
    ".svec": read_svec,
    ".brainpatch": read_brainpatch,
    ".csv": read_steered_csv,
}


def save_directions(path: str | os.PathLike[str], directions: Sequence[Direction]) -> None:
    """Write directions to ``path``, atomically, as float32.

    ``.safetensors`` keeps everything. A ``.gguf`` control vector holds one name, and no layer 0, because llama.cpp
    starts at layer 1. ``.npy`` holds one vector, without name and layer. ``.pt`` is what lm-eval's ``steered`` model
    reads, one direction a layer, without names; it needs PyTorch. ``.repsteer`` is a folder, an artifact of repsteer,
    which keeps everything of one direction. All but the first and the last lose the directions' metadata.

    Raises:
        BadDirectionFile: there are no directions, two have the same name and layer, the suffix is another one, or the
            format cannot hold the directions.
    """
    file = Path(path)
    if file.suffix not in (*_WRITERS, FOLDER):
        raise BadDirectionFile(
            f"{file} ends in {file.suffix!r:.{MOST_QUOTED}}; allowed: {', '.join((*_WRITERS, FOLDER))}. Choose one of "
            "these endings."
        )
    if not directions:
        raise BadDirectionFile(f"no directions to write to {file}; allowed: at least one. Give one.")
    keys = Counter(direction.key for direction in directions)
    twice = sorted(key for key, times in keys.items() if times > 1)
    if twice:
        raise BadDirectionFile(f"{twice[0]!r} comes twice; allowed: each name once a layer. Leave one of them out.")
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == FOLDER:
        write_repsteer(file, directions)
        return
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
