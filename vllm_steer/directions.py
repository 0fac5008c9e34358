"""Named directions, and the files they live in: safetensors, NumPy ``.npy`` and GGUF control vectors."""

from __future__ import annotations

import json
import os
import re
import tempfile
import tokenize
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vllm_steer.errors import BadDirectionFile, BadVector, MalformedSpec
from vllm_steer.gguf_file import GgufFile

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/+-]{0,127}")
_LAYER = r"(0|[1-9][0-9]{0,5})"  # one spelling a number, so that no two keys of a file can mean the same
_METADATA_KEY = "vllm_steer"
_FORMAT = 1
_MOST_QUOTED = 200  # characters of a file's content in a message
_NPY_ERRORS = (
    *(ValueError, OSError, EOFError, TypeError, OverflowError),
    # What NumPy's parser of the header gives for text that is no Python literal, or nested too deeply.
    *(SyntaxError, tokenize.TokenError, MemoryError, RecursionError),
)

# float16 files of unit vectors come back with norms off by up to 1e-3 (half an ulp, summed over some thousand
# elements); anything beyond ten times that was not meant to be a unit vector.
UNIT_TOLERANCE = 1e-2


@dataclass(frozen=True, eq=False)
class Direction:
    """A named vector that belongs to one layer of one model.

    Args:
        name: letters, digits and ``. _ : / + -``, at most 128.
        layer: 0-based decoder block in whose output residual stream the vector lives.
        vector: (D,), any real dtype; kept as read-only float32. It is never rescaled: α multiplies it as it is.
            ``ablate`` and ``set`` need a unit vector; ``normalised()`` makes one.

    Raises:
        BadVector: not one-dimensional, not finite, or zero.
        MalformedSpec: a bad name or layer.
    """

    name: str
    layer: int
    vector: npt.NDArray[np.float32]

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise MalformedSpec(
                f"direction name is {self.name!r:.{_MOST_QUOTED}}; allowed: 1 to 128 letters, digits and . _ : / + -, "
                "the first a letter or digit. Rename it."
            )
        if isinstance(self.layer, bool) or not isinstance(self.layer, int | np.integer) or self.layer < 0:
            raise MalformedSpec(f"direction {self.name!r} has layer {self.layer!r}; allowed: a whole number from 0.")
        object.__setattr__(self, "layer", int(self.layer))
        try:
            given = np.asarray(self.vector)
        except (TypeError, ValueError) as error:
            raise BadVector(
                f"direction {self.name!r} has a vector that NumPy cannot read ({error}); allowed: (D,) real numbers. "
                "Convert it to a float32 array."
            ) from None
        if given.dtype.kind not in "fiu":
            raise BadVector(
                f"direction {self.name!r} has a vector of {given.dtype}; allowed: real numbers. Convert it to float32."
            )
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite and is refused below
            vector = np.array(given, dtype=np.float32, order="C")  # a copy: the caller's array stays the caller's
        if vector.ndim != 1 or vector.size == 0:
            raise BadVector(
                f"direction {self.name!r} has a vector of shape {vector.shape}; allowed: (D,) with D the hidden size. "
                "Reshape it."
            )
        if not np.isfinite(vector).all():
            raise BadVector(
                f"direction {self.name!r} has {np.count_nonzero(~np.isfinite(vector))} values that are NaN or "
                "infinite; allowed: finite float32 values. Extract it again."
            )
        if not vector.any():
            raise BadVector(
                f"direction {self.name!r} is all zeros; allowed: a vector with a direction. Extract it again."
            )
        vector.setflags(write=False)
        object.__setattr__(self, "vector", vector)

    @property
    def key(self) -> str:
        """``name@layer``, unique in a file and in an engine."""
        return f"{self.name}@{self.layer}"

    @cached_property
    def norm(self) -> float:
        """Euclidean norm of the vector."""
        return float(np.linalg.norm(self.vector.astype(np.float64)))

    @property
    def is_unit(self) -> bool:
        """Whether the norm is 1 to within float16 rounding."""
        return abs(self.norm - 1.0) <= UNIT_TOLERANCE

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 (hex) of the vector's float32 little-endian bytes; neither name nor layer enters."""
        return sha256(self.vector.astype("<f4", copy=False).tobytes()).hexdigest()

    def normalised(self) -> Direction:
        """The same direction with norm 1."""
        return Direction(self.name, self.layer, (self.vector.astype(np.float64) / self.norm).astype(np.float32))


