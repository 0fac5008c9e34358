"""Whatever ends a call of a judge, no row is settled by anything but a grade for the present question."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from batch_jobs.endpoint.chat import EndpointError
from batch_jobs.files.json_lines import read_records
from batch_jobs.scoring.judge import (
    BROKEN_OFF,
    FILTERED,
    NO_COMPLETION,
    NOT_ASKED,
    OUT_OF_TOKENS,
    JudgeSummary,
)
from batch_jobs.scoring.judgements import grades_in
from batch_jobs.texts.contrastive import Scenario, write_scenarios
from tests.batch.scoring.test_judge import SCENARIOS, answer_of, judge, write_completions
from tests.support.server.fake_endpoint import Answer, fake_endpoint, said

OTHER = {"duel": Scenario("duel", "Duel", "Win the duel.", "Someone cries.", (), ("a", "b", "c"))}
EMPTY: dict[str, list[str]] = {"choices": []}


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (lambda: said("1", "length"), OUT_OF_TOKENS),
        (lambda: said("2", "max_tokens"), OUT_OF_TOKENS),
        (lambda: said("<think>1 or", "length"), OUT_OF_TOKENS),
        (lambda: said("1", "length", reasoning_content="It is 1 or"), OUT_OF_TOKENS),
        (lambda: said("1", "abort"), BROKEN_OFF),
        (lambda: said("1", "error"), BROKEN_OFF),
        (lambda: said("1", "content_filter"), FILTERED),
        (lambda: Answer({"choices": [{"finish_reason": "content_filter"}]}), FILTERED),
        (lambda: said("<think>2</think>", "stop"), "answered with something else than one digit"),
        (
            lambda: said([{"type": "thinking", "thinking": [{"type": "text", "text": "2"}]}]),
            "reply ended inside its thought",
        ),
        (lambda: Answer(EMPTY), NO_COMPLETION),
        (lambda: Answer(b'{"choices": [{"mess'), NO_COMPLETION),
    ],
)
def test_a_reply_that_is_no_whole_answer_is_no_grade_and_stops_nothing(
    tmp_path: Path, failure: Callable[[], Answer], reason: str
) -> None:
    generations, out = write_completions(tmp_path, {"r1": "I run.", "r2": "I stay."}), tmp_path / "grades.jsonl"
    with fake_endpoint(lambda request: failure() if answer_of(request) == "I run." else said("2")) as fake:
        assert judge(fake, generations, out).reasons == {reason: 1}
    assert grades_in(out) == {"r2": 2}
    with fake_endpoint(lambda _: said("1")) as fake:
        assert judge(fake, generations, out) == JudgeSummary(1, 1, {}, {})
    assert [answer_of(request) for request in fake.requests] == ["I run."]


@pytest.mark.parametrize(
    "failure",
    [
        lambda: Answer({"error": "busy"}, 429),
        lambda: Answer({"error": "down"}, 500),
        lambda: Answer({"error": "down"}, 522),
        lambda: Answer({"error": {"code": 429, "message": "busy"}}),  # as gateways send it, with status 200
        lambda: Answer({"error": "no key"}, 401),
        lambda: Answer({"error": "gone"}, 404),
        lambda: Answer(b"not gzip", 200, {"Content-Encoding": "gzip"}),
        lambda: Answer({}, 429, {"Retry-After": "3600"}),
    ],
)
def test_a_call_that_fails_settles_no_row_and_no_earlier_question_answers_for_it(
    tmp_path: Path, failure: Callable[[], Answer]
) -> None:
    generations, out = write_completions(tmp_path, {"r1": "I run.", "r2": "I stay."}), tmp_path / "grades.jsonl"
    with fake_endpoint(lambda _: said("2")) as fake:
        judge(fake, generations, out)
    with fake_endpoint(lambda _: failure()) as fake, pytest.raises(EndpointError):
        judge(fake, generations, out, scenarios=OTHER)
    assert grades_in(out) == {}
    assert {record["reason"] for record in read_records(out)[2:]} == {NOT_ASKED}
    with fake_endpoint(lambda _: said("0")) as fake:
        assert judge(fake, generations, out, scenarios=OTHER).graded == 2
    assert grades_in(out) == {"r1": 0, "r2": 0}


def test_no_server_settles_no_row(tmp_path: Path) -> None:
    generations, out = write_completions(tmp_path, {"r1": "I run."}), tmp_path / "grades.jsonl"
    with fake_endpoint(lambda _: said("2")) as gone:
        judge(gone, generations, out)
    with pytest.raises(EndpointError, match="ConnectError"):
        judge(gone, generations, out, scenarios=OTHER)
    assert grades_in(out) == {}
    with fake_endpoint(lambda _: said("1")) as fake:
        assert judge(fake, generations, out).reused == 1
    assert not fake.requests
    assert grades_in(out) == {"r1": 2}


def test_a_failure_after_the_reminder_settles_nothing(tmp_path: Path) -> None:
    generations, out = write_completions(tmp_path, {"r1": "I run."}), tmp_path / "grades.jsonl"
    replies = iter([said("Two."), Answer({}, 503), Answer({}, 503)])
    with fake_endpoint(lambda _: next(replies)) as fake, pytest.raises(EndpointError, match="503"):
        judge(fake, generations, out)
    assert grades_in(out) == {}
    with fake_endpoint(lambda request: said("Two.") if len(request["messages"]) == 1 else said("2", "length")) as fake:
        assert judge(fake, generations, out).reasons == {OUT_OF_TOKENS: 1}
    assert grades_in(out) == {}


def test_an_empty_refusal_is_none(tmp_path: Path) -> None:
    generations, out = write_completions(tmp_path, {"r1": "I run."}), tmp_path / "grades.jsonl"
    with fake_endpoint(lambda _: said("2", refusal="")) as fake:
        assert judge(fake, generations, out).graded == 1


def test_a_digit_in_a_part_beside_the_thought_is_a_grade(tmp_path: Path) -> None:
    generations, out = write_completions(tmp_path, {"r1": "I run."}), tmp_path / "grades.jsonl"
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "0?"}]}, {"type": "text", "text": "1"}]
    with fake_endpoint(lambda _: said(parts)) as fake:
        assert judge(fake, generations, out).graded == 1
    assert grades_in(out) == {"r1": 1}


def test_an_address_that_is_no_chat_endpoint_is_not_asked_for_every_row(tmp_path: Path) -> None:
    generations = write_completions(tmp_path, {f"r{number:03d}": "text" for number in range(100)})
    with (
        fake_endpoint(lambda _: Answer(b"<html>Welcome</html>")) as fake,
        pytest.raises(EndpointError, match=r"no chat completion but.*Welcome.*nothing was graded"),
    ):
        judge(fake, generations, tmp_path / "grades.jsonl")
    assert len(fake.requests) <= 8 + 3 * 2


def test_completions_that_the_study_cut_off_are_judged_and_counted(tmp_path: Path) -> None:
    generations = write_completions(tmp_path, {"r1": "I run, and then", "r2": "I stay."})
    cut = write_completions(tmp_path, {"x1": "I wait, and", "x2": None}, finish_reason="length", name="cut")
    assert cut == generations
    out = tmp_path / "grades.jsonl"
    with fake_endpoint(lambda _: said("1")) as fake:
        assert judge(fake, generations, out) == JudgeSummary(3, 0, {}, {}, cut_off=1)
        assert judge(fake, generations, out) == JudgeSummary(0, 3, {}, {}, cut_off=1)


def test_a_judge_killed_in_the_middle_loses_no_grade_and_settles_no_other_row(tmp_path: Path) -> None:
    """SIGKILL to the real command while calls are in flight, and the last line cut short as by a kill mid-write."""
    texts = {f"r{number}": f"I take {number} steps." for number in range(8)}
    generations, out = write_completions(tmp_path, texts), tmp_path / "judgements" / "big-judge.jsonl"
    write_scenarios(tmp_path / "scenarios.json", SCENARIOS.values())
    held = threading.Event()

    def answer(request: dict[str, object]) -> Answer:
        if any(f"I take {number} steps" in str(request) for number in range(4, 8)):
            held.wait(60)
        return said("2")

    with fake_endpoint(answer) as fake:
        command = [sys.executable, "-c", "from batch_jobs.cli.main import main; main()", "study", "judge"]
        options = ["--endpoint", f"big-judge@{fake.url}/v1", "--concurrency", "4"]
        child = subprocess.Popen([*command, str(tmp_path), *options], env=dict(os.environ), stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 60
            while (not out.exists() or len(read_records(out)) < 4) and time.monotonic() < deadline:
                time.sleep(0.05)
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
            held.set()
    lines = out.read_bytes().splitlines(keepends=True)
    assert len(lines) == 4
    out.write_bytes(b"".join(lines[:3]) + lines[3][:-5])
    assert len(grades_in(out)) == 3
    with fake_endpoint(lambda _: said("1")) as fake:
        assert judge(fake, generations, out, model="big-judge") == JudgeSummary(5, 3, {}, {})
    assert sorted(grades_in(out).values()) == [1] * 5 + [2] * 3
