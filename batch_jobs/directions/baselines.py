"""Chance level of a direction: how well random directions separate the same texts.

Shape suffixes: N texts, K random directions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from batch_jobs.directions.auroc import auroc
from batch_jobs.directions.readout_file import PairReadouts
from batch_jobs.directions.separation import separation_in_stds
from batch_jobs.directions.validate_layer import ValidationError


@dataclass(frozen=True)
class RandomBaseline:
    """AUROCs of random directions at one layer, and the rank of the study's direction among them.

    The paper's numbers are one-sided: they count a random direction with AUROC 0.1 as poor. But the sign of a random
    direction is arbitrary, so it separates as well as one with AUROC 0.9. The two-sided numbers therefore measure the
    distance from 0.5.
    """

    aurocs: tuple[float, ...]
    """One value per random direction, in the order drawn."""
    mean: float
    std: float
    """Population standard deviation, as in the paper."""
    percentile_95: float
    """95 % of the random directions have this AUROC or less."""
    z: float | None
    """(AUROC of the direction - mean) / std; None when all random AUROCs are equal."""
    z_max: float | None
    """The same for an AUROC of 1: the largest z that these random directions allow."""
    two_sided_percentile_95: float
    """95 % of the random directions are at most this far from 0.5 (0..0.5)."""
    two_sided_p: float
    """Chance that a random direction is at least as far from 0.5 as the study's: (1 + those as far) / (1 + all)."""
    separation: SeparationBaseline | None
    """None where a direction's projections have no spread, as with one text a side."""


@dataclass(frozen=True)
class SeparationBaseline:
    """Separation of the classes in standard deviations, of the study's direction and of the random ones.

    It still tells directions apart where their AUROCs are all 1. The numbers of random directions are absolute, since
    their sign is arbitrary.
    """

    direction: float
    """Negative when the direction points the wrong way."""
    random_percentile_95: float
    """95 % of the random directions separate by at most this much."""
    random_best: float
    """The random direction that separates best."""
    p: float
    """Chance that a random direction separates at least as well: (1 + those that do) / (1 + all)."""


def random_baseline(
    test: PairReadouts, direction_auroc: float, direction_separation: float, *, directions: int, seed: int
) -> RandomBaseline:
    """Compare the direction with random directions on the same test texts.

    Args:
        test: (N, D) per side, finite.
        direction_auroc: AUROC of the study's direction on `test`.
        direction_separation: its separation there in standard deviations.
        directions: number of Gaussian unit vectors to draw (paper: 100).
        seed: the same seed and D draw the same vectors.

    Raises:
        ValidationError: fewer than 2 `directions`.
    """
    vectors_KD = np.random.default_rng(seed).standard_normal((directions, test.positive_ND.shape[1]))
    vectors_KD /= np.linalg.norm(vectors_KD, axis=1, keepdims=True)
    positive_NK = test.positive_ND.astype(np.float64) @ vectors_KD.T
    negative_NK = test.negative_ND.astype(np.float64) @ vectors_KD.T
    return summarise_random_aurocs(
        auroc(positive_NK, negative_NK).tolist(),
        direction_auroc,
        separation=_summarise_separations(separation_in_stds(positive_NK, negative_NK), direction_separation),
    )


def summarise_random_aurocs(
    aurocs: Sequence[float], direction_auroc: float, *, separation: SeparationBaseline | None = None
) -> RandomBaseline:
    """Summarise the AUROCs of random directions; `separation` becomes a field of the summary.

    Raises:
        ValidationError: fewer than 2 AUROCs.
    """
    if len(aurocs) < 2:
        raise ValidationError(f"Got {len(aurocs)} random directions; a chance level needs at least 2.")
    values = np.asarray(aurocs, dtype=np.float64)
    mean, std = float(values.mean()), float(values.std())
    distances = np.abs(values - 0.5)
    # with few texts AUROCs are multiples of one step, so ties are common; the margin keeps rounding from deciding them
    as_far = np.count_nonzero(distances >= abs(direction_auroc - 0.5) - 1e-9)
    return RandomBaseline(
        aurocs=tuple(values.tolist()),
        mean=mean,
        std=std,
        percentile_95=float(np.percentile(values, 95)),
        z=(direction_auroc - mean) / std if std > 0.0 else None,
        z_max=(1.0 - mean) / std if std > 0.0 else None,
        two_sided_percentile_95=float(np.percentile(distances, 95)),
        two_sided_p=(1 + int(as_far)) / (1 + len(values)),
        separation=separation,
    )


def _summarise_separations(random_K: npt.NDArray[np.float64], direction: float) -> SeparationBaseline | None:
    sizes_K = np.abs(random_K)
    if not (np.isfinite(sizes_K).all() and np.isfinite(direction)):
        return None
    as_good = int(np.count_nonzero(sizes_K >= abs(direction)))
    return SeparationBaseline(
        direction=direction,
        random_percentile_95=float(np.percentile(sizes_K, 95)),
        random_best=float(sizes_K.max()),
        p=(1 + as_good) / (1 + len(sizes_K)),
    )