def load_directions(path: str | os.PathLike[str], name: str | None = None, layer: int | None = None) -> list[Direction]:
    """Read every direction of a file, ordered by layer and name.

    Args:
        path: ``.safetensors`` (tensor keys ``name@layer``), ``.npy`` (one vector) or ``.gguf`` (a control vector).
        name: needed for ``.npy``; for ``.gguf`` it replaces the stored name or the file's stem.
        layer: needed for ``.npy``, not used otherwise.

    Raises:
        BadDirectionFile: missing, truncated, of another format, or with no direction in it.
        BadVector: a vector that is not finite, not one-dimensional, or zero.
    """
    file = Path(path)
    if not os.path.isfile(file):  # Path.is_file would raise for a name that is too long
        raise BadDirectionFile(f"no direction file at {file}; give the path of a .safetensors, .npy or .gguf file.")
    if file.suffix == ".safetensors":
        found = _read_safetensors(file)
    elif file.suffix == ".npy":
        if name is None or layer is None:
            raise BadDirectionFile(
                f"{file} is a .npy file, which stores neither name nor layer; call load_directions(path, name=..., "
                "layer=...)."
            )
        found = [_stored(file, name, layer, _read_npy(file))]
    elif file.suffix == ".gguf":
        found = _read_gguf(file, name)
    else:
        raise BadDirectionFile(f"{file} ends in {file.suffix!r}; allowed: .safetensors, .npy, .gguf. Convert it.")
    if not found:
        raise BadDirectionFile(
            f"{file} holds no direction; expected tensors named name@layer (safetensors) or direction.N."
        )
    return sorted(found, key=lambda direction: (direction.layer, direction.name))


def save_directions(path: str | os.PathLike[str], directions: Sequence[Direction]) -> None:
    """Write directions to ``path`` (``.safetensors`` or ``.gguf``), atomically.

    A GGUF control vector holds one name, and llama.cpp keeps no vector for layer 0: both are refused there.

    Raises:
        BadDirectionFile: nothing to write, a key twice, another ending, or what the format cannot hold.
    """
    file = Path(path)
    if not directions:
        raise BadDirectionFile(f"no directions to write to {file}; give at least one.")
    keys = [direction.key for direction in directions]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise BadDirectionFile(f"{twice[0]!r} comes twice; allowed: each name once a layer. Rename one of them.")
    writers = {".safetensors": _write_safetensors, ".gguf": _write_gguf}
    if file.suffix not in writers:
        raise BadDirectionFile(f"{file} ends in {file.suffix!r}; allowed: .safetensors, .gguf.")
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    os.close(descriptor)
    try:
        writers[file.suffix](Path(temporary), directions)
        Path(temporary).chmod(0o644)  # mkstemp makes private files, and a server may run as another user
        os.replace(temporary, file)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _read_npy(file: Path) -> npt.NDArray[np.float32]:
    try:
        with file.open("rb") as opened:
            start = opened.read(12)
        # From version 2 on, NumPy reserves the 4 GiB that a header's length can claim before it reads the header.
        if start[6:7] > b"\x01" and int.from_bytes(start[8:], "little") > file.stat().st_size:
            raise ValueError("its header is longer than the file")
        # open_memmap and not load: load would take a zip archive for an .npz, and a header for the space it claims.
        with np.errstate(over="ignore"):  # of a size that no file has, which NumPy then refuses
            vector = np.lib.format.open_memmap(file, mode="r")  # type: ignore[no-untyped-call]  # not annotated
    except _NPY_ERRORS as error:
        raise BadDirectionFile(
            f"{file} is not a readable .npy array ({_said(error)}); save it with numpy.save."
        ) from None
    if vector.dtype.kind not in "fiu":
        raise BadDirectionFile(f"{file} holds {vector.dtype}; allowed: an array of real numbers. Convert it.")
    return np.asarray(vector)


def _said(error: Exception) -> str:
    """What a library says of a file, in one line; it may quote all of the file."""
    return " ".join(str(error).split())[:_MOST_QUOTED]


