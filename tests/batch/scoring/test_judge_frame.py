from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from batch_jobs.errors import StudyError
from batch_jobs.files.json_lines import read_records
from batch_jobs.scoring.judge_frame import DEFAULT_FRAME, JudgeFrame, frame_of_run
from batch_jobs.scoring.judgements import grades_in
from batch_jobs.texts.contrastive import Scenario
from tests.batch.scoring.test_judge import SCENARIOS, judge, write_completions
from tests.support.server.fake_endpoint import fake_endpoint, said

PLAIN = "Rate {answer} in {situation}: 0 {none}, 1 {some}, 2 {full}. A JSON of yours, {{}}, is not read."
NO_RUBRIC = {"duel": Scenario("duel", "Duel", "Win the duel.", "Someone cries.", ())}


@pytest.mark.parametrize(("completion", "digest"), [("I run.", "c80d0889a98f75d5"), ("", "976503200b002230")])
def test_the_built_in_question_is_the_one_that_earlier_grades_answer(completion: str, digest: str) -> None:
    """The digests were stored with grades before frames could be chosen."""
    question = JudgeFrame().question(SCENARIOS["duel"], completion)
    assert hashlib.sha256(question.encode()).hexdigest()[:16] == digest


def test_a_frame_is_filled_and_braces_of_texts_stay() -> None:
    question = JudgeFrame(PLAIN).question(SCENARIOS["duel"], "I say {full} {x}.")
    assert question == (
        "Rate I say {full} {x}. in Win the duel.\n\nSomeone cries.: 0 passes by, 1 nods, 2 stops to help. "
        "A JSON of yours, {}, is not read."
    )


@pytest.mark.parametrize(
    ("frame", "fault"),
    [
        ("Grade {text}.", "it holds {text}"),
        ("Grade {}: {answer}", "it holds {}"),
        ("Grade {answer.x}.", "it holds {answer.x}"),
        ("Grade {answer!r}.", "{answer} has a format"),
        ("Grade {answer:>9}.", "{answer} has a format"),
        ("Grade this.", "it lacks {answer}"),
        ("{answer}: 0 {none}, 2 {full}", "it has {none} without {some}"),
        ('Reply {"grade": 1} to {answer}', 'it holds {"grade"}'),
        ("{answer} } and", "it cannot be read"),
        ("{answer} {", "it cannot be read"),
    ],
)
def test_a_wrong_frame_is_refused_in_one_line(frame: str, fault: str) -> None:
    with pytest.raises(StudyError) as caught:
        JudgeFrame(frame)
    assert str(caught.value).startswith(f"The judge's frame is wrong: {fault}")
    assert "{situation}, {answer}, {none}, {some}, {full}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_frame_costs_no_call(tmp_path: Path) -> None:
    generations, out = write_completions(tmp_path, {"r1": "I run."}), tmp_path / "grades.jsonl"
    with fake_endpoint(lambda _: said("1")) as fake, pytest.raises(StudyError, match="frame is wrong"):
        judge(fake, generations, out, frame="Grade this.")
    assert not fake.requests
    assert not out.exists()


def test_a_frame_with_its_own_rubric_needs_none_from_the_scenario(tmp_path: Path) -> None:
    generations, out = write_completions(tmp_path, {"r1": "I run."}), tmp_path / "grades.jsonl"
    own = "0: informal, 1: mixed, 2: formal. {answer}"
    with fake_endpoint(lambda _: said("2")) as fake:
        assert judge(fake, generations, out, scenarios=NO_RUBRIC, frame=own).graded == 1
        assert fake.requests[0]["messages"][0]["content"] == "0: informal, 1: mixed, 2: formal. I run."
        with pytest.raises(StudyError, match="no completion that can be judged; no rubric for duel"):
            judge(fake, generations, out, scenarios=NO_RUBRIC)


def test_grades_of_one_frame_do_not_stand_for_another_and_come_back_with_it(tmp_path: Path) -> None:
    generations, out = write_completions(tmp_path, {"r1": "I run.", "r2": "I stay."}), tmp_path / "grades.jsonl"
    with fake_endpoint(lambda request: said("0" if "Rate" in str(request) else "2")) as fake:
        judge(fake, generations, out)
        assert grades_in(out) == {"r1": 2, "r2": 2}
        assert judge(fake, generations, out, frame=PLAIN).graded == 2
        assert grades_in(out) == {"r1": 0, "r2": 0}
        fake.requests.clear()
        assert judge(fake, generations, out, frame=DEFAULT_FRAME).reused == 2
    assert not fake.requests
    assert grades_in(out) == {"r1": 2, "r2": 2}


def test_rows_that_a_frame_cannot_ask_about_keep_no_grade_of_another_one(tmp_path: Path) -> None:
    write_completions(tmp_path, {"x1": "Hm."}, scenario="maze")
    generations, out = write_completions(tmp_path, {"r1": "I run."}), tmp_path / "grades.jsonl"
    scenarios = SCENARIOS | {"maze": Scenario("maze", "Maze", "Get out.", "Someone is lost.", ())}
    own = "0, 1 or 2? {answer}"
    with fake_endpoint(lambda _: said("1")) as fake:
        judge(fake, generations, out, scenarios=scenarios, frame=own)
        assert set(grades_in(out)) == {"r1", "x1"}
        judge(fake, generations, out, scenarios=scenarios)
        assert set(grades_in(out)) == {"r1"}
        length = len(read_records(out))
        judge(fake, generations, out, scenarios=scenarios)
        assert len(read_records(out)) == length
        fake.requests.clear()
        judge(fake, generations, out, scenarios=scenarios, frame=own)
    assert not fake.requests
    assert set(grades_in(out)) == {"r1", "x1"}


def test_a_study_states_its_frame_in_its_concept() -> None:
    assert frame_of_run({"config": {"concept": {"name": "formality", "judge": "{answer}?"}}}) == "{answer}?"
    for document in ({}, {"config": {"concept": "empathy"}}, {"config": {"concept": {"name": "formality"}}}):
        assert frame_of_run(document) is None
