"""Projection and behaviour of every completion, side by side: the points of the behavioural correlation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from batch_jobs.rows.generation_parts import COLUMN_TYPES, GROUP_COLUMNS, answered, part_paths, read_part
from batch_jobs.scoring.paper_metric import keyword_grade

Floats = npt.NDArray[np.float64]
Strings = npt.NDArray[np.object_]
"""str in each entry."""
_COLUMNS = [*GROUP_COLUMNS, "alpha", "projection_unsteered", "projection_generated"]


@dataclass(frozen=True)
class BehaviourPoints:
    """One entry a completion, N of them, in the order of the parts. Rows with an error, and those that ended inside a
    thought, are left out."""

    model: Strings
    layer: npt.NDArray[np.int32]
    scenario: Strings
    direction: Strings
    op: Strings
    span: Strings
    alpha: Floats
    projection_unsteered: Floats
    """Projection when the unsteered model reads the completion, in units of the residual stream; NaN where it was not
    computed."""
    projection_generated: Floats
    """Projection during generation, after steering; NaN where none was read."""
    grade: npt.NDArray[np.int8]
    """0, 1 or 2. The judge's where it has one, else by keywords: 0 more task words, 1 a tie, 2 more empathy words."""
    judged: npt.NDArray[np.bool_]
    """Whether the grade is the judge's."""


def behaviour_points(folder: Path, grades: Mapping[str, int] | None = None) -> BehaviourPoints:
    """The points of all completions under a folder of generations, one part's texts in memory at a time.

    `grades`: row id -> a judge's 0, 1 or 2. Raises ScoreError, naming the part, when one cannot be read or lacks a
    column.
    """
    grades = grades or {}
    numbers: list[pa.Table] = []
    grade: list[int] = []
    judged: list[bool] = []
    for part in part_paths(folder):
        for table in read_part(part):
            usable = answered(table)
            for row_id, text in zip(usable["row_id"].to_pylist(), usable["completion"].to_pylist(), strict=True):
                given = grades.get(row_id)
                judged.append(given is not None)
                grade.append(keyword_grade(text) if given is None else given)
            numbers.append(usable.select(_COLUMNS))
    points = pa.concat_tables([pa.schema([(name, COLUMN_TYPES[name]) for name in _COLUMNS]).empty_table(), *numbers])
    return BehaviourPoints(
        # nulls of a float column become NaN
        **{name: points[name].to_numpy() for name in _COLUMNS},
        grade=np.array(grade, dtype=np.int8),
        judged=np.array(judged, dtype=np.bool_),
    )
