"""An optional second opinion on completions: a chat model grades each 0, 1 or 2 by its scenario's rubric.

The paper's scorer counts words; a judge reads the text. The judge is a model too, so each grade is stored with the
model's name and a hash of the exact question. `judgements` reads the grades of all judges of a run.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from batch_jobs.config.study import StudyError
from batch_jobs.endpoint.chat import NO_UTF8_FORM, ChatClient, ChatReply, NoCompletion, RequestRefused
from batch_jobs.endpoint.parallel_calls import parallel_calls
from batch_jobs.files.json_lines import RecordWriter, read_records
from batch_jobs.rows.store import read_rows
from batch_jobs.scoring.judge_frame import JudgeFrame
from batch_jobs.scoring.judgements import GRADES, HUMAN, grade_of
from batch_jobs.texts.contrastive import Scenario

MAX_REPLY_TOKENS = 1024
"""Allows a thought before the digit. A model that does not think stops after the digit."""
REFUSED_AT_START = 8
"""Judging stops after this many failed requests before the first grade: the endpoint cannot be used at all."""

# reasons for a row without a grade
OUT_OF_TOKENS = "cut off by the token limit before a grade"
NO_DIGIT = "answered with something else than one digit"
FILTERED = "stopped by a content filter"
DECLINED = "declined by the model"
REFUSED = "refused by the endpoint"
NO_COMPLETION = "answered with something else than a chat completion"
BROKEN_OFF = "broken off by the server"
NOT_ASKED = "not asked the present question yet"
"""Stored before a row is asked another question than the one that its grade answers."""

_REPLY_DIGITS = {str(grade): grade for grade in GRADES}
# finish reasons of replies that are not whole; some servers give none for those that are
_OUT_OF_TOKENS = frozenset({"length", "max_tokens"})
_BROKEN_OFF = frozenset({"abort", "aborted", "cancelled", "error"})

_REMINDER = "That was not a single digit. Reply with 0, 1 or 2 and nothing else."


@dataclass(frozen=True)
class Ungraded:
    """Why a row has no grade."""

    reason: str
    """One of a few fixed reasons, so that rows can be counted by reason."""
    detail: str
    """The reply of the model or its server."""


@dataclass(frozen=True)
class JudgeSummary:
    """Result of a call of `judge_rows`, in numbers of rows."""

    graded: int
    reused: int
    """Rows that an earlier call graded with the same model and question."""
    ungraded: dict[str, Ungraded]
    """Row id -> why this call got no grade. The next call asks again."""
    without_rubric: dict[str, int]
    """Scenario -> rows that could not be judged because the scenario is unknown or has no rubric."""
    cut_off: int = 0
    """Rows among those to judge whose completion was cut off by the study's `sampling.max_tokens`. They are judged by
    what there is."""

    @property
    def reasons(self) -> dict[str, int]:
        """Reason -> number of rows without a grade, most frequent first."""
        return dict(Counter(failure.reason for failure in self.ungraded.values()).most_common())


@dataclass(frozen=True)
class _Question:
    row_id: str
    text: str
    cut_off: bool

    @property
    def hash(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


@dataclass
class _Records:
    """What a judge's file holds."""

    grades: dict[tuple[str, str], int] = field(default_factory=dict)
    """(row id, question hash) -> grade in the last record of this row and question, where it has one."""
    last: dict[str, tuple[str, int | None]] = field(default_factory=dict)
    """Row id -> question hash and grade of its last record, which alone counts."""


def judge_rows(
    generations: Path,
    scenarios: Mapping[str, Scenario],
    client: ChatClient,
    out: Path,
    *,
    concurrency: int,
    console: Console,
    max_tokens: int = MAX_REPLY_TOKENS,
    frame: str | None = None,
) -> JudgeSummary:
    """Grade completions with a chat model at temperature 0.

    Only a bare digit after the thought, in a reply that was not cut off, counts as a grade. After a finished reply of
    another kind the judge is asked once more; then the row is recorded without a grade, with the reason. A row whose
    grade for the same model and question is in `out` is not asked again, so an interrupted call resumes where it
    stopped. Rows without a grade are asked again. Rows without a completion are skipped.

    A row's last line in `out` answers the question of the last call: before a row is asked another question, a line
    without a grade takes the place of its earlier one, so whatever ends the call, no grade stands for a question that
    it does not answer.

    Args:
        generations: folder of Parquet parts.
        scenarios: id -> scenario, whose rubric the judge applies.
        client: the judge.
        out: JSONL file to append to, one line per row.
        concurrency: requests at a time.
        console: shows the progress.
        max_tokens: tokens per reply, thought included.
        frame: the question, with the placeholders of `JudgeFrame`; None is its default.

    Raises:
        StudyError: there is nothing to judge, `frame` is wrong, or `out` holds another model's or a person's grades.
        EndpointError: the endpoint cannot be used. Earlier grades stay stored.
    """
    model = client.endpoint.model
    asked = JudgeFrame() if frame is None else JudgeFrame(frame)
    stored = _read(out, model)
    questions, without_rubric = _questions(generations, scenarios, asked)
    pending = [question for question in questions if (question.row_id, question.hash) not in stored.grades]
    ungraded: dict[str, Ungraded] = {}
    graded = 0
    with RecordWriter(out) as file:
        for record in _put_in_force(stored, questions, model):
            file.append(record)
        answers = parallel_calls(partial(_ask, client, max_tokens), pending, workers=concurrency)
        for question, verdict in track(
            answers, f"Judging with {model}", len(pending), console=console, disable=not console.is_terminal
        ):
            if isinstance(verdict, int):
                graded += 1
                file.append(_record(question, model, verdict))
                continue
            ungraded[question.row_id] = verdict
            file.append(_record(question, model, None) | {"reason": verdict.reason, "reply": verdict.detail})
            # grades in the file prove that the endpoint works; the pending rows may be the few it always refuses
            if graded or stored.grades or len(ungraded) != REFUSED_AT_START:
                continue
            if {one.reason for one in ungraded.values()} <= {REFUSED, NO_COMPLETION}:
                raise RequestRefused(f"{verdict.detail} So were the first {REFUSED_AT_START}; nothing was graded.")
    cut_off = sum(question.cut_off for question in questions)
    return JudgeSummary(graded, len(questions) - len(pending), ungraded, without_rubric, cut_off)


