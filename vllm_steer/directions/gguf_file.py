"""Reader of vectors in GGUF files. It checks every count and length against the size of the file.

The reader of the ``gguf`` package trusts the counts in a file, so 40 bytes can keep it busy for hours.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, either byte order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from vllm_steer.directions.bfloat16 import float32_of_bfloat16

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_MOST_DIMENSIONS = 4  # of a tensor in ggml
_STRING, _ARRAY, _UINT32 = 8, 9, 4
_BYTES_OF = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # value type -> bytes of a value
_BFLOAT16 = 30
_FLOATS = {0: "f4", 1: "f2", 28: "f8", _BFLOAT16: "u2"}  # tensor type -> NumPy dtype; bfloat16 as its bits


class TensorTypeError(ValueError):
    """The tensor is undamaged, but its type is not supported, for example because it is quantised."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor as the file describes it.

    Attributes:
        type: number of the ggml type; 0 is F32, 1 F16, 28 F64 and 30 BF16.
        shape: in NumPy's order, the fastest dimension last.
    """

    name: str
    type: int
    shape: tuple[int, ...]
    _start: int


class GgufFile:
    """The string metadata and the tensors of a GGUF file.

    Attributes:
        texts: metadata key -> string; other metadata is skipped.
        tensors: all tensors, in the order of the file.

    Raises:
        ValueError: the file is not a valid GGUF file, ends too early, or has a name twice.
        OSError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._data = np.memmap(path, np.uint8, "r")
        self._at = 0
        self._order: Literal["little", "big"] = "little"
        if bytes(self._take(4)) != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self._number(4)
        if version & 0xFFFF == 0:  # a small number in the other byte order
            self._order, version = "big", int.from_bytes(version.to_bytes(4, "little"), "big")
        if version not in _VERSIONS:
            raise ValueError(f"its version is {version}; allowed: 2 and 3")
        num_tensors, num_fields = self._number(8), self._number(8)
        self.texts: dict[str, str] = {}
        alignment = 32
        seen: set[str] = set()
        for _ in range(num_fields):
            key = _new(self._text(), seen)
            kind = self._number(4)
            if kind == _STRING:
                self.texts[key] = self._text()
            elif key == "general.alignment" and kind == _UINT32:
                alignment = self._number(4)
            else:
                self._skip(kind)
        seen = set()
        self.tensors = [self._tensor(seen) for _ in range(num_tensors)]
        if alignment == 0 or alignment & (alignment - 1):
            raise ValueError(f"its alignment is {alignment}; allowed: a power of two")
        self._data_start = -(-self._at // alignment) * alignment

    def values(self, tensor: GgufTensor) -> npt.NDArray[np.floating]:
        """Read an F64, F32, F16 or BF16 tensor; BF16 is converted to float32.

        Raises:
            TensorTypeError: the tensor has another type.
            ValueError: the data lies beyond the end of the file.
        """
        if tensor.type not in _FLOATS:
            raise TensorTypeError(
                f"{tensor.name} is stored as {_type_name(tensor.type)}; allowed: F64, F32, F16 and BF16, unquantised"
            )
        dtype = np.dtype(_FLOATS[tensor.type]).newbyteorder("<" if self._order == "little" else ">")
        self._at = self._data_start + tensor._start
        values = self._take(math.prod(tensor.shape) * dtype.itemsize).view(dtype)
        if tensor.type == _BFLOAT16:
            values = float32_of_bfloat16(values)
        return values.reshape(tensor.shape)

    def _take(self, count: int) -> npt.NDArray[np.uint8]:
        if count > self._data.size - self._at:
            raise ValueError(f"it has {self._data.size} bytes and needs at least {self._at + count}")
        self._at += count
        return self._data[self._at - count : self._at]

    def _number(self, size: int) -> int:
        return int.from_bytes(self._take(size).tobytes(), self._order)

    def _text(self) -> str:
        return self._take(self._number(8)).tobytes().decode()

    def _skip(self, kind: int) -> None:
        """Skip a value, or all values of an array."""
        count = 1
        if kind == _ARRAY:
            kind, count = self._number(4), self._number(8)
        if kind in _BYTES_OF:
            self._take(_BYTES_OF[kind] * count)
        elif kind == _STRING:
            for _ in range(count):  # each has at least eight bytes, so a false count soon reaches the file's end
                self._take(self._number(8))
        else:
            raise ValueError(f"it has a value of type {kind}; allowed: numbers, texts and arrays of these")

    def _tensor(self, seen: set[str]) -> GgufTensor:
        name = _new(self._text(), seen)
        dimensions = self._number(4)
        if dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"it has a tensor of {dimensions} dimensions; allowed: up to {_MOST_DIMENSIONS}")
        shape = tuple(reversed([self._number(8) for _ in range(dimensions)]))
        return GgufTensor(name, type=self._number(4), shape=shape, _start=self._number(8))


def _type_name(number: int) -> str:
    from gguf import GGMLQuantizationType

    known = {one.value: one.name for one in GGMLQuantizationType}
    return known.get(number, f"type {number}")


def _new(name: str, seen: set[str]) -> str:
    if name in seen:
        raise ValueError(f"it has {name!r} twice")
    seen.add(name)
    return name
