"""Makes a direction from readouts of two sides: texts with a concept, and texts without it.

Letters of shapes: N texts of a side, D hidden size.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from vllm_steer.directions.direction import Direction
from vllm_steer.errors import BadVector, MalformedSpec

Method = Literal["mean_difference", "pca"]
METHODS: tuple[str, ...] = get_args(Method)
_Floats64 = npt.NDArray[np.float64]


def make_direction(
    name: str,
    layer: int,
    positive_ND: npt.ArrayLike,
    negative_ND: npt.ArrayLike,
    method: Method = "mean_difference",
) -> Direction:
    """Make a unit direction that points from the negative to the positive side. Deterministic, in float64.

    ===================  ========================================================================================
    ``method``           the direction
    ===================  ========================================================================================
    ``mean_difference``  from the mean of the negative to the mean of the positive side (the paper's equation 1)
    ``pca``              along which the two sides of a pair differ most: the first right singular vector of the
                         (N, D) differences, towards the positive mean (the pair-centred variant of representation
                         engineering's PCA, Zou et al., 2023). Row i of both sides is a pair
    ===================  ========================================================================================

    Args:
        name, layer: see ``Direction``.
        positive_ND, negative_ND: (N, D) finite numbers, one row a text; the sides may differ in N with
            ``mean_difference``.
        method: see the table.

    Returns:
        The direction, float32. Its metadata has ``method``, ``num_positive``, ``num_negative`` and
        ``mean_residual_norm``, the mean length of all rows.

    Raises:
        BadVector: the rows are of another shape or not finite, a side is empty, the sides do not differ, or ``pca`` got
            sides of different N.
        MalformedSpec: the name, the layer or the method is not allowed.
    """
    if method not in METHODS:
        raise MalformedSpec(f"method is {method!r}; allowed: {', '.join(METHODS)}. Choose one of them.")
    positive_ND, negative_ND = (np.asarray(side, np.float64) for side in (positive_ND, negative_ND))
    _check(positive_ND, negative_ND)
    towards_D = positive_ND.mean(axis=0) - negative_ND.mean(axis=0)
    if not towards_D.any():
        raise BadVector(
            "both sides have the same mean readout, so there is no direction; allowed: sides that differ. Check the "
            "texts."
        )
    vector_D = towards_D
    if method == "pca":
        if len(positive_ND) != len(negative_ND):
            raise BadVector(
                f"pca got {len(positive_ND)} positive and {len(negative_ND)} negative readouts; allowed: pairs. Give "
                "as many of both."
            )
        first_D = np.linalg.svd(positive_ND - negative_ND, full_matrices=False)[2][0]
        vector_D = first_D if first_D @ towards_D >= 0 else -first_D
    rows_ND = np.concatenate([positive_ND, negative_ND])
    about = {
        "method": method,
        "num_positive": len(positive_ND),
        "num_negative": len(negative_ND),
        "mean_residual_norm": float(np.linalg.norm(rows_ND, axis=1).mean()),
    }
    return Direction(name, layer, (vector_D / np.linalg.norm(vector_D)).astype(np.float32), about)


def _check(positive_ND: _Floats64, negative_ND: _Floats64) -> None:
    if positive_ND.ndim != 2 or negative_ND.ndim != 2 or positive_ND.shape[1:] != negative_ND.shape[1:]:
        raise BadVector(
            f"got readouts of shapes {positive_ND.shape} and {negative_ND.shape}; allowed: (N, D) with the same D. "
            "Stack one row a text."
        )
    if not len(positive_ND) or not len(negative_ND):
        raise BadVector("one side has no readouts; allowed: at least one text on each side. Give some.")
    if not (np.isfinite(positive_ND).all() and np.isfinite(negative_ND).all()):
        raise BadVector(
            "the readouts hold NaN or infinity; allowed: finite numbers. Check the model's dtype (float16 overflows in "
            "some)."
        )
