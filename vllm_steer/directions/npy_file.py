"""Reader of NumPy's ``.npy`` files. It stays within the bounds of the file and runs no code from it."""

from __future__ import annotations

import tokenize
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_steer.directions.direction import Direction
from vllm_steer.directions.quoting import MOST_QUOTED, one_line
from vllm_steer.errors import BadDirectionFile

_NUMPY_ERRORS = (
    *(ValueError, OSError, EOFError, TypeError, OverflowError),
    # Raised by NumPy's header parser for text that is not a Python literal, or is nested too deeply.
    *(SyntaxError, tokenize.TokenError, MemoryError, RecursionError),
)
_DO = "Save it as numpy.save(path, numpy.asarray(vector, 'float32'))."


def write_npy(file: Path, directions: Sequence[Direction]) -> None:
    """Write one direction's vector as float32; the file keeps neither its name nor its layer.

    Raises:
        BadDirectionFile: there are several directions.
    """
    if len(directions) > 1:
        raise BadDirectionFile(
            f"a .npy file holds one vector, got {len(directions)} directions; allowed: one. Write a .safetensors file."
        )
    with file.open("wb") as opened:
        np.save(opened, directions[0].vector)


def read_npy(file: Path) -> npt.NDArray[Any]:
    """Memory-map the array of a file, of any shape and any real dtype.

    Raises:
        BadDirectionFile: the file is not a readable ``.npy`` file, or not an array of real numbers.
    """
    try:
        with file.open("rb") as opened:
            start = opened.read(12)
        # From version 2 on, a header can claim a length of 4 GiB, which NumPy allocates before it reads the header.
        if start[6:7] > b"\x01" and int.from_bytes(start[8:], "little") > file.stat().st_size:
            raise ValueError("its header is longer than the file")
        # Not load, which accepts zip archives (.npz) and allocates whatever size a header claims.
        with np.errstate(over="ignore"):  # a claimed size may overflow; NumPy then refuses it
            array = np.lib.format.open_memmap(file, mode="r")  # type: ignore[no-untyped-call]  # not annotated
    except _NUMPY_ERRORS as error:
        raise BadDirectionFile(
            f"{file} is not a readable .npy array ({one_line(error)}); allowed: one array of real numbers. {_DO}"
        ) from None
    dtype = array.dtype
    if dtype.kind == "V" and dtype.names is None and dtype.itemsize == 2:
        raise BadDirectionFile(
            f"{file} holds 2-byte items without a type ({dtype}). NumPy saves bfloat16 arrays this way, but the file "
            f"does not say that they are bfloat16; allowed: an array of real numbers. {_DO}"
        )
    if dtype.kind not in "fiu":
        raise BadDirectionFile(f"{file} holds {dtype!s:.{MOST_QUOTED}}; allowed: an array of real numbers. {_DO}")
    return np.asarray(array)
