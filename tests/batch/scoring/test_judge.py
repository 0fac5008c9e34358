from __future__ import annotations

import io
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from batch_jobs.config.study import StudyError
from batch_jobs.endpoint.chat import ChatClient, EndpointError, RequestRefused
from batch_jobs.files.json_lines import read_records
from batch_jobs.rows.store import SCHEMA
from batch_jobs.scoring.judge import (
    NO_DIGIT,
    REFUSED,
    JudgeSummary,
    Ungraded,
    judge_rows,
)
from batch_jobs.scoring.judgements import grades_in
from batch_jobs.texts.contrastive import Scenario
from tests.support.server.fake_endpoint import Answer, FakeEndpoint, fake_endpoint, said

RUBRIC = ("passes by", "nods", "stops to help")
SCENARIOS = {"duel": Scenario("duel", "Duel", "Win the duel.", "Someone cries.", (), RUBRIC)}


def write_completions(
    folder: Path,
    completions: Mapping[str, str | None],
    scenario: str = "duel",
    name: str | None = None,
    **columns: Any,
) -> Path:
    """Write one Parquet part of these rows; every other required column holds a value of its type, or that in
    `columns`. `name`: of the part; None is the scenario's."""
    filler = {pa.string(): "-", pa.int32(): 0, pa.int64(): 0, pa.float64(): 0.0}
    blank = {column.name: None if column.nullable else filler.get(column.type, datetime.now(UTC)) for column in SCHEMA}
    blank |= {"scenario": scenario, **columns}
    rows = [blank | {"row_id": row_id, "completion": text} for row_id, text in completions.items()]
    part = folder / "generations" / f"part-{name or scenario}.parquet"
    part.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), part)
    return part.parent


def answer_of(request: dict[str, Any]) -> str:
    """The completion inside a judge's question."""
    return str(request["messages"][0]["content"]).partition("<answer>\n")[2].partition("\n</answer>")[0]


def graded_by_length(request: dict[str, Any]) -> Answer:
    return said(str(len(answer_of(request)) % 3))


def judge(
    fake: FakeEndpoint,
    generations: Path,
    out: Path,
    model: str = "judge",
    scenarios: Mapping[str, Scenario] = SCENARIOS,
    **options: Any,
) -> JudgeSummary:
    console = Console(file=io.StringIO())
    with ChatClient(fake.endpoint(model), max_attempts=2, sleep=lambda _: None) as client:
        return judge_rows(generations, scenarios, client, out, concurrency=3, console=console, **options)


def test_each_completion_is_graded_by_its_scenarios_rubric(tmp_path: Path) -> None:
    texts = {"r1": "I run.", "r2": "I wave, then run.", "r3": "I stay\nand listen {to} them."}
    generations, out = write_completions(tmp_path, texts), tmp_path / "judgements.jsonl"
    with fake_endpoint(graded_by_length) as fake:
        assert judge(fake, generations, out) == JudgeSummary(3, 0, {}, {})
    assert grades_in(out) == {name: len(text) % 3 for name, text in texts.items()}
    assert {answer_of(request) for request in fake.requests} == set(texts.values())
    for request in fake.requests:
        assert request["temperature"] == 0.0
        (message,) = request["messages"]
        for part in ("Win the duel.", "Someone cries.", "0: passes by", "1: nods", "2: stops to help"):
            assert part in message["content"]
    assert {record["model"] for record in read_records(out)} == {"judge"}
    assert len({record["prompt_hash"] for record in read_records(out)}) == 3


@pytest.mark.parametrize("reply", ["Grade: 2", "2, I think", "3", "", "two", "1 or 2", "²"])
def test_anything_but_a_digit_is_asked_about_once_and_then_left_without_a_grade(tmp_path: Path, reply: str) -> None:
    generations, out = write_completions(tmp_path, {"r1": "I run."}), tmp_path / "judgements.jsonl"
    with fake_endpoint(lambda _: said(reply)) as fake:
        assert judge(fake, generations, out) == JudgeSummary(0, 0, {"r1": Ungraded(NO_DIGIT, reply)}, {})
    assert [len(request["messages"]) for request in fake.requests] == [1, 3]
    assert fake.requests[1]["messages"][2]["content"].startswith("That was not a single digit.")
    (record,) = read_records(out)
    assert (record["grade"], record["reason"], record["reply"]) == (None, NO_DIGIT, reply)
    assert grades_in(out) == {}


def test_a_digit_after_the_reminder_counts(tmp_path: Path) -> None:
    generations, out = write_completions(tmp_path, {"r1": "I run."}), tmp_path / "judgements.jsonl"
    with fake_endpoint(lambda request: said("Two." if len(request["messages"]) == 1 else " 2\n")) as fake:
        assert judge(fake, generations, out).graded == 1
    assert grades_in(out) == {"r1": 2}


def test_a_second_call_asks_only_for_what_is_missing(tmp_path: Path) -> None:
    texts: dict[str, str | None] = {f"r{number}": f"I take {number} steps." for number in range(6)}
    generations, out = write_completions(tmp_path, texts), tmp_path / "judgements.jsonl"
    with fake_endpoint(graded_by_length) as fake:
        judge(fake, generations, out)
        whole = grades_in(out)
        lines = out.read_bytes().splitlines(keepends=True)
        out.write_bytes(b"".join(lines[:3]) + lines[3][:20])
        fake.requests.clear()
        assert judge(fake, generations, out) == JudgeSummary(3, 3, {}, {})
        assert len(fake.requests) == 3
        assert judge(fake, generations, out) == JudgeSummary(0, 6, {}, {})
    assert len(fake.requests) == 3
    assert grades_in(out) == whole


