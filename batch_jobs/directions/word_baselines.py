"""What words alone achieve on the texts that test a direction, and whether the direction detects more than they do.

Shape suffixes: N texts of one side, K resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from batch_jobs.directions.auroc import AurocEstimate, auroc, estimate_auroc
from batch_jobs.texts.words_alone import bag_of_words_scores, lengths

Floats = npt.NDArray[np.float64]
Verdict = Literal["yes", "no", "undecided"]

MIN_PAIRS = 6
"""Test pairs below which the verdict stays undecided: with five, even a sign test that all of them win has a two-sided
p of 2/2⁵ = 0.06."""


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
    """Lower end of the difference's 95 % interval, a percentile bootstrap that draws test pairs again and scores both
    on the same draw. Where both AUROCs are 1, every draw gives 0 and the interval has no width."""
    difference_high: float
    verdict: Verdict
    """`yes`: the interval lies above 0; `no`: below 0; `undecided`: it holds 0, or there are fewer than MIN_PAIRS
    pairs."""
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

    Args:
        positive_N: projections of the positive texts of N >= 1 pairs.
        negative_N: those of the negative texts, in the order of the same pairs.
        words: scores of the same texts.
        resamples: draws of the bootstrap.
        seed: draws the pairs; the same for every layer, so that layers are compared on the same draws.
    """
    direction, bag = estimate_auroc(positive_N, negative_N), estimate_auroc(words.positive_N, words.negative_N)
    pairs = len(positive_N)
    drawn_NK = np.random.default_rng(seed).integers(pairs, size=(pairs, resamples))
    differences_K = auroc(positive_N[drawn_NK], negative_N[drawn_NK]) - auroc(
        words.positive_N[drawn_NK], words.negative_N[drawn_NK]
    )
    low, high = (float(end) for end in np.percentile(differences_K, [2.5, 97.5]))
    return BeyondWords(
        direction=direction,
        bag_of_words=bag,
        difference=direction.auroc - bag.auroc,
        difference_low=low,
        difference_high=high,
        verdict=_verdict(low, high, pairs),
        at_ceiling=bag.auroc == 1.0,
    )


def choose_texts(sides: TextSides, rows: Sequence[int]) -> TextSides:
    """The pairs at `rows`."""
    return TextSides(tuple(sides.positive[row] for row in rows), tuple(sides.negative[row] for row in rows))


def _verdict(low: float, high: float, pairs: int) -> Verdict:
    if pairs < MIN_PAIRS:
        return "undecided"
    return "yes" if low > 0.0 else "no" if high < 0.0 else "undecided"
