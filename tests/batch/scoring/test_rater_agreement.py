"""Judges, people and keywords of one run: through the commands to `agreement.json`, the scores and the report."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batch_jobs.cli.main import main
from batch_jobs.errors import StudyError
from batch_jobs.rows.store import SCHEMA, read_rows
from batch_jobs.run.run_directory import RunDirectory
from batch_jobs.scoring.agreement import Estimate
from batch_jobs.scoring.judgements import raters
from batch_jobs.scoring.paper_metric import keyword_grade
from batch_jobs.scoring.rater_agreement import (
    agreement_lines,
    estimate_text,
    rater_agreement,
    read_agreement,
    write_agreement,
)
from batch_jobs.scoring.scores_csv import read_scores
from batch_jobs.texts.contrastive import load_scenarios, write_scenarios
from tests.batch.report.test_page import outline
from tests.batch.scoring.test_judge import answer_of, write_completions
from tests.batch.scoring.test_judgements import write_grades
from tests.support.server.fake_endpoint import Answer, FakeEndpoint, fake_endpoint, said
from tests.support.synthetic_run import demo_rows, write_run

KIND_TEXT, COLD_TEXT = "I help and listen.", "I win."


def graded(request: dict[str, Any]) -> Answer:
    """`kind` sees a 2 in every "sorry"; `strict` only in those that want to help, and never grades 1."""
    text = answer_of(request)
    if request["model"] == "kind":
        return said("2" if "sorry" in text or "help" in text else "0")
    return said("2" if "want to help" in text else "1" if "sorry" in text else "0")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[FakeEndpoint]:
    with fake_endpoint(graded) as fake:
        yield fake


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    rows = demo_rows()
    for row in rows[1::7]:
        row["finish_reason"] = row["finish_reason"] and "length"
    write_run(tmp_path, rows)
    for number, part in enumerate(sorted((tmp_path / "generations").rglob("part-*.parquet"))):
        # with every column, as a study writes them
        half = rows[: len(rows) // 2] if number == 0 else rows[len(rows) // 2 :]
        whole = [{"started_at": datetime.now(UTC), "thought": None} | row for row in half]
        pq.write_table(pa.Table.from_pylist(whole, schema=SCHEMA), part)
    write_scenarios(tmp_path / "scenarios.json", load_scenarios(None).values())
    return RunDirectory(tmp_path)


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["vllm-steer", "study", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def without_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing the figures takes ten seconds, and one test reads the report."""
    monkeypatch.setattr("batch_jobs.report.page.write_report", lambda folder: folder / "report.html")


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_judges_and_a_person_from_the_commands_to_the_report(
    run: RunDirectory, endpoint: FakeEndpoint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    both = ["--endpoint", f"strict@{endpoint.url}/v1", "--endpoint", f"kind@{endpoint.url}/v1"]
    assert command(monkeypatch, "judge", run.path, *both) == 0
    told = capsys.readouterr().out
    assert f"104 graded, 0 there before, 0 without a grade: {run.judgements / 'strict.jsonl'}" in told
    assert f"104 graded, 0 there before, 0 without a grade: {run.judgements / 'kind.jsonl'}" in told
    assert told.count("14 rows judged by what there is: sampling.max_tokens cut their completions off") == 2

    sheet = run.path.parent / "sheet.csv"
    assert command(monkeypatch, "labels", run.path, "--template", sheet, "--sample", 30) == 0
    with sheet.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 30
    with sheet.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(row | {"grade": str(2 if "sorry" in row["text"] else 0)} for row in rows)
    assert command(monkeypatch, "labels", run.path, sheet, "--name", "alice") == 0
    assert "30 labels of alice" in capsys.readouterr().out

    assert command(monkeypatch, "score", run.path) == 0
    *lines, report = capsys.readouterr().out.splitlines()
    assert report == str(run.report)
    assert any(line.startswith("kind (judge, the outcome): 104 rows") for line in lines)
    agreement = read_agreement(run.agreement)
    assert lines == agreement_lines(agreement)
    assert [rater.name for rater in agreement.raters] == ["alice", "kind", "strict", "keywords"]
    assert {rater.name: rater.rows for rater in agreement.raters} == {
        "alice": 30, "kind": 104, "strict": 104, "keywords": 104
    }  # fmt: skip
    assert agreement.raters[1].cut_off == 14
    pairs = {(pair.first, pair.second): pair for pair in agreement.pairs}
    assert len(pairs) == 6
    assert pairs["alice", "kind"].rows == 30
    assert [group.raters for group in agreement.groups] == [
        ("alice", "kind", "strict"),
        ("alice", "kind", "strict", "keywords"),
    ]
    page = run.report.read_text(encoding="utf-8")
    assert "by the rater kind" in page
    assert outline(page).unbalanced == []
    table = re.sub(r"<[^>]+>", " ", page[page.index("Agreement of raters") :])
    assert f"alice, kind 30 {pairs['alice', 'kind'].equal:.2f}" in " ".join(table.split())
    means = [row.mean_grade for row in read_scores(run.scores).conditions]

    without_report(monkeypatch)
    assert command(monkeypatch, "score", run.path, "--judge", "strict") == 0
    assert [row.mean_grade for row in read_scores(run.scores).conditions] != means
    # the choice stays
    assert command(monkeypatch, "score", run.path) == 0
    assert read_agreement(run.agreement).outcome == "strict"
    assert command(monkeypatch, "score", run.path, "--judge", "nobody") == 2
    assert "there are alice, kind, strict" in capsys.readouterr().err


def test_grades_outside_the_run_leave_it_unchanged_until_it_is_scored_with_them(
    run: RunDirectory, endpoint: FakeEndpoint, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "second.jsonl"
    without_report(monkeypatch)
    before = snapshot(run.path)
    assert command(monkeypatch, "judge", run.path, "--endpoint", f"kind@{endpoint.url}/v1", "--out", elsewhere) == 0
    assert snapshot(run.path) == before
    assert raters(run) == ()
    assert command(monkeypatch, "score", run.path, "--grades", elsewhere) == 0
    assert read_agreement(run.agreement).outcome == "second"
    assert any(row.mean_grade is not None for row in read_scores(run.scores).conditions)
    assert command(monkeypatch, "score", run.path) == 0
    assert not run.agreement.exists()
    assert all(row.mean_grade is None for row in read_scores(run.scores).conditions)


def test_a_study_s_own_frame_and_that_of_a_file_are_asked(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run.write_provenance({"config": {"concept": {"name": "formality", "judge": "Formal? {answer} {none}{some}{full}"}}})
    frame = run.path.parent / "frame.txt"
    with fake_endpoint(lambda _: said("1")) as fake:
        options = [run.path, "--endpoint", f"j@{fake.url}/v1"]
        assert command(monkeypatch, "judge", *options) == 0
        assert all(request["messages"][0]["content"].startswith("Formal? ") for request in fake.requests)
        frame.write_text("Polite? {answer}", encoding="utf-8")
        fake.requests.clear()
        assert command(monkeypatch, "judge", *options, "--name", "polite", "--frame", frame) == 0
        assert all(request["messages"][0]["content"].startswith("Polite? ") for request in fake.requests)
        frame.write_text("Polite?", encoding="utf-8")
        fake.requests.clear()
        assert command(monkeypatch, "judge", *options, "--name", "polite", "--frame", frame) == 2
    assert not fake.requests
    assert "it lacks {answer}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--name", "a", "--name", "b"], "Got 2 names for 1 endpoints"),
        (["--endpoint", "j@http://127.0.0.1:9/v1"], "Two judges are named j"),
        (["--endpoint", "k@http://127.0.0.1:9/v1", "--out", "x.jsonl"], "one --endpoint"),
        (["--name", "../x"], "cannot be named"),
    ],
)
def test_options_that_name_no_file_for_each_judge_are_refused(
    run: RunDirectory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    fault: str,
) -> None:
    assert command(monkeypatch, "judge", run.path, "--endpoint", "j@http://127.0.0.1:9/v1", *options) == 2
    assert fault in capsys.readouterr().err


