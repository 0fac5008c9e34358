"""Projection and grade of every completion: the points of the behavioural correlation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batch_jobs.rows.generation_parts import GROUP_COLUMNS, part_paths
from batch_jobs.scoring.compute_scores import decide
from batch_jobs.scoring.measures import measure_generations, no_measures
from batch_jobs.scoring.outcome import PAPER_OUTCOME, Outcome

Floats = npt.NDArray[np.float64]
Strings = npt.NDArray[np.object_]
"""Array of str."""
_NUMBERS = ("layer", "alpha", "projection_unsteered", "projection_generated")
_COLUMNS = (*GROUP_COLUMNS, "seed", *_NUMBERS[1:])


@dataclass(frozen=True)
class BehaviourPoints:
    """Arrays (N,) with one entry per completion, in the order of the parts.

    Rows that failed or ended inside a thought are left out; where the judge decides the outcome, so are those without
    its grade.
    """

    model: Strings
    layer: npt.NDArray[np.int32]
    scenario: Strings
    direction: Strings
    op: Strings
    span: Strings
    seed: Floats
    """Seed of the sample, as a number that tells seeds apart; NaN where the table has none."""
    alpha: Floats
    projection_unsteered: Floats
    """Projection when the unsteered model reads the completion, in units of the residual stream; NaN where it was not
    computed."""
    projection_generated: Floats
    """Projection during generation, after steering, in the same units; NaN where none was read."""
    grade: npt.NDArray[np.int8]
    """0, 1 or 2. The judge's grade where there is one, else by keywords: 0 more negative words, 1 as many of both,
    mostly none (no evidence), 2 more positive words."""
    judged: npt.NDArray[np.bool_]
    """Whether the judge gave the grade."""


def behaviour_points(
    folder: Path, grades: Mapping[str, int] | None = None, outcome: Outcome = PAPER_OUTCOME
) -> BehaviourPoints:
    """Collect the points of all completions under a folder of generations; see `points_of`.

    Args:
        folder: folder of Parquet parts.
        grades: row id -> a judge's 0, 1 or 2.
        outcome: grades the rows that the judge did not.

    Raises:
        ScoreError: a part cannot be read or lacks a column; the message names it.
    """
    measures = measure_generations(folder, {}, outcome=outcome) if part_paths(folder) else no_measures(outcome)
    return points_of(decide(measures, grades, outcome), outcome)


def points_of(measures: pa.Table, outcome: Outcome = PAPER_OUTCOME) -> BehaviourPoints:
    """The points of the rows of `batch_jobs.scoring.compute_scores.decide`, under the same outcome."""
    usable = pc.invert(pc.or_(measures["failed"], measures["in_thought"]))
    if outcome.judged:
        usable = pc.and_(usable, pc.is_valid(measures["grade"]))
    points = measures.select([*_COLUMNS, "grade", "word_grade"]).filter(usable)
    columns: dict[str, Any] = {name: _strings(points[name]) for name in GROUP_COLUMNS if name != "layer"}
    columns |= {name: points[name].to_numpy() for name in _NUMBERS}  # nulls of a float column become NaN
    return BehaviourPoints(
        **columns,
        seed=points["seed"].cast(pa.float64()).to_numpy(),  # seeds are below 2**31, so float64 holds them exactly
        grade=pc.coalesce(points["grade"], points["word_grade"]).to_numpy(),
        judged=pc.is_valid(points["grade"]).to_numpy(),
    )


def _strings(column: pa.ChunkedArray) -> Strings:
    """One Python string for each distinct value, not for each row."""
    encoded = column.combine_chunks().dictionary_encode()
    strings: Strings = np.array(encoded.dictionary.to_pylist(), dtype=object)[encoded.indices.to_numpy()]
    return strings
