"""Conversion of bfloat16, which NumPy lacks: it is the upper half of a float32."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def float32_of_bfloat16(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Convert the bits of bfloat16 numbers to float32, exactly and in the same shape."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)
