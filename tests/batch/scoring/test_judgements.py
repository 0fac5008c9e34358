"""Several judges of a run, the one of an earlier version among them, and which of them is the outcome."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from batch_jobs.errors import StudyError
from batch_jobs.files.json_lines import RecordWriter, read_records
from batch_jobs.run.run_directory import RunDirectory
from batch_jobs.scoring.judgements import (
    choose_outcome,
    external_rater,
    grades_path,
    judge_name,
    outcome_rater,
    rater_name,
    raters,
    read_grades,
)
from tests.batch.scoring.test_judge import judge, write_completions
from tests.support.server.fake_endpoint import fake_endpoint, said


def write_grades(path: Path, model: str, **grades: int | None) -> Path:
    with RecordWriter(path) as file:
        for row_id, grade in grades.items():
            file.append({"row_id": row_id, "grade": grade, "model": model, "prompt_hash": "ab"})
    return path


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path)
    write_grades(run.judgements / "b.jsonl", "maker/b", r1=2)
    write_grades(run.judgements / "c.jsonl", "maker/c", r1=0)
    return run


def test_the_first_judge_by_name_is_the_outcome_until_one_is_chosen(run: RunDirectory) -> None:
    assert [(rater.name, rater.model) for rater in raters(run)] == [("b", "maker/b"), ("c", "maker/c")]
    assert read_grades(run) == {"r1": 2}
    choose_outcome(run, "c")
    assert read_grades(run) == {"r1": 0}
    write_grades(run.judgements / "a.jsonl", "maker/a", r1=1)
    assert read_grades(run) == {"r1": 0}
    choose_outcome(run, "a")
    assert read_grades(run) == {"r1": 1}


def test_a_person_is_the_outcome_only_when_chosen(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.judgements.mkdir()
    (run.judgements / "alice.jsonl").write_text(json.dumps({"row_id": "r1", "grade": 2, "kind": "human"}) + "\n")
    assert outcome_rater(run) is None
    assert read_grades(run) == {}
    assert choose_outcome(run, "alice").kind == "human"
    assert read_grades(run) == {"r1": 2}


def test_a_choice_that_is_not_there_is_named_with_those_that_are(run: RunDirectory) -> None:
    with pytest.raises(StudyError, match=r"got 'd'; there are b, c\."):
        choose_outcome(run, "d")
    choose_outcome(run, "c")
    (run.judgements / "c.jsonl").unlink()
    with pytest.raises(StudyError, match=r"outcome\.json names 'c'; there are b\."):
        read_grades(run)
    with pytest.raises(StudyError, match="run study judge first"):
        choose_outcome(RunDirectory(run.path / "other"), "c")


def test_the_file_of_an_earlier_version_is_a_judge_and_goes_on(tmp_path: Path) -> None:
    """Its grades stay settled under the name of its model; another judge has a file of its own."""
    run = RunDirectory(tmp_path)
    generations = write_completions(tmp_path, {"r1": "I run.", "r2": "I stay."})
    with fake_endpoint(lambda _: said("2")) as fake:
        judge(fake, generations, run.earlier_judgements, model="maker/old")
        fake.requests.clear()
        assert [(rater.name, rater.model) for rater in raters(run)] == [(judge_name("maker/old"), "maker/old")]
        assert read_grades(run) == {"r1": 2, "r2": 2}
        file = grades_path(run, judge_name("maker/old"))
        assert judge(fake, generations, file, model="maker/old").reused == 2
        assert not fake.requests
        judge(fake, generations, grades_path(run, "new"), model="new")
    assert [rater.name for rater in raters(run)] == [judge_name("maker/old"), "new"]
    assert len(read_records(run.earlier_judgements)) == 2


def test_a_name_is_fit_for_a_file() -> None:
    assert judge_name("gpt-4o") == "gpt-4o"
    assert judge_name("a/b") != judge_name("a-b")
    assert judge_name("模型")
    for name in ("a/b", "..", "", "-x", "keywords", "x" * 101, ".hidden"):
        with pytest.raises(StudyError, match="cannot be named"):
            rater_name(name)


def test_a_file_outside_the_run_is_a_rater_of_its_own(run: RunDirectory, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    assert external_rater(run, write_grades(elsewhere / "d.jsonl", "d", r1=1)).name == "d"
    assert external_rater(run, write_grades(elsewhere / "b.jsonl", "b", r1=1)).name == "b.jsonl"
    with pytest.raises(StudyError, match="no judgements at"):
        external_rater(run, elsewhere / "none.jsonl")


def test_overwriting_a_run_deletes_what_was_said_of_its_texts(run: RunDirectory) -> None:
    write_grades(run.earlier_judgements, "old", r1=1)
    run.agreement.write_text("{}")
    run.claim("key", {}, overwrite=True)
    assert not run.judgements.exists()
    assert not run.earlier_judgements.exists()
    assert not run.agreement.exists()
