"""People's labels: the sheet they fill in, and what its import refuses."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from batch_jobs.errors import StudyError
from batch_jobs.files.json_lines import read_records
from batch_jobs.run.run_directory import RunDirectory
from batch_jobs.scoring.judgements import HUMAN, grades_in, raters
from batch_jobs.scoring.labels import import_labels, write_sheet
from tests.batch.scoring.test_judge import SCENARIOS, judge, write_completions
from tests.batch.scoring.test_judgements import write_grades
from tests.support.server.fake_endpoint import fake_endpoint, said

TEXTS: dict[str, str | None] = {f"r{number}": f'I take {number} "steps",\nthen rest; so.' for number in range(8)}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    write_completions(tmp_path, TEXTS | {"none": None, "mute": ""}, alpha=6.5)
    return RunDirectory(tmp_path)


def sheet_rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def labels(run: RunDirectory, content: str, name: str = "alice.csv") -> Path:
    path = run.path / name
    path.write_text(content, encoding="utf-8")
    return path


def test_the_sheet_is_blind_shuffled_and_comes_back_as_labels(run: RunDirectory) -> None:
    sheet = run.path / "sheet.csv"
    assert write_sheet(sheet, run.generations, SCENARIOS, sample=6, seed=0) == 6
    rows = sheet_rows(sheet)
    assert set(rows[0]) == {"row_id", "scenario", "situation", "rubric", "text", "grade"}
    for row in rows:
        assert row["text"] == (TEXTS.get(row["row_id"]) or "(The agent says nothing.)")
        assert row["rubric"] == "0: passes by\n1: nods\n2: stops to help"
        assert row["situation"] == "Win the duel.\n\nSomeone cries."
        assert row["grade"] == ""
    assert "6.5" not in sheet.read_text(encoding="utf-8")
    ids = [row["row_id"] for row in rows]
    assert ids != sorted(ids)
    with sheet.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(row | {"grade": number % 3 if number else ""} for number, row in enumerate(rows))
    assert import_labels(run, sheet, "alice") == {"alice": 5}
    assert grades_in(run.judgements / "alice.jsonl") == {row: number % 3 for number, row in enumerate(ids) if number}
    assert [rater.kind for rater in raters(run)] == [HUMAN]


def test_a_seed_draws_the_same_sheet_and_another_one_another(run: RunDirectory) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_sheet(run.path / name, run.generations, SCENARIOS, sample=100, seed=seed)
    a, b, c = ((run.path / name).read_bytes() for name in "abc")
    assert a == b != c
    assert {row["row_id"] for row in sheet_rows(run.path / "a")} == {*TEXTS, "mute"}


def test_a_sheet_that_may_be_filled_in_is_not_replaced(run: RunDirectory) -> None:
    write_sheet(run.path / "a.csv", run.generations, SCENARIOS, sample=3, seed=0)
    before = (run.path / "a.csv").read_bytes()
    with pytest.raises(StudyError, match="may hold labels"):
        write_sheet(run.path / "a.csv", run.generations, SCENARIOS, sample=3, seed=1)
    assert (run.path / "a.csv").read_bytes() == before


def test_what_spreadsheets_write_is_read(run: RunDirectory) -> None:
    """A byte order mark, semicolons, decimals, spaces, blank lines, and several raters in one file."""
    content = (
        "\ufeff row_id ;rater;grade;note\r\nr1;ann; 2 ;ok\r\nr1;ben;1.0;\r\nr2;ben;0;\r\n;;;\r\nr3;ann;;unsure\r\n"
    )
    assert import_labels(run, labels(run, content)) == {"ann": 1, "ben": 2}
    assert grades_in(run.judgements / "ann.jsonl") == {"r1": 2}
    assert grades_in(run.judgements / "ben.jsonl") == {"r1": 1, "r2": 0}


def test_labels_given_again_replace_the_earlier_ones_of_that_person(run: RunDirectory) -> None:
    import_labels(run, labels(run, "row_id,grade\nr1,2\nr2,0\n"))
    import_labels(run, labels(run, "row_id,grade\nr1,1\n"))
    assert grades_in(run.judgements / "alice.jsonl") == {"r1": 1}
    assert len(read_records(run.judgements / "alice.jsonl")) == 1


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("row_id,grade\nr1,2\nr9,1\n", r"line 3: 'r9' is not a row of .* with a completion"),
        ("row_id,grade\nnone,2\n", r"line 2: 'none' is not a row"),
        ("row_id,grade\nr1,3\n", r"line 2: the grade is '3'; allowed: 0, 1, 2"),
        ("row_id,grade\nr1,1.5\n", "the grade is '1.5'"),
        ("row_id,grade\nr1,yes\n", "the grade is 'yes'"),
        ("row_id,grade\nr1,1\nr2,0\nr1,1\n", "line 4: r1 has two labels of alice"),
        ("row_id,grade,rater\nr1,1,a b\n", "line 2: A judge or rater cannot be named 'a b'"),
        ("row_id,grade,rater\nr1,1,\n", "line 2: A judge or rater cannot be named ''"),
        ("row,grade\nr1,1\n", "lacks the column row_id"),
        ("row_id,label\nr1,1\n", "lacks the column grade"),
        ("", "lacks the column row_id"),
        ("row_id,grade\nr1,\n", "holds no label"),
        ('row_id,grade\nr1,"1\n', "not CSV"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line_and_nothing_is_stored(run: RunDirectory, content: str, fault: str) -> None:
    with pytest.raises(StudyError, match=fault) as caught:
        import_labels(run, labels(run, content))
    assert "\n" not in str(caught.value)
    assert not run.judgements.exists()


def test_a_name_beside_a_column_of_names_is_refused(run: RunDirectory) -> None:
    with pytest.raises(StudyError, match="leave --name out"):
        import_labels(run, labels(run, "row_id,grade,rater\nr1,1,ann\n"), "ben")


def test_people_and_judges_do_not_share_a_file(run: RunDirectory) -> None:
    write_grades(run.judgements / "alice.jsonl", "alice", r1=2)
    with pytest.raises(StudyError, match="alice is a judge"):
        import_labels(run, labels(run, "row_id,grade\nr1,1\n"))
    import_labels(run, labels(run, "row_id,grade\nr1,1\n"), "ben")
    with fake_endpoint(lambda _: said("1")) as fake, pytest.raises(StudyError, match="holds people's labels"):
        judge(fake, run.generations, run.judgements / "ben.jsonl")
    assert not fake.requests
