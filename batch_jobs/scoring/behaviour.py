"""Projection and grade of every completion: the points of the behavioural correlation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batch_jobs.rows.generation_parts import COLUMN_TYPES, GROUP_COLUMNS, answered, part_paths, read_part
from batch_jobs.scoring.outcome import PAPER_OUTCOME, Outcome

Floats = npt.NDArray[np.float64]
Strings = npt.NDArray[np.object_]
"""Array of str."""
_COLUMNS = [*GROUP_COLUMNS, "seed", "alpha", "projection_unsteered", "projection_generated"]


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
    """Collect the points of all completions under a folder of generations, with one part's texts in memory at a time.

    Args:
        folder: folder of Parquet parts.
        grades: row id -> a judge's 0, 1 or 2.
        outcome: grades the rows that the judge did not.

    Raises:
        ScoreError: a part cannot be read or lacks a column; the message names it.
    """
    grades = grades or {}
    numbers: list[pa.Table] = []
    grade: list[int] = []
    judged: list[bool] = []
    for part in part_paths(folder):
        for table in read_part(part):
            usable = answered(table)
            if outcome.judged:
                usable = usable.filter(pc.is_in(usable["row_id"], value_set=pa.array(list(grades), pa.string())))
            for row_id, text in zip(usable["row_id"].to_pylist(), usable["completion"].to_pylist(), strict=True):
                given = grades.get(row_id)
                judged.append(given is not None)
                grade.append(outcome.grade(text) if given is None else given)
            numbers.append(usable.select(_COLUMNS))
    points = pa.concat_tables([pa.schema([(name, COLUMN_TYPES[name]) for name in _COLUMNS]).empty_table(), *numbers])
    return BehaviourPoints(
        # nulls of a float column become NaN
        **{name: points[name].to_numpy() for name in _COLUMNS if name != "seed"},
        seed=points["seed"].cast(pa.float64()).to_numpy(),  # seeds are below 2**31, so float64 holds them exactly
        grade=np.array(grade, dtype=np.int8),
        judged=np.array(judged, dtype=np.bool_),
    )
