"""What words alone achieve on the texts that test a direction, and whether the direction detects more than they do.

Shape suffixes: N texts of one side, K resamples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from batch_jobs.directions.auroc import AurocEstimate, auroc, estimate_auroc
from batch_jobs.texts.words_alone import bag_of_words_scores, lengths

Floats = npt.NDArray[np.floating[Any]]
Verdict = Literal["yes", "no", "undecided"]


@dataclass(frozen=True)
class TextSides:
    """Texts of both sides, a pair's two texts at the same place."""

    positive: tuple[str, ...]
    negative: tuple[str, ...]


@dataclass(frozen=True)
class WordScores:
    """Scores of test texts by a bag of words: (N,) float64 of each side."""

    positive_N: Floats
    negative_N: Floats


@dataclass(frozen=True)
class WordBaselines:
    """AUROCs on test texts of what needs no model. A direction's own AUROC means little where these are as high."""

    bag_of_words: AurocEstimate
    """Which words a text holds: a logistic regression fitted on the train texts."""
    length: AurocEstimate
    """Number of words of a text; below 0.5 the positive texts are shorter."""


@dataclass(frozen=True)
class BeyondWords:
    """Does a direction tell the test texts apart better than a bag of words fitted on the same train texts?"""

    direction: AurocEstimate
    bag_of_words: AurocEstimate
    difference: float
    """AUROC of the direction minus that of the bag of words."""
    difference_low: float
    """Lower end of the difference's 95 % interval (`beyond_words`)."""
    difference_high: float
    verdict: Verdict
    """`yes`: the interval lies above 0; `no`: below 0; `undecided`: it holds 0."""
    at_ceiling: bool
    """Whether the bag of words alone has an AUROC of 1: no direction can then do better on these texts."""


def score_by_words(train: TextSides, test: TextSides) -> WordScores:
    """Scores of the test texts by a bag of words fitted on the train texts."""
    scores = bag_of_words_scores(train.positive, train.negative, [*test.positive, *test.negative])
    return WordScores(scores[: len(test.positive)], scores[len(test.positive) :])


def word_baselines(test: TextSides, scores: WordScores) -> WordBaselines:
    """Both baselines on the test texts; `scores` are those of `score_by_words` on the same texts."""
    return WordBaselines(
        bag_of_words=estimate_auroc(scores.positive_N, scores.negative_N),
        length=estimate_auroc(lengths(test.positive), lengths(test.negative)),
    )


def beyond_words(
    positive_N: Floats, negative_N: Floats, words: WordScores, *, resamples: int, seed: int
) -> BeyondWords:
    """Compare a direction's projections of the test texts with their scores by words.

    The interval of the difference adds the distances from both AUROCs to the ends of their score intervals, squared and
    with the correlation of the two AUROCs, which both come from the same texts: with estimates a and b, their intervals
    and the correlation r, the lower end is

        a - b - sqrt((a - a_low)² + (b_high - b)² - 2 r (a - a_low)(b_high - b))

    and the upper end is the mirror image. r is that of a bootstrap that draws test pairs again and scores both on the
    same draw; where one AUROC is 1 in every draw, r is 0. On 15 pairs of normal scores
    the interval covers the true difference in 96 % of cases or more, a percentile bootstrap of the difference in as few
    as 90 %, and the latter has no width where both AUROCs are 1.

    Source: Zou and Donner, Statistics in Medicine 27 (2008) 1693.

    Args:
        positive_N: projections of the positive texts of N >= 1 pairs.
        negative_N: those of the negative texts, in the order of the same pairs.
        words: scores of the same texts.
        resamples: draws of the bootstrap, at least 2.
        seed: draws the pairs; the same for every layer, so that layers are compared on the same draws.
    """
    direction, bag = estimate_auroc(positive_N, negative_N), estimate_auroc(words.positive_N, words.negative_N)
    pairs = len(positive_N)
    drawn_NK = np.random.default_rng(seed).integers(pairs, size=(pairs, resamples))
    correlation = _correlation(
        auroc(positive_N[drawn_NK], negative_N[drawn_NK]), auroc(words.positive_N[drawn_NK], words.negative_N[drawn_NK])
    )
    difference = direction.auroc - bag.auroc
    low = difference - _add(direction.auroc - direction.low, bag.high - bag.auroc, correlation)
    high = difference + _add(direction.high - direction.auroc, bag.auroc - bag.low, correlation)
    return BeyondWords(
        direction=direction,
        bag_of_words=bag,
        difference=difference,
        difference_low=low,
        difference_high=high,
        verdict="yes" if low > 0.0 else "no" if high < 0.0 else "undecided",
        at_ceiling=bag.auroc == 1.0,
    )


def _correlation(first_K: Floats, second_K: Floats) -> float:
    if first_K.std() == 0.0 or second_K.std() == 0.0:
        return 0.0
    return float(np.corrcoef(first_K, second_K)[0, 1])


def _add(one: float, other: float, correlation: float) -> float:
    # rounding takes a difference of two equal distances below 0
    return math.sqrt(max(0.0, one**2 + other**2 - 2 * correlation * one * other))


def choose_texts(sides: TextSides, rows: npt.NDArray[np.intp]) -> TextSides:
    """The pairs at `rows`."""
    return TextSides(tuple(sides.positive[row] for row in rows), tuple(sides.negative[row] for row in rows))
