"""Labels of people: a blinded sheet of completions to grade, and the import of the filled sheet as a rater's grades."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Mapping
from pathlib import Path

import pyarrow.compute as pc

from batch_jobs.errors import StudyError
from batch_jobs.files.atomic import write_atomically
from batch_jobs.files.documents import read_text
from batch_jobs.rows.store import read_rows
from batch_jobs.run.run_directory import RunDirectory
from batch_jobs.scoring.judge_frame import NO_ANSWER
from batch_jobs.scoring.judgements import GRADES, HUMAN, rater_name, raters
from batch_jobs.texts.contrastive import Scenario

SHEET_COLUMNS = ("row_id", "scenario", "situation", "rubric", "text", "grade")
"""Columns of the sheet; `grade` is empty. Row ids are digests, so nothing shows how a text was steered."""
# spreadsheets and data frames write whole numbers of a column with gaps as decimals
_GRADES = {f"{grade}{decimals}": grade for grade in GRADES for decimals in ("", ".0")}
_BYTE_ORDER_MARK = "\ufeff"
"""Spreadsheet programs write it, and read a file as UTF-8 if it is there."""


def write_sheet(path: Path, generations: Path, scenarios: Mapping[str, Scenario], *, sample: int, seed: int) -> int:
    """Write a CSV of completions in random order, for people to grade; returns its number of rows.

    Args:
        path: the file; must not exist, as it may hold somebody's work.
        generations: folder of Parquet parts.
        scenarios: id -> scenario, for the situation and the rubric.
        sample: rows to draw; all where there are fewer.
        seed: draws the rows and their order.

    Raises:
        StudyError: the file exists, or there is no completion.
    """
    if path.exists():
        raise StudyError(f"{path} exists and may hold labels; delete it, or give another path.")
    rows = read_rows(generations).select(["row_id", "scenario", "sample", "completion"])
    rows = rows.filter(pc.is_valid(rows["completion"])).sort_by("row_id").to_pylist()
    if not rows:
        raise StudyError(f"{generations} holds no completion to label.")
    drawn = random.Random(seed).sample(rows, min(sample, len(rows)))
    sheet = io.StringIO(newline="")
    writer = csv.DictWriter(sheet, SHEET_COLUMNS, restval="")
    writer.writeheader()
    for row in drawn:
        known = scenarios.get(row["scenario"])
        writer.writerow(
            {
                "row_id": row["row_id"],
                "scenario": row["scenario"],
                "situation": known.situation(row["sample"]) if known else "",
                "rubric": "\n".join(f"{grade}: {text}" for grade, text in enumerate((known and known.rubric) or ())),
                "text": row["completion"].strip() or NO_ANSWER,
            }
        )
    write_atomically(path, _BYTE_ORDER_MARK + sheet.getvalue())
    return len(drawn)


def import_labels(run: RunDirectory, labels: Path, name: str | None = None) -> dict[str, int]:
    """Store the labels of a CSV as grades of people, one file a person; returns the number of labels of each.

    A person's earlier labels are replaced. The columns are `row_id` and `grade` (0, 1 or 2; empty where there is no
    label) and, where the file holds several people's labels, `rater`; others are ignored. The file is read as a
    whole before anything is stored.

    Args:
        run: the run whose rows were labelled.
        labels: the CSV; commas or semicolons.
        name: the person, where the file has no column `rater`; else the file's name without its ending.

    Raises:
        StudyError: the file cannot be read or holds no label, a column is missing, a row id is not that of a row with
            a completion, a grade is another one, a row has two labels of one person, or a judge has the name.
    """
    rows = read_rows(run.generations).select(["row_id", "completion"])
    known = set(rows.filter(pc.is_valid(rows["completion"]))["row_id"].to_pylist())
    grades: dict[str, dict[str, int]] = {}
    for where, entry in _entries(labels, name):
        row_id, grade, rater = entry["row_id"], entry["grade"], _rater(entry["rater"], where)
        if row_id not in known:
            raise StudyError(f"{where}: {row_id!r} is not a row of {run.path} with a completion.")
        if not grade:
            continue
        if grade not in _GRADES:
            raise StudyError(f"{where}: the grade is {grade!r}; allowed: 0, 1, 2, or nothing for no label.")
        if row_id in grades.setdefault(rater, {}):
            raise StudyError(f"{where}: {row_id} has two labels of {rater}; leave one.")
        grades[rater][row_id] = _GRADES[grade]
    if not grades:
        raise StudyError(f"{labels} holds no label; fill the column grade with 0, 1 or 2.")
    judges = {rater.name for rater in raters(run) if rater.kind != HUMAN}
    if taken := sorted(judges & set(grades)):
        raise StudyError(f"{taken[0]} is a judge of {run.path}; give the rater another name.")
    for rater, given in grades.items():
        _write(run.judgements / f"{rater}.jsonl", rater, given)
    return {rater: len(given) for rater, given in grades.items()}


def _rater(name: str, where: str) -> str:
    try:
        return rater_name(name)
    except StudyError as error:
        raise StudyError(f"{where}: {error} Name the person with --name or in a column rater.") from error


def _entries(labels: Path, name: str | None) -> list[tuple[str, dict[str, str]]]:
    """Place and `row_id`, `grade`, `rater` of each line with any content, stripped."""
    text = read_text(labels, advice="give a CSV with the columns row_id and grade").removeprefix(_BYTE_ORDER_MARK)
    header = text.partition("\n")[0]
    reader = csv.DictReader(
        io.StringIO(text, newline=""), delimiter=";" if header.count(";") > header.count(",") else ",", strict=True
    )
    entries = []
    try:
        columns = [column.strip() for column in reader.fieldnames or ()]
        reader.fieldnames = columns
        if missing := [column for column in ("row_id", "grade") if column not in columns]:
            raise StudyError(f"{labels}: lacks the column {missing[0]}; its first line must name row_id and grade.")
        if name is not None and "rater" in columns:
            raise StudyError(f"{labels}: has a column rater, so the names are there; leave --name out.")
        for line in reader:
            given = {column: (line.get(column) or "").strip() for column in ("row_id", "grade", "rater")}
            if "rater" not in columns:
                given["rater"] = name or labels.stem
            if any((given["row_id"], given["grade"])):
                entries.append((f"{labels}: line {reader.line_num}", given))
    except csv.Error as error:
        raise StudyError(f"{labels}: line {reader.line_num}: not CSV ({error}).") from error
    return entries


def _write(path: Path, rater: str, grades: Mapping[str, int]) -> None:
    records = [{"row_id": row_id, "grade": grade, "rater": rater, "kind": HUMAN} for row_id, grade in grades.items()]
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in records))
