"""Methods that make a unit direction from the readouts of contrastive texts, and the norm that scales α.

Shape suffixes: N texts, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from batch_jobs.config.study import DirectionMethod, Study, StudyError
from batch_jobs.directions.readout_file import PairReadouts, StudyReadouts
from vllm_steer import Direction

Vector = npt.NDArray[np.float32]
_Floats64 = npt.NDArray[np.float64]


def mean_difference(train: PairReadouts) -> Vector:
    """Unit direction (D,) float32 from the non-empathic to the empathic class mean (paper, equation 1).

    Computed in float64. The sides may differ in N.

    Raises:
        StudyError: a wrong shape, an empty side, a value that is not finite, or equal class means.
    """
    return _mean_difference(*_checked(train))


def logistic_regression(train: PairReadouts) -> Vector:
    """Unit direction (D,) float32 normal to the decision boundary of a regularised logistic regression.

    The fit uses standardised coordinates: residual streams have a few coordinates of huge variance, which would
    otherwise dominate. The weights are then divided by the same standard deviations, which takes the direction back to
    residual-stream coordinates. L2 penalty, C = 1: with more coordinates than texts the classes are always separable,
    and only the penalty makes the solution unique. Deterministic. The sides may differ in N.

    Raises:
        StudyError: as for `mean_difference`.
    """
    empathic, non_empathic = _checked(train)
    _mean_difference(empathic, non_empathic)
    labels = np.repeat([1, 0], [len(empathic), len(non_empathic)])
    scaler = StandardScaler()
    standardised = scaler.fit_transform(np.concatenate([empathic, non_empathic]))
    fit = LogisticRegression(C=1.0, max_iter=1000).fit(standardised, labels)
    return _unit(fit.coef_[0] / scaler.scale_)


def pca(train: PairReadouts) -> Vector:
    """Unit direction (D,) float32 along which the two sides of a pair differ most, over all pairs.

    First principal component of the readouts after subtracting each pair's midpoint from both its sides, which removes
    anything that varies between pairs, such as the scenario. Computed as the first right singular vector of the (N, D)
    differences. The sign is chosen so that the empathic class mean projects higher. Source: the pair-centred variant of
    representation engineering's PCA (Zou et al., 2023).

    Raises:
        StudyError: the sides differ in N, or as for `mean_difference`.
    """
    empathic, non_empathic = _checked(train)
    if len(empathic) != len(non_empathic):
        raise StudyError(
            f"Got {len(empathic)} empathic and {len(non_empathic)} non-empathic readouts; pca needs them in pairs."
        )
    towards_empathic = _mean_difference(empathic, non_empathic)
    first = np.linalg.svd(empathic - non_empathic, full_matrices=False)[2][0]
    return _unit(first if first @ towards_empathic >= 0 else -first)


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
    readouts_ND = np.concatenate([train.empathic_ND, train.non_empathic_ND]).astype(np.float64)
    norm = float(np.linalg.norm(readouts_ND, axis=1).mean())
    if not np.isfinite(norm) or norm <= 0.0:
        raise StudyError(f"The mean residual norm came out as {norm}; it must be positive, so check the readouts.")
    return norm


def _checked(train: PairReadouts) -> tuple[_Floats64, _Floats64]:
    empathic, non_empathic = (np.asarray(side, dtype=np.float64) for side in (train.empathic_ND, train.non_empathic_ND))
    if empathic.ndim != 2 or non_empathic.ndim != 2 or empathic.shape[1:] != non_empathic.shape[1:]:
        raise StudyError(
            f"Got readouts of shapes {empathic.shape} and {non_empathic.shape}; both must be (N, D) with the same D."
        )
    if not len(empathic) or not len(non_empathic):
        raise StudyError("One class has no readouts; a direction needs at least one text on each side.")
    if not (np.isfinite(empathic).all() and np.isfinite(non_empathic).all()):
        raise StudyError("The readouts hold NaN or infinity; check the model's dtype (float16 overflows in some).")
    return empathic, non_empathic


def _mean_difference(empathic: _Floats64, non_empathic: _Floats64) -> Vector:
    difference = empathic.mean(axis=0) - non_empathic.mean(axis=0)
    if not difference.any():
        raise StudyError(
            "Both classes have the same mean readout, so there is no direction; check that the texts differ."
        )
    return _unit(difference)


def _unit(vector_D: _Floats64) -> Vector:
    unit: Vector = (vector_D / np.linalg.norm(vector_D)).astype(np.float32)
    return unit