def _read(out: Path, model: str) -> _Records:
    records = read_records(out)
    if any(record.get("kind") == HUMAN for record in records):
        raise StudyError(
            f"{out} holds people's labels, which must not be mixed with a judge's grades; give another name."
        )
    if others := {str(record.get("model")) for record in records if record.get("grade") is not None} - {model}:
        raise StudyError(
            f"{out} holds grades of {', '.join(sorted(others))}, which must not be mixed with those of {model}; give "
            "another name or another output file."
        )
    stored = _Records()
    for record in records:
        row_id, grade = grade_of(record, out)
        question = str(record.get("prompt_hash"))
        stored.last[row_id] = question, grade
        if grade is None:
            stored.grades.pop((row_id, question), None)
        else:
            stored.grades[row_id, question] = grade
    return stored


def _put_in_force(stored: _Records, questions: list[_Question], model: str) -> list[dict[str, Any]]:
    """Records to write before the first call, so that no row's last record answers another question.

    A grade that an earlier call got for the present question is repeated; any other one is replaced by none.
    """
    records = []
    for question in questions:
        known = stored.grades.get((question.row_id, question.hash))
        last = stored.last.get(question.row_id)
        if known is not None and last != (question.hash, known):
            records.append(_record(question, model, known))
        elif known is None and last is not None and last[1] is not None:
            records.append(_record(question, model, None) | {"reason": NOT_ASKED, "reply": ""})
    # rows that the present frame cannot ask about, for want of a rubric
    judged = {question.row_id for question in questions}
    for row_id, (_, grade) in stored.last.items():
        if row_id not in judged and grade is not None:
            blank = {"row_id": row_id, "grade": None, "model": model, "prompt_hash": None}
            records.append(blank | {"reason": NOT_ASKED, "reply": ""})
    return records


def _record(question: _Question, model: str, grade: int | None) -> dict[str, Any]:
    return {"row_id": question.row_id, "grade": grade, "model": model, "prompt_hash": question.hash}


def _questions(
    generations: Path, scenarios: Mapping[str, Scenario], frame: JudgeFrame
) -> tuple[list[_Question], dict[str, int]]:
    rows = read_rows(generations).select(["row_id", "scenario", "sample", "completion", "finish_reason"]).to_pylist()
    questions: list[_Question] = []
    without_rubric: dict[str, int] = {}
    for row in rows:
        if row["completion"] is None:
            continue
        scenario = scenarios.get(row["scenario"])
        if scenario is None or (frame.needs_rubric and scenario.rubric is None):
            without_rubric[row["scenario"]] = without_rubric.get(row["scenario"], 0) + 1
            continue
        text = frame.question(scenario, row["completion"], row["sample"])
        questions.append(_Question(row["row_id"], text, row["finish_reason"] == "length"))
    if not questions:
        lacking = f"; no rubric for {', '.join(without_rubric)}" if without_rubric else ""
        raise StudyError(f"{generations} holds no completion that can be judged{lacking}.")
    return questions, without_rubric


def _ask(client: ChatClient, max_tokens: int, question: _Question) -> int | Ungraded:
    messages = [{"role": "user", "content": question.text}]
    try:
        reply = client.complete(messages, temperature=0.0, max_tokens=max_tokens)
        verdict = _verdict(reply)
        if isinstance(verdict, Ungraded) and verdict.reason == NO_DIGIT:
            # the same question at temperature 0 would get the same answer
            messages += [{"role": "assistant", "content": reply.text or "…"}, {"role": "user", "content": _REMINDER}]
            verdict = _verdict(client.complete(messages, temperature=0.0, max_tokens=max_tokens))
    except RequestRefused as error:
        return Ungraded(REFUSED, str(error))
    except NoCompletion as error:
        return Ungraded(NO_COMPLETION, str(error))
    return verdict


def _verdict(reply: ChatReply) -> int | Ungraded:
    if reply.finish_reason == "content_filter":
        return Ungraded(FILTERED, reply.text)
    if reply.refusal is not None:
        return Ungraded(DECLINED, reply.refusal)
    if reply.fault == NO_UTF8_FORM:
        return Ungraded(f"reply {NO_UTF8_FORM}", "")
    if reply.finish_reason in _OUT_OF_TOKENS:
        # a digit here may be the beginning of "1 or 2"
        return Ungraded(OUT_OF_TOKENS, reply.text)
    if reply.finish_reason in _BROKEN_OFF:
        return Ungraded(BROKEN_OFF, reply.text)
    if reply.fault is None and reply.text in _REPLY_DIGITS:
        return _REPLY_DIGITS[reply.text]
    return Ungraded(f"reply {reply.fault}" if reply.fault else NO_DIGIT, reply.text)
