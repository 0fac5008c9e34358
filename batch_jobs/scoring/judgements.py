"""The grades that judges and people gave to a run's completions, one file each, and which of them is the outcome.

`judgements/<name>.jsonl` holds the grades of one rater. A run of an earlier version has one judge, in
`judgements.jsonl` beside that folder; it is read under the name of its model. The outcome is the first judge by name,
or the rater in `judgements/outcome.json`, which `study score --judge NAME` writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from batch_jobs.errors import StudyError
from batch_jobs.files.atomic import write_atomically
from batch_jobs.files.documents import read_json
from batch_jobs.files.json_lines import read_records
from batch_jobs.rows.store import model_slug
from batch_jobs.run.run_directory import RunDirectory

GRADES: Final = (0, 1, 2)
JUDGE: Final = "judge"
HUMAN: Final = "human"
KEYWORDS: Final = "keywords"
"""Name and kind of the keywords' verdict among the raters."""
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_OUTCOME: Final = "outcome.json"


@dataclass(frozen=True)
class Rater:
    """A judge or a person, and the file of the grades."""

    name: str
    kind: Literal["judge", "human"]
    model: str | None
    """The judge's model; None for a person, or where no call was answered."""
    path: Path


def rater_name(given: str) -> str:
    """`given`, checked: it becomes the name of a file.

    Raises:
        StudyError: another character than a letter, digit, dot, dash or underscore, or the name of the keywords.
    """
    if not _NAME.fullmatch(given) or given == KEYWORDS:
        raise StudyError(
            f"A judge or rater cannot be named {given!r}; use up to 100 letters, digits, dots, dashes and underscores, "
            f"beginning with a letter or digit, and not {KEYWORDS!r}."
        )
    return given


def judge_name(model: str) -> str:
    """The name of a judge that was given none: its model's, made fit for a file's name."""
    return rater_name(model_slug(model).lstrip("._-"))


def raters(run: RunDirectory) -> tuple[Rater, ...]:
    """The raters of a run, by name.

    Raises:
        StudyError: a file of grades is malformed; the message names it.
    """
    found = {path.stem: _rater(path.stem, path) for path in run.judgements.glob("*.jsonl")}
    if run.earlier_judgements.exists():
        earlier = _rater(run.earlier_judgements.stem, run.earlier_judgements)
        name = earlier.name if earlier.model is None else judge_name(earlier.model)
        name = earlier.name if name in found else name
        found.setdefault(name, Rater(name, earlier.kind, earlier.model, earlier.path))
    return tuple(found[name] for name in sorted(found))


def external_rater(run: RunDirectory, path: Path) -> Rater:
    """The rater of a file of grades outside the run, named after the file: with its ending where a rater of the run has
    the name.

    Raises:
        StudyError: the file is absent or holds something else, or cannot give a name.
    """
    grades_in(path)
    name = path.name if any(rater.name == path.stem for rater in raters(run)) else path.stem
    return _rater(rater_name(name), path)


def grades_path(run: RunDirectory, name: str) -> Path:
    """The file for the grades of the rater of this name; that of an earlier version goes on being used."""
    known = {rater.name: rater.path for rater in raters(run)}
    return known.get(name, run.judgements / f"{name}.jsonl")


def outcome_rater(run: RunDirectory) -> Rater | None:
    """Whose grades are the outcome: the chosen rater, else the first judge by name, else nobody.

    Raises:
        StudyError: the chosen rater's grades are gone, or a file is malformed.
    """
    known = {rater.name: rater for rater in raters(run)}
    choice = run.judgements / _OUTCOME
    if not choice.exists():
        return next((rater for rater in known.values() if rater.kind == JUDGE), None)
    document = read_json(choice, advice="choose again with study score --judge NAME")
    name = document.get("rater") if isinstance(document, dict) else None
    return _known(known, name, f"{choice} names")


def choose_outcome(run: RunDirectory, name: str) -> Rater:
    """Record that this rater's grades are the outcome.

    Raises:
        StudyError: the run has no such rater.
    """
    chosen = _known({rater.name: rater for rater in raters(run)}, name, "got")
    write_atomically(run.judgements / _OUTCOME, json.dumps({"rater": name}) + "\n")
    return chosen


def read_grades(run: RunDirectory) -> dict[str, int]:
    """Row id -> grade 0, 1 or 2 of the outcome's rater; empty where there is none.

    Raises:
        StudyError: as `outcome_rater`.
    """
    chosen = outcome_rater(run)
    return {} if chosen is None else grades_in(chosen.path)


def grades_in(path: Path) -> dict[str, int]:
    """Read one file of grades: row id -> grade 0, 1 or 2. The last line of a row counts.

    Rows recorded without a grade are absent.

    Raises:
        StudyError: the file is absent or holds something else.
    """
    if not path.is_file():
        raise StudyError(f"There are no judgements at {path}; make them first, or give the file's path.")
    grades: dict[str, int] = {}
    for record in read_records(path):
        row_id, grade = grade_of(record, path)
        if grade is None:
            grades.pop(row_id, None)
        else:
            grades[row_id] = grade
    return grades


def grade_of(record: Mapping[str, Any], path: Path) -> tuple[str, int | None]:
    """Row id and grade of a record of the file `path`.

    Raises:
        StudyError: it is no judgement.
    """
    row_id, grade = record.get("row_id"), record.get("grade")
    if not isinstance(row_id, str) or grade not in (None, *GRADES) or isinstance(grade, bool | float):
        raise StudyError(f"{path}: {record!r} is not a judgement; it needs a row_id and a grade of 0, 1, 2 or null.")
    return row_id, grade


def _rater(name: str, path: Path) -> Rater:
    records = read_records(path)
    if any(record.get("kind") == HUMAN for record in records):
        return Rater(name, HUMAN, None, path)
    models = [str(record["model"]) for record in records if record.get("model") is not None]
    graded = [str(record["model"]) for record in records if record.get("grade") is not None and record.get("model")]
    return Rater(name, JUDGE, next(reversed(graded or models), None), path)


def _known(known: Mapping[str, Rater], name: object, told: str) -> Rater:
    if isinstance(name, str) and name in known:
        return known[name]
    there = f"there are {', '.join(known)}" if known else "there are none yet: run study judge first"
    raise StudyError(f"No judge or rater of that name has graded this run: {told} {name!r}; {there}.")
