"""bfloat16, which NumPy lacks: the upper half of a float32."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def float32_of_bfloat16(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """The numbers whose bfloat16 bits are given, exactly: float32, of the same shape."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)
