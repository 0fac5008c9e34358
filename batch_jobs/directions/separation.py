"""Separation of two classes of projections in standard deviations. Unlike an AUROC it has no ceiling.

Shape suffixes: N texts, K directions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]


def separation_in_stds(positive_NK: Floats, negative_NK: Floats) -> npt.NDArray[np.float64]:
    """Difference of the class means over the root mean square of both population standard deviations.

    Args:
        positive_NK: (N,) or (N, K) projections of the positive texts, N >= 1.
        negative_NK: the same for the negative texts; their N may differ.

    Returns:
        (K,) float64; a 0-d array for (N,) projections. ±inf where both classes have no spread, or 0 where they do not
        differ either.
    """
    apart_K = positive_NK.mean(axis=0) - negative_NK.mean(axis=0)
    spread_K = np.sqrt((positive_NK.var(axis=0) + negative_NK.var(axis=0)) / 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(apart_K == 0.0, 0.0, apart_K / spread_K).astype(np.float64)
