"""Does one direction separate held-out texts at one layer? AUROC, accuracy and separation of the projections.

Shape suffixes: N texts, D hidden size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from batch_jobs.directions.auroc import estimate_auroc
from batch_jobs.directions.readout_file import Floats, PairReadouts
from batch_jobs.statistics.rates import wilson_interval
from vllm_steer.errors import SteerError

# Published directions are often stored in float16, whose rounding moves the norm by up to about 1e-3.
UNIT_NORM_TOLERANCE = 1e-2


class ValidationError(SteerError):
    """A readout, direction or file cannot be used for validation; the message says which and why."""


@dataclass(frozen=True)
class LayerValidation:
    """How well one direction tells positive from negative test texts at one layer.

    AUROCs and accuracies are in 0..1. All other values are in units of the residual stream, since the direction has
    norm 1.
    """

    layer: int
    """The direction's layer, a 0-based decoder block. With `extract_offset` -1, the texts were read one block
    earlier."""
    auroc: float
    """Chance that a random positive text projects higher than a random negative one; ties count one half."""
    auroc_low: float
    """Lower end of the AUROC's 95 % score interval (`auroc_interval`)."""
    auroc_high: float
    accuracy: float
    """Share of test texts on the right side of `threshold` (at or above it reads as positive)."""
    accuracy_low: float
    """Lower end of the accuracy's 95 % Wilson interval."""
    accuracy_high: float
    threshold: float
    """Midpoint of the two class means below, as in the paper. It is fitted on the test texts, so `accuracy` is slightly
    optimistic."""
    accuracy_train_threshold: float
    """Share of test texts on the right side of `threshold_train`: the probe's accuracy on unseen texts."""
    accuracy_train_threshold_low: float
    """Lower end of its 95 % Wilson interval."""
    accuracy_train_threshold_high: float
    threshold_train: float
    """Midpoint of the two class means of the *train* texts."""
    mean_positive: float
    """Mean projection of the positive test texts."""
    mean_negative: float
    separation: float
    """`mean_positive - mean_negative`; negative when the direction points the wrong way."""
    std_positive: float
    """Population standard deviation (divided by N, not N - 1), as in the paper's tables."""
    std_negative: float

    @property
    def separation_in_stds(self) -> float:
        """Separation over the root mean square of the two stds, comparable across layers.

        When both stds are 0: ±inf, or 0 without separation.
        """
        spread = math.sqrt((self.std_positive**2 + self.std_negative**2) / 2)
        if spread == 0.0:
            return math.copysign(math.inf, self.separation) if self.separation else 0.0
        return self.separation / spread


def validate_layer(
    layer: int,
    direction_D: Floats,
    *,
    train: PairReadouts,
    test: PairReadouts,
) -> LayerValidation:
    """Project readouts on a unit direction and measure how well it separates the test classes.

    Everything is computed in float64. The AUROC, the threshold halfway between the test means and the population
    standard deviations follow the paper's section on probe validation. The intervals and the train threshold are
    additions.

    Args:
        layer: the direction's layer, for the result and messages.
        direction_D: (D,), norm 1.
        train: (N, D) per side, any float dtype, one pooled readout per row. The sides may differ in N, each >= 1.
        test: held-out readouts in the same form.

    Raises:
        ValidationError: a wrong shape, an empty class, a value that is not finite, or a direction whose norm is not 1.
    """
    direction_D = np.asarray(direction_D, dtype=np.float64)
    if direction_D.ndim != 1:
        raise ValidationError(
            f"layer {layer}: the direction has shape {direction_D.shape}; it must be one vector, (D,)."
        )
    norm = float(np.linalg.norm(direction_D))
    # `not <=` rather than `>`, so that a NaN norm is refused too
    if not abs(norm - 1.0) <= UNIT_NORM_TOLERANCE:
        raise ValidationError(f"layer {layer}: the direction has norm {norm:.4g}; divide it by its norm first.")
    positive_N = _project(layer, "positive test", test.positive_ND, direction_D)
    negative_N = _project(layer, "negative test", test.negative_ND, direction_D)
    train_positive_N = _project(layer, "positive train", train.positive_ND, direction_D)
    train_negative_N = _project(layer, "negative train", train.negative_ND, direction_D)

    mean_positive, mean_negative = float(positive_N.mean()), float(negative_N.mean())
    threshold = (mean_positive + mean_negative) / 2
    threshold_train = float(train_positive_N.mean() + train_negative_N.mean()) / 2
    estimate = estimate_auroc(positive_N, negative_N)
    accuracy, accuracy_low, accuracy_high = _accuracy(positive_N, negative_N, threshold)
    by_train, by_train_low, by_train_high = _accuracy(positive_N, negative_N, threshold_train)
    return LayerValidation(
        layer=layer,
        auroc=estimate.auroc,
        auroc_low=estimate.low,
        auroc_high=estimate.high,
        accuracy=accuracy,
        accuracy_low=accuracy_low,
        accuracy_high=accuracy_high,
        threshold=threshold,
        accuracy_train_threshold=by_train,
        accuracy_train_threshold_low=by_train_low,
        accuracy_train_threshold_high=by_train_high,
        threshold_train=threshold_train,
        mean_positive=mean_positive,
        mean_negative=mean_negative,
        separation=mean_positive - mean_negative,
        std_positive=float(positive_N.std()),
        std_negative=float(negative_N.std()),
    )


def _project(layer: int, name: str, readouts_ND: Floats, direction_D: Floats) -> npt.NDArray[np.float64]:
    readouts_ND = np.asarray(readouts_ND, dtype=np.float64)
    size = direction_D.shape[0]
    if readouts_ND.ndim != 2 or readouts_ND.shape[0] == 0 or readouts_ND.shape[1] != size:
        raise ValidationError(
            f"layer {layer}: the {name} readouts have shape {readouts_ND.shape}; the direction needs "
            f"(N, {size}) with N >= 1."
        )
    if not np.isfinite(readouts_ND).all():
        raise ValidationError(f"layer {layer}: the {name} readouts hold NaN or infinity; look for a failed readout.")
    projections: npt.NDArray[np.float64] = readouts_ND @ direction_D
    return projections


def _accuracy(
    positive_N: npt.NDArray[np.float64], negative_N: npt.NDArray[np.float64], threshold: float
) -> tuple[float, float, float]:
    """Share of texts on the right side, with the ends of its Wilson interval."""
    right = int(np.count_nonzero(positive_N >= threshold) + np.count_nonzero(negative_N < threshold))
    texts = len(positive_N) + len(negative_N)
    return right / texts, *wilson_interval(right, texts)
