"""What words alone achieve, and the comparison of a direction with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import norm

from batch_jobs.directions.word_baselines import (
    BeyondWords,
    TextSides,
    WordScores,
    beyond_words,
    score_by_words,
    word_baselines,
)

TRAIN = TextSides(("warm hand", "warm door", "warm hill"), ("cold hand", "cold door", "cold hill"))


def test_the_bag_of_words_is_fitted_on_train_texts_and_scored_on_test_texts() -> None:
    test = TextSides(("warm lake", "grey lake"), ("cold lake", "grey lake"))
    scores = score_by_words(TRAIN, test)
    assert scores.positive_N[0] > scores.positive_N[1] == scores.negative_N[1] > scores.negative_N[0]
    got = word_baselines(test, scores)
    # of the four pairs of texts, three are won and one is tied
    assert got.bag_of_words.auroc == pytest.approx(3.5 / 4)
    assert got.bag_of_words.low < 3.5 / 4 < got.bag_of_words.high
    assert got.length.auroc == 0.5


def test_words_that_only_the_test_texts_hold_tell_nothing() -> None:
    test = TextSides(("lake sun", "lake sun"), ("lake rain", "lake rain"))
    assert word_baselines(test, score_by_words(TRAIN, test)).bag_of_words.auroc == 0.5


def test_punctuation_tells_and_so_does_length() -> None:
    train = TextSides(("hand!", "door!"), ("hand.", "door."))
    test = TextSides(("a long lake!", "a lake!"), ("lake.", "lake."))
    got = word_baselines(test, score_by_words(train, test))
    assert (got.bag_of_words.auroc, got.length.auroc) == (1.0, 1.0)


def compared(direction: Any, words: Any, resamples: int = 2000) -> BeyondWords:
    """`direction` and `words`: (2, N) scores of the positive and the negative texts."""
    return beyond_words(direction[0], direction[1], WordScores(words[0], words[1]), resamples=resamples, seed=0)


def test_the_verdict_has_three_states() -> None:
    apart, mixed = np.array([np.arange(20.0) + 50, np.arange(20.0)]), np.array([np.arange(20.0), np.arange(20.0)])
    better, worse, equal = compared(apart, mixed), compared(mixed, apart), compared(mixed, mixed)
    assert (better.difference, better.verdict, better.at_ceiling) == (0.5, "yes", False)
    assert 0.0 < better.difference_low < 0.5 < better.difference_high
    assert (worse.difference, worse.verdict, worse.at_ceiling) == (-0.5, "no", True)
    assert (worse.difference_low, worse.difference_high) == pytest.approx(
        (-better.difference_high, -better.difference_low)
    )
    assert equal.verdict == "undecided"


def test_two_perfect_aurocs_decide_nothing_and_their_difference_keeps_a_width() -> None:
    apart = np.array([np.arange(15.0) + 50, np.arange(15.0)])
    got = compared(apart, apart)
    assert (got.difference, got.verdict, got.at_ceiling) == (0.0, "undecided", True)
    # one AUROC of 1 on 15 pairs may be as low as 0.865
    assert (got.difference_low, got.difference_high) == pytest.approx((-0.1352, 0.1352), abs=1e-4)


def test_the_correlation_of_scores_of_the_same_texts_narrows_the_interval() -> None:
    draw = np.random.default_rng(1)
    direction = draw.normal(size=(2, 15)) + np.array([[1.2], [0.0]])
    alike = direction + draw.normal(size=(2, 15)) * 0.1
    unlike = direction[:, draw.permutation(15)]  # the same scores and so the same AUROC, of other pairs

    def width(words: Any) -> float:
        got = compared(direction, words)
        return got.difference_high - got.difference_low

    assert width(alike) < 0.75 * width(unlike)
    assert width(direction) < width(alike)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("auroc_direction", "auroc_words", "correlation"),
    [(0.87, 0.87, 0.0), (0.95, 0.87, 0.5), (0.98, 0.8, 0.3)],
)
def test_the_interval_of_the_difference_covers_the_true_one(
    auroc_direction: float, auroc_words: float, correlation: float
) -> None:
    draw = np.random.default_rng(3)
    held = 0
    for _ in range(400):
        direction = draw.normal(size=(2, 15))
        words = correlation * direction + (1 - correlation**2) ** 0.5 * draw.normal(size=(2, 15))
        direction[0] += norm.ppf(auroc_direction) * 2**0.5
        words[0] += norm.ppf(auroc_words) * 2**0.5
        got = compared(direction, words, resamples=200)
        held += got.difference_low <= auroc_direction - auroc_words <= got.difference_high
    # 400 rounds at 95 % have a standard error of 1.1 points
    assert held / 400 > 0.925
