"""Methods that make a unit direction from the readouts of contrastive texts, and the norm that scales α.

Shape suffixes: N texts, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from batch_jobs.config.study import DirectionMethod, Study, StudyError
from batch_jobs.directions.readout_file import PairReadouts, StudyReadouts
from vllm_steer import Direction, make_direction
from vllm_steer.errors import BadVector

Vector = npt.NDArray[np.float32]


def mean_difference(train: PairReadouts) -> Vector:
    """`vllm_steer.make_direction` by that name, from the negative to the positive side; (D,) float32.

    Raises:
        StudyError: a wrong shape, an empty side, a value that is not finite, or equal class means.
    """
    return _made(train, "mean_difference")


def logistic_regression(train: PairReadouts) -> Vector:
    """Unit direction (D,) float32 normal to the decision boundary of a regularised logistic regression.

    The fit uses standardised coordinates: residual streams have a few coordinates of huge variance, which would
    otherwise dominate. The weights are then divided by the same standard deviations, which takes the direction back to
    residual-stream coordinates. L2 penalty, C = 1: with more coordinates than texts the classes are always separable,
    and only the penalty makes the solution unique. Deterministic. The sides may differ in N.

    Raises:
        StudyError: as for `mean_difference`.
    """
    mean_difference(train)  # checks both sides
    positive, negative = (np.asarray(side, dtype=np.float64) for side in (train.positive_ND, train.negative_ND))
    labels = np.repeat([1, 0], [len(positive), len(negative)])
    scaler = StandardScaler()
    standardised = scaler.fit_transform(np.concatenate([positive, negative]))
    weights_D = LogisticRegression(C=1.0, max_iter=1000).fit(standardised, labels).coef_[0] / scaler.scale_
    unit: Vector = (weights_D / np.linalg.norm(weights_D)).astype(np.float32)
    return unit


def pca(train: PairReadouts) -> Vector:
    """`vllm_steer.make_direction` by that name, towards the positive side; (D,) float32.

    Raises:
        StudyError: the sides differ in N, or as for `mean_difference`.
    """
    return _made(train, "pca")


METHODS: Mapping[DirectionMethod, Callable[[PairReadouts], Vector]] = MappingProxyType(
    {"mean_difference": mean_difference, "logistic_regression": logistic_regression, "pca": pca}
)


def make_directions(study: Study, readouts: StudyReadouts) -> dict[tuple[DirectionMethod, int], Direction]:
    """Make every method's direction for every layer of `study.extract`, named by `study.direction_name`.

    Uses the train texts under the study's pooling, at the block that `extract_offset` pairs with the layer.
    Deterministic.

    Returns:
        (method, layer) -> direction.

    Raises:
        StudyError: the readouts give no direction.
        ReadoutFileError: the readouts lack a block.
    """
    directions = {}
    for layer in study.extract.layers:
        train = readouts.train(study.skip_first, study.extract.readout_layer(layer))
        for method, make in METHODS.items():
            directions[method, layer] = Direction(study.direction_name(method), layer, make(train))
    return directions


def mean_residual_norm(train: PairReadouts) -> float:
    """Mean L2 norm of the train texts' readouts, the unit of α where a study sets `residual_norm`.

    `train`: (N, D) per side, at the output of the steered layer. Each readout is a *mean* over tokens, with
    `skip_first` applied, so the result is smaller than the mean norm of single tokens.

    Raises:
        StudyError: the norm is not a positive finite number.
    """
    readouts_ND = np.concatenate([train.positive_ND, train.negative_ND]).astype(np.float64)
    norm = float(np.linalg.norm(readouts_ND, axis=1).mean())
    if not np.isfinite(norm) or norm <= 0.0:
        raise StudyError(f"The mean residual norm came out as {norm}; it must be positive, so check the readouts.")
    return norm


def _made(train: PairReadouts, method: Literal["mean_difference", "pca"]) -> Vector:
    try:
        return make_direction("made", 0, train.positive_ND, train.negative_ND, method).vector
    except BadVector as error:
        raise StudyError(f"The readouts give no direction: {error}") from None
