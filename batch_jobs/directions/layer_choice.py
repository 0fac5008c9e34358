"""Choose the best layer on the train pairs alone, so that its AUROC on the test pairs is an honest one.

The best of several layers on the test texts looks better than it is: where every layer has a true AUROC of 0.95, the
best of 28 on 15 test pairs averages more than 0.99.

Shape suffixes: N pairs, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import GroupKFold, KFold

from batch_jobs.directions.auroc import AurocEstimate, estimate_auroc
from batch_jobs.directions.methods import mean_difference
from batch_jobs.directions.readout_file import PairReadouts, rows_of
from batch_jobs.directions.separation import separation_in_stds
from batch_jobs.directions.validate_layer import ValidationError
from batch_jobs.directions.word_baselines import TextSides, WordScores, choose_texts, score_by_words

MAX_FOLDS = 5

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Folds:
    """A division of the train pairs for cross-validation."""

    grouped_by: Literal["scenario", "pair"]
    """`scenario`: no scenario is on both sides of a fold. `pair`: there is one scenario only."""
    parts: tuple[tuple[Rows, Rows], ...]
    """The rows that make a direction and those that it is tested on, per fold; empty with a single pair."""


@dataclass(frozen=True)
class LayerChoice:
    """Why `best_layer` is the best."""

    grouped_by: Literal["scenario", "pair"]
    """What a fold leaves out whole: scenarios, or pairs where there is one scenario only."""
    folds: int
    """Number of folds; 0 with a single train pair, which chooses the lowest layer."""
    aurocs: dict[int, AurocEstimate]
    """Layer -> cross-validated AUROC of the train pairs. The layer with the highest one is the best; ties go to the
    larger separation below, then to the lower layer. Empty without folds."""
    separations_in_stds: dict[int, float | None]
    """Layer -> cross-validated separation of the train pairs in standard deviations; None where both classes have no
    spread."""
    bag_of_words: AurocEstimate | None
    """A bag of words in the same folds; None without folds."""


def make_folds(scenario_ids: Sequence[str]) -> Folds:
    """Divide the train pairs into at most MAX_FOLDS folds. Deterministic.

    `scenario_ids`: scenario of each pair, at least one pair.
    """
    pairs, groups = len(scenario_ids), len(set(scenario_ids))
    rows = np.arange(pairs)
    if groups > 1:
        parts = GroupKFold(n_splits=min(MAX_FOLDS, groups)).split(rows, groups=list(scenario_ids))
        return Folds("scenario", tuple(parts))
    if pairs > 1:
        return Folds("pair", tuple(KFold(n_splits=min(MAX_FOLDS, pairs)).split(rows)))
    return Folds("pair", ())


def cross_validated(train: PairReadouts, folds: Folds) -> tuple[Floats, Floats]:
    """Distance of each train text from the threshold of the fold that leaves its pair out.

    A fold's direction is the mean difference of its other pairs, and its threshold the midpoint of their class means;
    the distance makes the folds comparable with each other.

    Returns:
        (N,) float64 of the positive and of the negative texts, in units of the residual stream.

    Raises:
        StudyError: a fold's readouts give no direction.
    """
    positive_N, negative_N = np.zeros(len(train.positive_ND)), np.zeros(len(train.negative_ND))
    for fitted, held_out in folds.parts:
        positive_N[held_out], negative_N[held_out] = project_held_out(rows_of(train, fitted), rows_of(train, held_out))
    return positive_N, negative_N


def project_held_out(fitted: PairReadouts, held_out: PairReadouts) -> tuple[Floats, Floats]:
    """Projections of held-out texts on the mean difference of others, minus the midpoint of the others' class means.

    Raises:
        StudyError: the readouts give no direction.
    """
    direction_D = mean_difference(fitted).astype(np.float64)
    sides = (fitted.positive_ND, fitted.negative_ND, held_out.positive_ND, held_out.negative_ND)
    made_positive, made_negative, positive_N, negative_N = (
        np.asarray(side, dtype=np.float64) @ direction_D for side in sides
    )
    threshold = (made_positive.mean() + made_negative.mean()) / 2
    return positive_N - threshold, negative_N - threshold


def choose_layer(
    by_layer: Mapping[int, PairReadouts], texts: TextSides, scenario_ids: Sequence[str]
) -> tuple[int, LayerChoice]:
    """Choose the layer whose mean difference separates train pairs that did not make it best.

    Args:
        by_layer: layer -> readouts of the train pairs at the block read for it; at least one layer.
        texts: the same pairs' texts.
        scenario_ids: their scenarios.

    Raises:
        ValidationError: `by_layer` is empty.
        StudyError: the readouts give no direction.
    """
    if not by_layer:
        raise ValidationError("There are no layers to choose from; extract at least one layer.")
    folds = make_folds(scenario_ids)
    if not folds.parts:
        return min(by_layer), LayerChoice(folds.grouped_by, 0, {}, {}, None)
    held_out = {layer: cross_validated(train, folds) for layer, train in by_layer.items()}
    aurocs = {layer: estimate_auroc(*sides) for layer, sides in held_out.items()}
    separations = {layer: float(separation_in_stds(*sides)) for layer, sides in held_out.items()}
    best = max(by_layer, key=lambda layer: (aurocs[layer].auroc, separations[layer], -layer))
    return best, LayerChoice(
        grouped_by=folds.grouped_by,
        folds=len(folds.parts),
        aurocs=aurocs,
        separations_in_stds={layer: value if math.isfinite(value) else None for layer, value in separations.items()},
        bag_of_words=_by_words(texts, folds),
    )


def _by_words(texts: TextSides, folds: Folds) -> AurocEstimate:
    scores = WordScores(np.zeros(len(texts.positive)), np.zeros(len(texts.negative)))
    for fitted, held_out in folds.parts:
        part = score_by_words(choose_texts(texts, fitted), choose_texts(texts, held_out))
        scores.positive_N[held_out], scores.negative_N[held_out] = part.positive_N, part.negative_N
    return estimate_auroc(scores.positive_N, scores.negative_N)
