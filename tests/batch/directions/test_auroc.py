from __future__ import annotations

import random

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from batch_jobs.directions.auroc import auroc, auroc_interval


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


def test_the_interval_is_that_of_texts_drawn_again_within_their_class() -> None:
    draw = np.random.default_rng(3)
    positive, other = draw.normal(0.8, 1, 15), draw.normal(0.0, 1, 15)
    low, high = auroc_interval(positive, other, resamples=4000, seed=1)

    again = random.Random(5)
    resampled = []
    for _ in range(4000):
        ours, theirs = again.choices(positive.tolist(), k=15), again.choices(other.tolist(), k=15)
        resampled.append(sum((a > b) + (a == b) / 2 for a in ours for b in theirs) / 225)
    resampled.sort()
    # Both ends are quantiles of 4,000 draws, with a Monte Carlo error of about 0.005. Drawing both classes from one
    # pool would move them by 0.2.
    assert low == pytest.approx(resampled[100], abs=0.02)
    assert high == pytest.approx(resampled[3899], abs=0.02)


def test_the_interval_depends_on_the_seed_only() -> None:
    positive, other = np.array([0.0, 2.0, 3.0, 5.0]), np.array([1.0, -1.0, 2.5, 4.0])
    interval = auroc_interval(positive, other, resamples=200, seed=7)
    assert auroc_interval(positive, other, resamples=200, seed=7) == interval
    # scaling keeps the order of the texts, and so the result of every resample
    assert auroc_interval(positive * 9, other * 9, resamples=200, seed=7) == interval


def test_classes_that_do_not_overlap_have_an_interval_of_no_width() -> None:
    assert auroc_interval(np.array([3.0, 4.0]), np.array([1.0, 2.0]), resamples=100, seed=0) == (1.0, 1.0)