def test_another_rubric_is_another_question_and_its_grade_replaces_the_old_one(tmp_path: Path) -> None:
    generations, out = write_completions(tmp_path, {"r1": "I run."}), tmp_path / "judgements.jsonl"
    other = {"duel": Scenario("duel", "Duel", "Win the duel.", "Someone cries.", (), ("a", "b", "c"))}
    with fake_endpoint(lambda request: said("2" if "passes by" in str(request) else "1")) as fake:
        judge(fake, generations, out)
        assert judge(fake, generations, out, scenarios=other).graded == 1
    assert grades_in(out) == {"r1": 1}


def test_what_was_graded_before_an_endpoint_fails_is_kept(tmp_path: Path) -> None:
    texts: dict[str, str | None] = {f"r{number}": f"I take {number} steps." for number in range(9)}
    generations, out = write_completions(tmp_path, texts), tmp_path / "judgements.jsonl"
    with (
        fake_endpoint(lambda request: Answer({}, 500) if "6 steps" in str(request) else said("1")) as fake,
        pytest.raises(EndpointError, match="500"),
    ):
        judge(fake, generations, out)
    # rows come in the order of the file, three at a time
    assert {"r0", "r1", "r2", "r3"} <= set(grades_in(out)) <= set(texts) - {"r6"}


def test_rows_without_completion_or_rubric_are_left_out_and_counted(tmp_path: Path) -> None:
    write_completions(tmp_path, {"x1": "Hm.", "x2": "Ah."}, scenario="unknown")
    generations = write_completions(tmp_path, {"r1": None, "r2": ""})
    with fake_endpoint(lambda _: said("0")) as fake:
        summary = judge(fake, generations, tmp_path / "judgements.jsonl")
    assert summary == JudgeSummary(1, 0, {}, {"unknown": 2})
    assert [answer_of(request) for request in fake.requests] == ["(The agent says nothing.)"]


def test_nothing_to_judge_is_refused(tmp_path: Path) -> None:
    generations = write_completions(tmp_path, {"x1": "Hm."}, scenario="unknown")
    with (
        fake_endpoint(lambda _: said("0")) as fake,
        pytest.raises(StudyError, match="no completion that can be judged; no rubric for unknown"),
    ):
        judge(fake, generations, tmp_path / "judgements.jsonl")


def test_a_refused_row_is_reported_and_asked_again_next_time(tmp_path: Path) -> None:
    generations, out = write_completions(tmp_path, {"r1": "fine", "r2": "filtered"}), tmp_path / "judgements.jsonl"
    with fake_endpoint(lambda request: Answer({}, 400) if answer_of(request) == "filtered" else said("1")) as fake:
        summary = judge(fake, generations, out)
        assert (summary.graded, summary.reasons) == (1, {REFUSED: 1})
        assert "refused the request" in summary.ungraded["r2"].detail
        fake.requests.clear()
        assert set(judge(fake, generations, out).ungraded) == {"r2"}
    assert [answer_of(request) for request in fake.requests] == ["filtered"]


def test_an_endpoint_that_refuses_everything_is_not_asked_for_every_row(tmp_path: Path) -> None:
    texts: dict[str, str | None] = {f"r{number:03d}": "text" for number in range(200)}
    generations = write_completions(tmp_path, texts)
    with (
        fake_endpoint(lambda _: Answer({"error": "no such option"}, 400)) as fake,
        pytest.raises(RequestRefused, match=r"no such option.*nothing was graded"),
    ):
        judge(fake, generations, tmp_path / "judgements.jsonl")
    assert len(fake.requests) <= 8 + 3 * 2


def test_one_file_holds_one_judges_grades(tmp_path: Path) -> None:
    generations, out = write_completions(tmp_path, {"r1": "I run."}), tmp_path / "judgements.jsonl"
    with fake_endpoint(lambda _: said("1")) as fake:
        judge(fake, generations, out)
        with pytest.raises(StudyError, match=r"holds grades of judge.*another output file"):
            judge(fake, generations, out, model="stricter")


@pytest.mark.parametrize("line", ['{"row_id": "r1", "grade": 3}', '{"row_id": "r1", "grade": true}', '{"grade": 1}'])
def test_a_file_of_something_else_has_no_grades(tmp_path: Path, line: str) -> None:
    path = tmp_path / "judgements.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(StudyError, match="is not a judgement"):
        grades_in(path)
    with pytest.raises(StudyError, match="no judgements at"):
        grades_in(tmp_path / "none.jsonl")


def test_the_judge_reads_the_prompt_that_the_sample_had(tmp_path: Path) -> None:
    scenario = Scenario("duel", "Duel", "", "", (), RUBRIC, prompts=("Write now.", "Tell now."))
    generations, out = write_completions(tmp_path, {"r1": "I run."}), tmp_path / "judgements.jsonl"
    with fake_endpoint(graded_by_length) as fake:
        judge(fake, generations, out, scenarios={"duel": scenario})
    (request,) = fake.requests
    assert "<situation>\nWrite now.\n</situation>" in request["messages"][0]["content"]