def _stored(file: Path, name: str, layer: int, vector: npt.NDArray[np.floating]) -> Direction:
    try:
        return Direction(name, layer, vector)
    except BadVector as error:
        raise BadVector(f"{file}: {error}") from None
    except MalformedSpec as error:
        raise BadDirectionFile(f"{file}: {error}") from None


def _read_safetensors(file: Path) -> list[Direction]:
    from safetensors import SafetensorError, safe_open

    found = []
    try:
        with safe_open(str(file), framework="numpy") as tensors:
            written = _written_hashes(file, tensors.metadata() or {})
            for key in tensors.keys():  # noqa: SIM118  (safe_open is no mapping)
                name, _, layer = key.rpartition("@")
                if re.fullmatch(_LAYER, layer) is None:
                    raise BadDirectionFile(
                        f"{file} has a tensor named {key!r:.{_MOST_QUOTED}}; allowed: name@layer, layer a whole "
                        "number. Rename it."
                    )
                found.append(_stored(file, name, int(layer), tensors.get_tensor(key)))
                if written.get(key, found[-1].content_hash) != found[-1].content_hash:
                    raise BadDirectionFile(
                        f"{file} holds other values for {key!r} than were written (its SHA-256 differs). Copy it again."
                    )
    except (SafetensorError, TypeError, AttributeError, OSError) as error:
        # The NumPy framework gives TypeError or AttributeError for dtypes that NumPy lacks (bfloat16, float8).
        raise BadDirectionFile(
            f"{file} is not a readable safetensors file of float16 or float32 vectors ({_said(error)}); write it with "
            "save_directions."
        ) from None
    return found


def _written_hashes(file: Path, metadata: Mapping[str, str]) -> dict[str, str]:
    """Key -> SHA-256 as `save_directions` noted it; empty for files that something else wrote."""
    try:
        noted = json.loads(metadata.get(_METADATA_KEY, "{}")).get("directions", {})
        return {key: about["sha256"] for key, about in noted.items()}
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise BadDirectionFile(
            f"{file} has unreadable metadata ({_said(error)}); write it again with save_directions."
        ) from None


def _write_safetensors(file: Path, directions: Sequence[Direction]) -> None:
    from safetensors.numpy import save_file

    about = {direction.key: {"sha256": direction.content_hash, "norm": direction.norm} for direction in directions}
    save_file(
        {direction.key: np.ascontiguousarray(direction.vector) for direction in directions},
        str(file),
        metadata={_METADATA_KEY: json.dumps({"format": _FORMAT, "directions": about}, sort_keys=True)},
    )


def _read_gguf(file: Path, name: str | None) -> list[Direction]:
    """llama.cpp / repeng layout: tensors ``direction.N``, N the 0-based block whose output the vector is added to."""
    try:
        stored = GgufFile(file)
        vectors = {
            int(match.group(1)): stored.values(tensor)
            for tensor in stored.tensors
            if (match := re.fullmatch(rf"direction\.{_LAYER}", tensor.name)) is not None
        }
    except (ValueError, OSError) as error:
        raise BadDirectionFile(f"{file} is not a readable GGUF file ({_said(error)}); export it again.") from None
    if name is None:
        name = stored.texts.get(f"{_METADATA_KEY}.name", file.stem)
    return [_stored(file, name, layer, vector) for layer, vector in vectors.items()]


def _write_gguf(file: Path, directions: Sequence[Direction]) -> None:
    from gguf import GGUFWriter

    names = sorted({direction.name for direction in directions})
    if len(names) > 1:
        raise BadDirectionFile(f"a GGUF control vector holds one name, got {names}; write one file a name.")
    if any(direction.layer == 0 for direction in directions):
        raise BadDirectionFile(
            "a GGUF control vector cannot hold layer 0 (llama.cpp starts at 1); use .safetensors for it."
        )
    writer = GGUFWriter(str(file), "controlvector")
    writer.add_string("controlvector.model_hint", "unknown")
    writer.add_uint32("controlvector.layer_count", len(directions))
    writer.add_string(f"{_METADATA_KEY}.name", names[0])
    for direction in sorted(directions, key=lambda direction: direction.layer):
        writer.add_tensor(f"direction.{direction.layer}", np.ascontiguousarray(direction.vector))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
