"""Correlate a run's projections with behaviour by layer and direction, and store the result in `behaviour.json`.

The projection is that of the unsteered model reading the completion (`projection_unsteered`). The projection of the
generated span is not usable where α is not 0: it is read after steering and contains α itself, so it would correlate
with any effect of α, whether or not the text shows one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pydantic

from batch_jobs.files.atomic import write_atomically
from batch_jobs.files.documents import read_json
from batch_jobs.scoring.behaviour import BehaviourPoints
from batch_jobs.scoring.correlation import (
    BehaviouralCorrelation,
    Correlation,
    CorrelationError,
    behavioural_correlation,
    condition_correlation,
)
from batch_jobs.statistics.partial_correlation import PartialCorrelation, partial_correlation

MAX_POINTS = 400
"""Points kept per layer and direction for the scatter plot. The coefficients use all points."""


@dataclass(frozen=True)
class BehaviourPoint:
    """One point of the scatter plot."""

    projection: float
    grade: int
    alpha: float


@dataclass(frozen=True)
class DirectionBehaviour:
    """Correlation of the projections on one direction at one layer with the grades of the texts."""

    layer: int
    direction: str
    graded_by: Literal["judge", "keywords", "both"]
    """`both`: the judge's grade where there is one, the keywords' grade elsewhere."""
    left_out: int
    """Completions without a projection: empty ones, or all where the run did not read its completions again."""
    within_conditions: PartialCorrelation
    """The headline: r of projection and grade given α and scenario (and op and span), whose cells are the conditions.
    Clusters of the interval are the scenarios' seeds; without seeds, every completion is one."""
    samples: BehaviouralCorrelation
    """One point per completion, over all α. α moves projection and grade both, so this r is that of α to a large part.
    Completions of one condition are not independent, so p is too small."""
    unsteered_samples: BehaviouralCorrelation
    """As `samples`, but α = 0 only, which excludes steered and possibly broken text."""
    conditions: Correlation
    """One point per condition: mean projection against mean grade."""
    points: tuple[BehaviourPoint, ...]
    """At most MAX_POINTS of the completions, drawn at random, in the run's order."""


def direction_behaviours(points: BehaviourPoints, *, seed: int = 0) -> tuple[DirectionBehaviour, ...]:
    """Correlate by layer and direction; the results are ordered by both.

    `points`: of one model. `seed`: draws the points that are kept.

    Raises:
        CorrelationError: there is a grade other than 0, 1, 2.
    """
    keys = sorted(set(zip(points.layer.tolist(), points.direction.tolist(), strict=True)))
    return tuple(
        _direction_behaviour(points, layer, name, (points.layer == layer) & (points.direction == name), seed)
        for layer, name in keys
    )


def write_behaviour(path: Path, behaviours: Sequence[DirectionBehaviour]) -> None:
    """Write `{"directions": [...]}` as JSON, atomically."""
    document = {"directions": [asdict(behaviour) for behaviour in behaviours]}
    write_atomically(path, json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_behaviour(path: Path) -> tuple[DirectionBehaviour, ...]:
    """Read a file of `write_behaviour`.

    Raises:
        CorrelationError: the file is absent or malformed; the message names it.
    """
    if not path.exists():
        raise CorrelationError(f"There is no behaviour file {path}; score the run's generations first.")
    document = read_json(path, advice="score the run's generations again", error=CorrelationError)
    if not isinstance(document, dict) or "directions" not in document:
        raise CorrelationError(f"{path} lacks the list 'directions'; score the run's generations again.")
    try:
        return _BEHAVIOURS.validate_python(document["directions"])
    except pydantic.ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in fault["loc"])
        raise CorrelationError(
            f"{path}: field directions.{place}: {fault['msg']}; score the run's generations again."
        ) from error


_BEHAVIOURS = pydantic.TypeAdapter(tuple[DirectionBehaviour, ...])


def _direction_behaviour(
    points: BehaviourPoints, layer: int, direction: str, chosen: npt.NDArray[np.bool_], seed: int
) -> DirectionBehaviour:
    used = np.flatnonzero(chosen & np.isfinite(points.projection_unsteered))
    projections, grades, alphas = points.projection_unsteered[used], points.grade[used], points.alpha[used]
    baseline = alphas == 0.0
    seeds = points.seed[used].tolist()
    clusters = [
        (scenario, index if math.isnan(seed) else seed, math.isnan(seed))
        for index, (scenario, seed) in enumerate(zip(points.scenario[used].tolist(), seeds, strict=True))
    ]
    judged = points.judged[chosen]
    conditions = list(zip(points.scenario[used], points.op[used], points.span[used], alphas.tolist(), strict=True))
    drawn = np.arange(len(used))
    if len(drawn) > MAX_POINTS:
        drawn = np.sort(np.random.default_rng(seed).choice(drawn, MAX_POINTS, replace=False))
    return DirectionBehaviour(
        layer=layer,
        direction=direction,
        graded_by="judge" if judged.all() else "both" if judged.any() else "keywords",
        left_out=int(chosen.sum()) - len(used),
        within_conditions=partial_correlation(projections, grades, conditions, clusters),
        samples=behavioural_correlation(projections, grades),
        unsteered_samples=behavioural_correlation(projections[baseline], grades[baseline]),
        conditions=condition_correlation(projections, grades, conditions),
        points=tuple(BehaviourPoint(float(projections[row]), int(grades[row]), float(alphas[row])) for row in drawn),
    )
