"""Compare two models on the same texts, and transfer a direction from one to the other (the paper's open question 3).

Projections are scalars and can be compared directly. Residual streams cannot: each model has its own axes, and even
their number differs. So orthogonal Procrustes maps the centred train readouts of model A onto those of model B, and
everything is evaluated on test texts that the map has not seen.

Shape suffixes: N texts, M test texts, A and B the hidden sizes of the two models, R and S the ranks of their centred
train readouts (at most N - 1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from batch_jobs.directions.auroc import auroc
from batch_jobs.directions.methods import mean_difference
from batch_jobs.directions.readout_file import PairReadouts
from batch_jobs.scoring.correlation import Correlation, correlate
from vllm_steer.errors import SteerError

Floats = npt.NDArray[np.float64]


class CrossModelError(SteerError):
    """The readouts of two models cannot be compared; the message says why."""


@dataclass(frozen=True)
class BlockReadouts:
    """One model's readouts at the output of one block, all (N, D) with the same D.

    Both models must have read the same texts in the same order.
    """

    block: int
    train: PairReadouts
    test: PairReadouts


@dataclass(frozen=True)
class Chance:
    """Distribution of one number over shuffled texts."""

    mean: float
    percentile_95: float
    p: float
    """Share of shuffles that do at least as well; the real pairing counts as one more."""


@dataclass(frozen=True)
class ShuffleControl:
    """The alignment refitted with the train texts of B shuffled, so that its rows belong to other texts than A's.

    Agreement that survives the shuffle is overfitting.
    """

    rounds: int
    similarity_test: Chance
    transfer_auroc: Chance
    transfer_cosine: Chance


@dataclass(frozen=True)
class CrossModelAgreement:
    """Agreement of one block of A and one block of B.

    The directions are the mean differences of each model's own train readouts.
    """

    block_a: int
    """Decoder block (0-based) whose output was read."""
    block_b: int
    train_texts: int
    test_texts: int
    raw: Correlation
    """Over test texts: A's projections on A's direction against B's on B's. Both separate the classes, so this is high
    even if the models agree on nothing else."""
    raw_within_class: Correlation
    """`raw` after subtracting each class's mean: do the models agree on *how* positive a text is?"""
    aligned: Correlation
    """Over test texts: projections of A's mapped readouts on B's direction against B's own projections."""
    aligned_within_class: Correlation
    """`aligned` after subtracting each class's mean."""
    rank: int
    """Rank of the map. It sends everything outside the span of A's train readouts to zero."""
    similarity_train: float
    """Cosine between A's mapped readouts and B's, centred, all texts flattened into one vector per model (-1 to 1).
    Near 1 on train texts whenever they are fewer than the dimensions, so it shows nothing; see `similarity_test`."""
    similarity_test: float
    mapped_norm: float
    """Norm of A's unit direction after the map, 0 to 1: how much of the direction the map keeps."""
    transfer_auroc: float
    """AUROC of A's mapped direction on B's test readouts."""
    transfer_cosine: float
    """Cosine between A's mapped direction and B's own, -1 to 1. Map and directions come from the same train texts, so
    with few texts it is high for unrelated models too, as `shuffled_within_class` shows."""
    shuffled: ShuffleControl
    """Train texts shuffled across both classes: the chance level."""
    shuffled_within_class: ShuffleControl
    """Train texts shuffled inside each class, so the map knows only the class of a text. Agreement beyond this is about
    individual texts. A direction of class means can transfer without it."""


