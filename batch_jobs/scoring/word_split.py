"""Splits many texts into words at once, exactly as `str.split` splits each."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

_ENCODED = [character.encode() for character in map(chr, range(128, 0x10000)) if character.isspace()]  # none is beyond
_WIDE_SPACES = {width: [int.from_bytes(space) for space in _ENCODED if len(space) == width] for width in (2, 3)}
"""Bytes in UTF-8 -> the white space that takes so many, each as the number of its bytes."""


def split_words(texts: pa.Array) -> tuple[pa.Array, npt.NDArray[np.int64]]:
    """Split at white space.

    Args:
        texts: N strings (`pa.string()`), no nulls.

    Returns:
        The words of all texts, one after the other, and (N,) int64, how many each text has.
    """
    if not len(texts):
        return pa.array([], pa.string()), np.zeros(0, dtype=np.int64)
    _, offset_buffer, data_buffer = texts.buffers()
    offsets = np.frombuffer(offset_buffer, dtype=np.int32)[texts.offset :][: len(texts) + 1].astype(np.int64)
    data = np.frombuffer(data_buffer or b"", dtype=np.uint8)[offsets[0] : offsets[-1]]
    offsets -= offsets[0]

    inside = ~_white(data)
    begins = inside.copy()
    begins[1:] &= ~inside[:-1]
    first = offsets[:-1][offsets[:-1] < offsets[1:]]
    begins[first] = inside[first]  # a text may end without white space
    per_text = np.diff(np.searchsorted(np.flatnonzero(begins), offsets))

    letters = np.compress(inside, data)
    ends = np.append(np.flatnonzero(np.compress(inside, begins)), len(letters)).astype(np.int32)
    words = pa.Array.from_buffers(
        pa.string(), len(ends) - 1, [None, pa.py_buffer(ends), pa.py_buffer(letters)], null_count=0
    )
    return words, per_text


def _white(data: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Which bytes of UTF-8 text belong to white space."""
    # of ASCII, white space is 9 to 13 and 28 to 32; other numbers wrap around to greater ones
    white: npt.NDArray[np.bool_] = (data - np.uint8(9) < 5) | (data - np.uint8(28) < 5)
    leads = np.flatnonzero(data >= 0xC2)  # first bytes of the characters beyond ASCII
    if len(leads):
        padded = np.append(data, np.zeros(2, dtype=np.uint8))
        for width, spaces in _WIDE_SPACES.items():
            codes = sum(padded[leads + place].astype(np.int32) << 8 * (width - 1 - place) for place in range(width))
            for place in range(width):
                white[leads[np.isin(codes, spaces)] + place] = True
    return white
