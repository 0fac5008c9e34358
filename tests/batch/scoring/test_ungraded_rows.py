"""Rows without a grade: counted by reason, and judged again by the next call. Also thoughts before a grade."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from batch_jobs.cli.main import main
from batch_jobs.files.json_lines import read_records
from batch_jobs.scoring.judge import (
    DECLINED,
    FILTERED,
    MAX_REPLY_TOKENS,
    NO_DIGIT,
    OUT_OF_TOKENS,
    REFUSED,
    JudgeSummary,
)
from batch_jobs.scoring.judgements import grades_in
from batch_jobs.texts.contrastive import Scenario, write_scenarios
from tests.batch.scoring.test_judge import SCENARIOS, answer_of, judge, write_completions
from tests.support.server.fake_endpoint import Answer, fake_endpoint, said


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (lambda: said(None, "length"), OUT_OF_TOKENS),
        (lambda: said("<think>The agent ran, so", "length"), OUT_OF_TOKENS),
        (lambda: said("<think>The agent ran: 2", "stop"), "reply ended inside its thought"),
        (lambda: said("The agent ran.</think>", "length"), OUT_OF_TOKENS),
        (lambda: said(None, "length", reasoning_content="The agent ran, so"), OUT_OF_TOKENS),
        (lambda: said("", reasoning="The agent ran, so 2"), "reply ended inside its thought"),
        (lambda: said(None, "content_filter"), FILTERED),
        (lambda: said(None, refusal="I will not grade this."), DECLINED),
        (lambda: said("\ud83d"), "reply has no UTF-8 form (half of a surrogate pair)"),
        (lambda: said("two"), NO_DIGIT),
        (lambda: Answer({"error": "too long"}, 413), REFUSED),
    ],
)
def test_a_row_without_a_grade_is_counted_by_its_reason_and_asked_again_by_the_next_call(
    tmp_path: Path, failure: Callable[[], Answer], reason: str
) -> None:
    generations = write_completions(tmp_path, {"r1": "I run.", "r2": "I stay."})
    out = tmp_path / "judgements.jsonl"
    with fake_endpoint(lambda request: failure() if answer_of(request) == "I run." else said("2")) as fake:
        summary = judge(fake, generations, out)
    assert (summary.graded, summary.reused, summary.reasons) == (1, 0, {reason: 1})
    assert grades_in(out) == {"r2": 2}
    with fake_endpoint(lambda _: said("1")) as fake:
        assert judge(fake, generations, out) == JudgeSummary(1, 1, {}, {})
    assert [answer_of(request) for request in fake.requests] == ["I run."]
    assert grades_in(out) == {"r1": 1, "r2": 2}


def test_rows_that_an_earlier_version_recorded_without_a_grade_are_asked_again(tmp_path: Path) -> None:
    generations, out = write_completions(tmp_path, {"r1": "I run."}), tmp_path / "judgements.jsonl"
    with fake_endpoint(lambda _: said("2")) as fake:
        judge(fake, generations, out)
        (record,) = read_records(out)
        out.write_text(json.dumps(record | {"grade": None, "reply": ""}) + "\n", encoding="utf-8")
        assert judge(fake, generations, out).graded == 1
    assert grades_in(out) == {"r1": 2}


def test_a_grade_of_an_earlier_question_does_not_stand_for_one_that_got_none(tmp_path: Path) -> None:
    generations, out = write_completions(tmp_path, {"r1": "I run."}), tmp_path / "judgements.jsonl"
    other = {"duel": Scenario("duel", "Duel", "Win the duel.", "Someone cries.", (), ("a", "b", "c"))}
    with fake_endpoint(lambda request: said("2") if "passes by" in str(request) else Answer({}, 400)) as fake:
        judge(fake, generations, out)
        assert judge(fake, generations, out, scenarios=other).reasons == {REFUSED: 1}
    assert grades_in(out) == {}


@pytest.mark.parametrize("reply", ["<think>It ran: 0 or 1.</think>\n\n1", "It ran: 0 or 1.\n</think>\n\n1", " 1 "])
def test_the_grade_is_what_follows_the_thought(tmp_path: Path, reply: str) -> None:
    generations, out = write_completions(tmp_path, {"r1": "I run."}), tmp_path / "judgements.jsonl"
    with fake_endpoint(lambda _: said(reply)) as fake:
        assert judge(fake, generations, out).graded == 1
    assert len(fake.requests) == 1
    assert grades_in(out) == {"r1": 1}


def test_a_thought_that_the_server_splits_off_is_no_part_of_the_answer(tmp_path: Path) -> None:
    generations, out = write_completions(tmp_path, {"r1": "I run."}), tmp_path / "judgements.jsonl"
    with fake_endpoint(lambda _: said("1", reasoning_content="0? No: 1.", reasoning="0? No: 1.")) as fake:
        assert judge(fake, generations, out).graded == 1
    assert grades_in(out) == {"r1": 1}


def test_a_reply_has_room_for_a_thought_unless_told_otherwise(tmp_path: Path) -> None:
    generations = write_completions(tmp_path, {"r1": "I run."})
    with fake_endpoint(lambda _: said("1")) as fake:
        judge(fake, generations, tmp_path / "a.jsonl")
        judge(fake, generations, tmp_path / "b.jsonl", max_tokens=4096)
    assert [request["max_tokens"] for request in fake.requests] == [MAX_REPLY_TOKENS, 4096]
    assert MAX_REPLY_TOKENS >= 1024


def test_what_ended_inside_a_thought_is_not_judged(tmp_path: Path) -> None:
    generations = write_completions(tmp_path, {"r1": None, "r2": "I stay."})
    with fake_endpoint(lambda _: said("2")) as fake:
        assert judge(fake, generations, tmp_path / "judgements.jsonl").graded == 1
    assert [answer_of(request) for request in fake.requests] == ["I stay."]


def test_the_command_says_what_has_no_grade_and_fails_until_all_have_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_completions(tmp_path, {"r1": "I run.", "r2": "I wait.", "r3": "I stay."})
    write_scenarios(tmp_path / "scenarios.json", SCENARIOS.values())
    command = ["vllm-steer", "study", "judge", str(tmp_path), "--max-tokens", "2000", "--endpoint"]
    with fake_endpoint(lambda request: said("2") if answer_of(request) == "I stay." else said(None, "length")) as fake:
        monkeypatch.setattr(sys, "argv", [*command, f"judge@{fake.url}/v1"])
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 1
    first, reason, last = capsys.readouterr().out.splitlines()
    assert first.startswith("1 graded, 0 there before, 2 without a grade: ")
    assert reason.startswith("2 rows cut off by the token limit before a grade, e.g. r")
    assert last.startswith("2 rows have no grade. Run the same command again")
    assert {request["max_tokens"] for request in fake.requests} == {2000}
    with fake_endpoint(lambda _: said("1")) as fake:
        monkeypatch.setattr(sys, "argv", [*command, f"judge@{fake.url}/v1"])
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("2 graded, 1 there before, 0 without a grade: ")


def test_a_few_rows_that_are_always_refused_do_not_end_a_call_where_others_were_graded(tmp_path: Path) -> None:
    texts: dict[str, str | None] = {"fine": "I stay."} | {f"r{number:02d}": "filtered" for number in range(12)}
    generations, out = write_completions(tmp_path, texts), tmp_path / "judgements.jsonl"
    with fake_endpoint(lambda request: said("1") if answer_of(request) == "I stay." else Answer({}, 400)) as fake:
        judge(fake, generations, out)
        assert judge(fake, generations, out).reasons == {REFUSED: 12}


def test_a_judge_that_graded_nothing_leaves_the_file_to_another_one(tmp_path: Path) -> None:
    generations, out = write_completions(tmp_path, {"r1": "I run."}), tmp_path / "judgements.jsonl"
    with fake_endpoint(lambda request: said("?" if request["model"] == "mute" else "2")) as fake:
        assert judge(fake, generations, out, model="mute").graded == 0
        assert judge(fake, generations, out, model="better").graded == 1
    assert grades_in(out) == {"r1": 2}