def compare_readouts(
    readouts_a: BlockReadouts, readouts_b: BlockReadouts, *, rounds: int = 100, seed: int = 0
) -> CrossModelAgreement:
    """Compare two models at one block each, raw and after alignment. Everything is computed in float64.

    The map is the (A, B) semi-orthogonal W that minimises ‖A_train W − B_train‖, with each model's rows centred by
    their train mean: from A_trainᵀ B_train = P Σ Qᵀ, W = P Qᵀ over the nonzero singular values (Schönemann 1966). With
    N_train below the hidden sizes, W is determined only on the span of the train texts. Elsewhere every choice fits
    equally well, and W is zero there, which assumes nothing.

    Args:
        readouts_a: model A's readouts.
        readouts_b: model B's readouts of the same texts in the same order.
        rounds: shuffles per control.
        seed: draws the shuffles.

    Raises:
        CrossModelError: a shape is wrong, the numbers of texts differ, or a value is not finite.
        StudyError: a model's train classes have the same mean.
    """
    a, b = _Side.of(readouts_a), _Side.of(readouts_b)
    if (a.train_classes, a.test_classes) != (b.train_classes, b.test_classes):
        raise CrossModelError(
            f"Got {a.train_classes} train and {a.test_classes} test texts (positive, negative) of one model and "
            f"{b.train_classes} and {b.test_classes} of the other; both must have read the same texts."
        )
    positive = np.arange(sum(a.test_classes)) < a.test_classes[0]
    in_order = np.arange(sum(a.train_classes))
    fit = _Alignment.fit(a, b, in_order)
    rng = np.random.default_rng(seed)

    def within_class() -> npt.NDArray[np.intp]:
        first = a.train_classes[0]
        return np.concatenate([rng.permutation(in_order[:first]), rng.permutation(in_order[first:])])

    own_b = b.test_MR @ b.direction_R
    read_by_b = a.test_MR @ fit.map_RS @ b.direction_R
    own_a = a.test_MR @ a.direction_R
    return CrossModelAgreement(
        block_a=readouts_a.block,
        block_b=readouts_b.block,
        train_texts=len(in_order),
        test_texts=len(positive),
        raw=correlate(own_a, own_b),
        raw_within_class=correlate(_off_class_means(own_a, positive), _off_class_means(own_b, positive)),
        aligned=correlate(read_by_b, own_b),
        aligned_within_class=correlate(_off_class_means(read_by_b, positive), _off_class_means(own_b, positive)),
        rank=fit.rank,
        similarity_train=fit.similarity(a.train_NR, b.train_NR, a.train_norm * b.train_norm),
        similarity_test=fit.similarity(a.test_MR, b.test_MR, a.test_norm * b.test_norm),
        mapped_norm=float(np.linalg.norm(a.direction_R @ fit.map_RS)),
        transfer_auroc=fit.transfer_auroc(a, b, positive),
        transfer_cosine=fit.transfer_cosine(a, b),
        shuffled=_control(a, b, positive, fit, rounds, lambda: rng.permutation(in_order)),
        shuffled_within_class=_control(a, b, positive, fit, rounds, within_class),
    )


@dataclass(frozen=True)
class _Side:
    """One model in the coordinates of its own train span: R numbers per text instead of D.

    Nothing is lost, since the map and both directions lie in that span. Each shuffle then needs only a small matrix.
    """

    train_classes: tuple[int, int]
    test_classes: tuple[int, int]
    train_NR: Floats
    test_MR: Floats
    direction_R: Floats
    train_norm: float
    test_norm: float
    """Frobenius norms of the centred readouts in all D dimensions: the part outside the span must count as
    unmatched."""

    @classmethod
    def of(cls, readouts: BlockReadouts) -> _Side:
        sides = [
            np.asarray(side, dtype=np.float64)
            for pairs in (readouts.train, readouts.test)
            for side in (pairs.positive_ND, pairs.negative_ND)
        ]
        if any(side.ndim != 2 or len(side) == 0 or side.shape[1:] != sides[0].shape[1:] for side in sides):
            raise CrossModelError(
                f"block {readouts.block}: got readouts of shapes {[side.shape for side in sides]}; each must be "
                "(N, D) with N >= 1 and the same D."
            )
        if not all(np.isfinite(side).all() for side in sides):
            raise CrossModelError(f"block {readouts.block}: the readouts hold NaN or infinity; extract them again.")
        train_ND, test_MD = np.concatenate(sides[:2]), np.concatenate(sides[2:])
        center_D = train_ND.mean(axis=0)
        train_ND, test_MD = train_ND - center_D, test_MD - center_D
        _, scales_R, axes_RD = np.linalg.svd(train_ND, full_matrices=False)
        axes_RD = axes_RD[_nonzero(scales_R, max(train_ND.shape))]
        return cls(
            train_classes=(len(sides[0]), len(sides[1])),
            test_classes=(len(sides[2]), len(sides[3])),
            train_NR=train_ND @ axes_RD.T,
            test_MR=test_MD @ axes_RD.T,
            direction_R=axes_RD @ mean_difference(readouts.train).astype(np.float64),
            train_norm=float(np.linalg.norm(train_ND)),
            test_norm=float(np.linalg.norm(test_MD)),
        )