def test_labels_needs_one_thing_to_do(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "labels", run.path) == 2
    assert "one of the two" in capsys.readouterr().err
    assert command(monkeypatch, "score", run.path, "--judge", "a", "--grades", "b.jsonl") == 2
    assert "give one of them" in capsys.readouterr().err


def test_agreement_counts_the_rows_that_both_graded_and_those_that_are_still_there(tmp_path: Path) -> None:
    texts = {"r1": KIND_TEXT, "r2": COLD_TEXT, "r3": "Hm.", "r4": KIND_TEXT}
    run = RunDirectory(tmp_path)
    write_completions(tmp_path, texts)
    write_grades(run.judgements / "a.jsonl", "a", r1=2, r2=0, r3=0, gone=2)
    write_grades(run.judgements / "b.jsonl", "b", r1=2, r2=1, r4=None)
    got = rater_agreement(run.generations, raters(run), "a")
    assert [keyword_grade(text) for text in texts.values()] == [2, 0, 1, 2]
    assert {rater.name: (rater.rows, rater.grades) for rater in got.raters} == {
        "a": (3, (2, 0, 1)),
        "b": (2, (0, 1, 1)),
        "keywords": (4, (1, 1, 2)),
    }
    rows = {(pair.first, pair.second): (pair.rows, pair.equal) for pair in got.pairs}
    assert rows == {("a", "b"): (2, 0.5), ("a", "keywords"): (3, pytest.approx(2 / 3)), ("b", "keywords"): (2, 0.5)}
    # grade 2 or not: a and the keywords agree in all three rows
    assert next(pair for pair in got.pairs if pair.second == "keywords").kappa_full.value == 1.0
    assert [group.rows for group in got.groups] == [2, 3]


