"""Vectors in NumPy's ``.npy`` files, read within the bounds of the file and without running code of it."""

from __future__ import annotations

import tokenize
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_steer.directions.quoting import MOST_QUOTED, one_line
from vllm_steer.errors import BadDirectionFile

_NUMPY_ERRORS = (
    *(ValueError, OSError, EOFError, TypeError, OverflowError),
    # What NumPy's parser of the header gives for text that is no Python literal, or nested too deeply.
    *(SyntaxError, tokenize.TokenError, MemoryError, RecursionError),
)
_DO = "Save it as numpy.save(path, numpy.asarray(vector, 'float32'))."


def read_npy(file: Path) -> npt.NDArray[Any]:
    """The array of a file, of any shape and any real dtype, mapped from the disk.

    Raises:
        BadDirectionFile: not a readable ``.npy`` file, or no array of real numbers.
    """
    try:
        with file.open("rb") as opened:
            start = opened.read(12)
        # From version 2 on, NumPy reserves the 4 GiB that a header's length can claim before it reads the header.
        if start[6:7] > b"\x01" and int.from_bytes(start[8:], "little") > file.stat().st_size:
            raise ValueError("its header is longer than the file")
        # open_memmap and not load: load would take a zip archive for an .npz, and a header for the space it claims.
        with np.errstate(over="ignore"):  # of a size that no file has, which NumPy then refuses
            array = np.lib.format.open_memmap(file, mode="r")  # type: ignore[no-untyped-call]  # not annotated
    except _NUMPY_ERRORS as error:
        raise BadDirectionFile(
            f"{file} is not a readable .npy array ({one_line(error)}); allowed: one array of real numbers. {_DO}"
        ) from None
    dtype = array.dtype
    if dtype.kind == "V" and dtype.names is None and dtype.itemsize == 2:
        raise BadDirectionFile(
            f"{file} holds 2-byte items of no type ({dtype}), as bfloat16 arrays are saved: nothing in the file says "
            f"that they are bfloat16; allowed: an array of real numbers. {_DO}"
        )
    if dtype.kind not in "fiu":
        raise BadDirectionFile(f"{file} holds {dtype!s:.{MOST_QUOTED}}; allowed: an array of real numbers. {_DO}")
    return np.asarray(array)