@dataclass(frozen=True)
class _Alignment:
    """A Procrustes map from A's coordinates to B's."""

    map_RS: Floats
    rank: int

    @classmethod
    def fit(cls, a: _Side, b: _Side, order: npt.NDArray[np.intp]) -> _Alignment:
        """Map row n of A's train readouts onto row order[n] of B's."""
        product_RS = a.train_NR.T @ b.train_NR[order]
        left_RK, scales_K, right_KS = np.linalg.svd(product_RS, full_matrices=False)
        known = _nonzero(scales_K, max(product_RS.shape))
        return cls(left_RK[:, known] @ right_KS[known], int(known.sum()))

    def similarity(self, rows_a: Floats, rows_b: Floats, norms: float) -> float:
        return float(np.sum((rows_a @ self.map_RS) * rows_b) / norms)

    def transfer_auroc(self, a: _Side, b: _Side, positive: npt.NDArray[np.bool_]) -> float:
        projections = b.test_MR @ (a.direction_R @ self.map_RS)
        return float(auroc(projections[positive], projections[~positive]))

    def transfer_cosine(self, a: _Side, b: _Side) -> float:
        mapped_S = a.direction_R @ self.map_RS
        norms = float(np.linalg.norm(mapped_S) * np.linalg.norm(b.direction_R))
        return float(mapped_S @ b.direction_R) / norms if norms else 0.0


def _control(
    a: _Side,
    b: _Side,
    positive: npt.NDArray[np.bool_],
    fit: _Alignment,
    rounds: int,
    shuffle: Callable[[], npt.NDArray[np.intp]],
) -> ShuffleControl:
    def numbers(alignment: _Alignment) -> tuple[float, float, float]:
        return (
            alignment.similarity(a.test_MR, b.test_MR, a.test_norm * b.test_norm),
            alignment.transfer_auroc(a, b, positive),
            alignment.transfer_cosine(a, b),
        )

    by_number = np.array([numbers(_Alignment.fit(a, b, shuffle())) for _ in range(rounds)]).T
    chances = [_chance(real, shuffled) for real, shuffled in zip(numbers(fit), by_number, strict=True)]
    return ShuffleControl(rounds, *chances)


def _chance(real: float, shuffled: Floats) -> Chance:
    # tolerance for rounding: a shuffle that changes nothing must count as doing as well
    as_good = int(np.sum(shuffled >= real - 1e-9 * abs(real)))
    return Chance(
        mean=float(shuffled.mean()),
        percentile_95=float(np.percentile(shuffled, 95)),
        p=(1 + as_good) / (1 + len(shuffled)),
    )


def _off_class_means(values: Floats, positive: npt.NDArray[np.bool_]) -> Floats:
    centred: Floats = values - np.where(positive, values[positive].mean(), values[~positive].mean())
    return centred


def _nonzero(scales: Floats, size: int) -> npt.NDArray[np.bool_]:
    # numpy's own convention for the rank of a matrix
    known: npt.NDArray[np.bool_] = scales > scales.max(initial=0.0) * size * np.finfo(np.float64).eps
    return known