def test_raters_without_keywords_are_compared_with_each_other_alone(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    write_completions(tmp_path, {"r1": KIND_TEXT, "r2": COLD_TEXT})
    write_grades(run.judgements / "a.jsonl", "a", r1=2, r2=0)
    alone = rater_agreement(run.generations, raters(run), "a", None)
    assert (alone.pairs, alone.groups) == ((), ())
    write_grades(run.judgements / "b.jsonl", "b", r1=2, r2=0)
    two = rater_agreement(run.generations, raters(run), "a", None)
    assert [(pair.first, pair.second) for pair in two.pairs] == [("a", "b")]
    assert [group.raters for group in two.groups] == [("a", "b")]


def test_raters_with_no_common_row_have_nothing_to_agree_on(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    write_completions(tmp_path, {"r1": KIND_TEXT, "r2": COLD_TEXT})
    write_grades(run.judgements / "a.jsonl", "a", r1=2)
    write_grades(run.judgements / "b.jsonl", "b", r2=0)
    got = rater_agreement(run.generations, raters(run), None)
    assert (got.pairs[0].rows, got.pairs[0].equal, got.pairs[0].kappa.value) == (0, None, None)
    assert any("no common rows, Cohen's κ undefined" in line for line in agreement_lines(got))
    write_agreement(run.agreement, got)
    assert read_agreement(run.agreement) == got


def test_a_file_of_something_else_is_no_agreement(tmp_path: Path) -> None:
    (tmp_path / "agreement.json").write_text('{"outcome": null, "raters": 3}', encoding="utf-8")
    with pytest.raises(StudyError, match=r"field raters: .*score the run again"):
        read_agreement(tmp_path / "agreement.json")


def test_an_estimate_is_shown_with_its_interval() -> None:
    assert estimate_text(Estimate(0.614, 0.4, 0.75)) == "0.61 [0.40, 0.75]"
    assert estimate_text(Estimate(1.0, None, None)) == "1.00"
    assert estimate_text(Estimate(None, None, None)) == "undefined"


def test_the_rows_of_this_file_s_run_are_those_of_a_study(run: RunDirectory) -> None:
    assert read_rows(run.generations).num_rows == len(demo_rows())
