from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from batch_jobs.directions.auroc import AurocEstimate, auroc, auroc_interval, estimate_auroc


def test_auroc_is_the_share_of_text_pairs_won() -> None:
    # (positive, other) won: 1 > {0, -2}; 3 > all three; 5 > all three; 8 of 9
    assert float(auroc(np.array([1.0, 3.0, 5.0]), np.array([0.0, 2.0, -2.0]))) == pytest.approx(8 / 9)


def test_every_column_is_a_direction_of_its_own_and_ties_count_one_half() -> None:
    draw = np.random.default_rng(0)
    positive, other = draw.integers(0, 4, (9, 20)), draw.integers(0, 4, (6, 20))  # four values: full of ties
    labels = [1] * 9 + [0] * 6
    expected = [roc_auc_score(labels, [*positive[:, k], *other[:, k]]) for k in range(20)]
    # both are exact up to the rounding of a division
    np.testing.assert_allclose(auroc(positive, other), expected, atol=1e-12)


@pytest.mark.parametrize(("positives", "negatives"), [(15, 15), (4, 40), (1, 1), (300, 200)])
@pytest.mark.parametrize("observed", [0.0, 0.03, 0.5, 0.9, 0.999, 1.0])
def test_the_interval_holds_every_value_within_1_96_of_its_own_standard_errors(
    observed: float, positives: int, negatives: int
) -> None:
    # the definition, by search on a grid: which θ does the observed AUROC not contradict?
    grid = np.linspace(0, 1, 400_001)
    mean_size = (positives + negatives) / 2
    # Hanley and McNeil: Q1 = θ/(2 - θ), Q2 = 2θ²/(1 + θ)
    q1, q2 = grid / (2 - grid), 2 * grid**2 / (1 + grid)
    variance = (grid * (1 - grid) + (mean_size - 1) * (q1 - grid**2 + q2 - grid**2)) / (positives * negatives)
    kept = grid[np.abs(observed - grid) <= 1.959964 * np.sqrt(np.maximum(variance, 0))]
    low, high = auroc_interval(observed, positives, negatives)
    assert low == pytest.approx(kept.min(), abs=5e-6)  # two steps of the grid
    assert high == pytest.approx(kept.max(), abs=5e-6)


def test_classes_that_do_not_overlap_have_an_interval_with_a_width() -> None:
    low, high = auroc_interval(1.0, 15, 15)
    assert (round(low, 3), high) == (0.865, 1.0)
    assert estimate_auroc(np.arange(1.0, 16), -np.arange(15.0)) == AurocEstimate(1.0, low, 1.0)


def test_the_interval_of_a_turned_direction_is_the_mirrored_one() -> None:
    low, high = auroc_interval(0.9, 12, 20)
    assert auroc_interval(0.1, 12, 20) == pytest.approx((1 - high, 1 - low), abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("true_auroc", [0.8, 0.95, 0.98])
def test_the_interval_covers_the_true_auroc_as_often_as_it_says(true_auroc: float) -> None:
    rate, rate_of_resampling = coverage(true_auroc, texts=15, rounds=20_000)
    # Newcombe's is conservative near 1. 20,000 rounds are good to 0.15 points.
    assert 0.945 < rate < 0.995
    if true_auroc >= 0.95:
        assert rate_of_resampling < 0.90  # why it is not a percentile bootstrap


def coverage(true_auroc: float, *, texts: int, rounds: int) -> tuple[float, float]:
    """How often the interval of normal scores holds the true AUROC; the same of a percentile bootstrap, on the first
    1,000 rounds."""
    draw = np.random.default_rng(11)
    positive = draw.normal(norm.ppf(true_auroc) * 2**0.5, 1, (texts, rounds))
    other = draw.normal(0, 1, (texts, rounds))
    observed = auroc(positive, other)
    values, counts = np.unique(observed, return_counts=True)
    ends = np.array([auroc_interval(value, texts, texts) for value in values])
    held = (ends[:, 0] <= true_auroc) & (true_auroc <= ends[:, 1])
    resampled = [
        resampled_interval(positive[:, k], other[:, k], np.random.default_rng(k)) for k in range(min(rounds, 1000))
    ]
    return float(counts[held].sum() / rounds), float(np.mean([low <= true_auroc <= high for low, high in resampled]))


def resampled_interval(
    positive: npt.NDArray[np.float64], other: npt.NDArray[np.float64], draw: np.random.Generator
) -> npt.NDArray[np.float64]:
    size = (len(positive), 400)
    again = auroc(positive[draw.integers(len(positive), size=size)], other[draw.integers(len(other), size=size)])
    ends: npt.NDArray[np.float64] = np.percentile(again, [2.5, 97.5])
    return ends
