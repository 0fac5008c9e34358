"""A study whose run directory lies in an S3 server's bucket. The engine answers from a formula; the server is real."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from batch_jobs.cli.main import app
from batch_jobs.config.study import Study, StudyError
from batch_jobs.files import object_store
from batch_jobs.files.object_store import StoreError, StorePath
from batch_jobs.pipeline import RunOptions, StudyResult, run_study
from batch_jobs.rows.store import read_rows
from batch_jobs.run import driver_lock
from batch_jobs.run.open_run import open_run
from batch_jobs.run.run_directory import RunDirectory
from tests.support.formula_engine import FormulaEngine, install_for_studies, small_study
from tests.support.s3_server import S3Server
from tests.support.server.fake_endpoint import Answer, fake_endpoint, said
from vllm_steer.errors import SteerError

BLOCKS = 6
ROWS = 12


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FormulaEngine:
    # drawing the figures would take longer than everything else here
    for module in ("pipeline", "report.page"):
        monkeypatch.setattr(f"batch_jobs.{module}.write_report", fake_report)
    return install_for_studies(monkeypatch, BLOCKS)


def fake_report(run_dir: Path) -> Path:
    """Stands in for the report: a page and a figure without content."""
    (run_dir / "figures").mkdir(exist_ok=True)
    (run_dir / "figures" / "one.svg").write_text("<svg/>", encoding="utf-8")
    (run_dir / "report.html").write_text("<html></html>", encoding="utf-8")
    return run_dir / "report.html"


def make_study(**changes: Any) -> Study:
    return small_study(**{"rows_per_part": 4, "validation": {"random_directions": 10, "bootstrap": 100}, **changes})


def run(study: Study, place: str, **options: Any) -> StudyResult:
    given = RunOptions(**options)
    with open_run(place, drives=True, fetch=not given.overwrite) as directory:
        return run_study(study, directory, given, console=Console(quiet=True))


def rows_at(place: str) -> list[dict[str, Any]]:
    """The stored rows, without their times and how often they were tried."""
    with open_run(place) as directory:
        rows = read_rows(directory.generations).to_pylist()
    return sorted(
        ({name: value for name, value in row.items() if name not in ("started_at", "attempts")} for row in rows),
        key=lambda row: row["row_id"],
    )


def parts_at(place: str) -> dict[str, object]:
    return {name: state for name, state in StorePath.parse(place).files().items() if name.endswith(".parquet")}


@pytest.fixture
def undisturbed(engine: FormulaEngine, tmp_path: Path) -> list[dict[str, Any]]:
    run(make_study(), str(tmp_path / "local"))
    return rows_at(str(tmp_path / "local"))


def test_a_bucket_gets_the_files_that_a_folder_gets(engine: FormulaEngine, s3: S3Server, tmp_path: Path) -> None:
    place = s3.address("runs/demo")
    result = run(make_study(), place)
    assert (result.generated, result.reused, result.failed) == (ROWS, 0, 0)
    run(make_study(), str(tmp_path / "local"))
    stored = StorePath.parse(place)
    local = {path.relative_to(tmp_path / "local").as_posix() for path in (tmp_path / "local").rglob("*.*")}
    assert set(stored.files()) == local
    for name in ("scores.csv", "validation.json", "findings.json", "directions.safetensors"):
        assert (stored / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    assert b"</html>" in (stored / "report.html").read_bytes()
    assert rows_at(place) == rows_at(str(tmp_path / "local"))


def test_any_machine_finishes_what_is_missing_and_only_that(
    undisturbed: list[dict[str, Any]], engine: FormulaEngine, s3: S3Server
) -> None:
    place = s3.address("runs/demo")
    assert run(make_study(), place).generated == ROWS
    name, *_ = sorted(parts := parts_at(place))
    (StorePath.parse(place) / name).unlink()
    (StorePath.parse(place) / "validation.json").unlink()  # as if the extraction had been cut short
    engine.batches.clear()
    again = run(make_study(), place)
    assert (again.generated, again.reused) == (4, ROWS - 4)
    assert [len(batch) for batch in engine.generated] == [4]
    after = parts_at(place)
    assert after.keys() == parts.keys()
    assert {one: state for one, state in after.items() if one != name} == {
        one: state for one, state in parts.items() if one != name
    }
    assert rows_at(place) == undisturbed


def test_a_store_that_is_lost_in_the_middle_is_one_line_and_costs_nothing_that_was_stored(
    undisturbed: list[dict[str, Any]], engine: FormulaEngine, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "RETRY_SECONDS", ())
    place = s3.address("runs/demo")
    answer, is_lost = engine.answer, False

    def lose_the_store(prompt: Any, wanted: Any) -> Any:
        nonlocal is_lost
        if len(engine.generated) >= generated_before + 2 and not is_lost:
            is_lost = True
            s3.tell("stop")
        return answer(prompt, wanted)

    generated_before = len(engine.generated)
    monkeypatch.setattr(engine, "answer", lose_the_store)
    with pytest.raises(StoreError) as lost:
        run(make_study(), place)
    assert "\n" not in str(lost.value)
    assert str(lost.value).startswith("s3://studies/runs/demo/")
    assert str(lost.value).endswith("run the same command again when the store answers.")
    s3.tell("start")
    monkeypatch.setattr(engine, "answer", answer)
    kept = parts_at(place)
    assert 0 < len(kept) < ROWS // 4
    again = run(make_study(), place)
    assert again.generated == ROWS - 4 * len(kept)
    assert kept.items() <= parts_at(place).items()
    assert rows_at(place) == undisturbed


def test_another_study_is_refused_in_the_words_of_the_address_and_overwrites_on_request(
    engine: FormulaEngine, s3: S3Server
) -> None:
    place = s3.address("runs/demo")
    run(make_study(), place)
    (StorePath.parse(place) / "notes.txt").write_bytes(b"mine")
    with pytest.raises(StudyError, match=r"^s3://studies/runs/demo holds results of another study: seed: 0 -> 1"):
        run(make_study(seed=1), place)
    assert run(make_study(seed=1), place, overwrite=True).generated == ROWS
    assert len(parts_at(place)) == ROWS // 4, "no part of the first study is left"
    assert (StorePath.parse(place) / "notes.txt").read_bytes() == b"mine"


def test_a_second_driver_is_refused_before_it_works(
    engine: FormulaEngine, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver_lock, "BEAT_SECONDS", 1.1)
    place = s3.address("runs/demo")
    with open_run(place, drives=True), pytest.raises(StudyError, match="is in use by another driver"):
        run(make_study(), place)
    assert engine.batches == []
    assert parts_at(place) == {}


def test_rows_that_two_drivers_have_stored_under_different_parts_are_there_once_afterwards(
    undisturbed: list[dict[str, Any]], engine: FormulaEngine, s3: S3Server
) -> None:
    place, other = s3.address("runs/demo"), s3.address("runs/other")
    run(make_study(), place)
    run(make_study(rows_per_part=6), other)
    for name in parts_at(other):
        (StorePath.parse(place) / name).write_bytes((StorePath.parse(other) / name).read_bytes())
    again = run(make_study(), place)
    assert (again.generated, again.reused) == (0, ROWS)
    assert rows_at(place) == undisturbed
    stored = [row_id for name in parts_at(place) for row_id in _row_ids(StorePath.parse(place) / name)]
    assert len(stored) == len(set(stored)) == ROWS


def test_failed_rows_are_tried_again_on_request(
    undisturbed: list[dict[str, Any]], engine: FormulaEngine, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = s3.address("runs/demo")
    with monkeypatch.context() as patch:
        bad = undisturbed[0]["seed"]
        answer = engine.answer

        def fail(prompt: Any, wanted: Any) -> Any:
            if wanted.fields.get("seed") == bad:
                raise RuntimeError("injected")
            return answer(prompt, wanted)

        patch.setattr(engine, "answer", fail)
        failed = run(make_study(), place).failed
    assert failed > 0
    assert not [name for name in StorePath.parse(place).files() if name.startswith("attempts/")]
    assert run(make_study(), place, retry_failed=True).generated == failed
    assert {row["row_id"] for row in rows_at(place)} == {row["row_id"] for row in undisturbed}
    assert all(row["error"] is None for row in rows_at(place))


def test_nothing_of_the_address_query_and_of_the_credentials_is_stored_or_printed(
    engine: FormulaEngine, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = s3.address("runs/demo")
    config = tmp_path / "small.yaml"
    config.write_text(json.dumps(make_study().model_dump(mode="json")), encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["vllm-steer", "study", "run", str(config), f"--out={place}"])
    done = CliRunner().invoke(app, ["study", "run", str(config), f"--out={place}", "--quiet"])
    assert done.exit_code == 0, done.output
    assert "report       s3://studies/runs/demo/report.html" in done.output
    record = json.loads((StorePath.parse(place) / "provenance.json").read_bytes())
    assert record["command"] == f"vllm-steer study run {config} --out=s3://studies/runs/demo"
    texts = [done.output.encode(), *(_content(place, name) for name in StorePath.parse(place).files())]
    for secret in (b"endpoint_override", b"the-secret-of-the-test", b"AKIATESTING", str(s3.port).encode() + b"&"):
        assert not [text[:200] for text in texts if secret in text]
    assert b"vllm-steer-run-" not in done.output.encode(), "the working copy's folder is nobody's business"


def test_a_run_in_a_bucket_is_scored_and_compared_as_one_in_a_folder(
    engine: FormulaEngine, s3: S3Server, tmp_path: Path
) -> None:
    place, other = s3.address("runs/demo"), str(tmp_path / "local")
    run(make_study(), place)
    run(make_study(), other)
    scores = StorePath.parse(place) / "scores.csv"
    before = scores.read_bytes()
    scores.write_bytes(b"broken")
    done = CliRunner().invoke(app, ["study", "score", place])
    assert (done.exit_code, done.output) == (0, "s3://studies/runs/demo/report.html\n")
    assert scores.read_bytes() == before
    done = CliRunner().invoke(app, ["study", "compare", place, other, "--out", str(tmp_path / "comparison.json")])
    assert done.exit_code == 0, done.output
    comparison = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    assert comparison["a"]["path"] == "s3://studies/runs/demo"
    assert comparison["b"]["path"] == other
    nothing = CliRunner().invoke(app, ["study", "score", s3.address("runs/nothing")])
    assert isinstance(nothing.exception, StudyError)
    assert str(nothing.exception).startswith("s3://studies/runs/nothing/scenarios.json: cannot be read")


def test_grades_are_kept_in_the_bucket_also_when_the_endpoint_fails(engine: FormulaEngine, s3: S3Server) -> None:
    place = s3.address("runs/demo")
    run(make_study(), place)
    graded: list[int] = []

    def fail_after_five(_: object) -> Answer:
        graded.append(1)
        return said("2") if len(graded) <= 5 else Answer({}, 401)

    with fake_endpoint(fail_after_five) as fake:
        judge = ["study", "judge", place, "--concurrency", "1", "--endpoint", f"judge@{fake.url}/v1"]
        failed = CliRunner().invoke(app, judge)
    assert isinstance(failed.exception, SteerError), failed.output
    stored = StorePath.parse(place) / "judgements" / "judge.jsonl"
    assert len(stored.read_text().splitlines()) == 5
    with fake_endpoint(lambda _: said("1")) as fake:
        done = CliRunner().invoke(app, [*judge[:-1], f"judge@{fake.url}/v1"])
    assert done.exit_code == 0, done.output
    assert (
        f"{ROWS - 5} graded, 5 there before, 0 without a grade: s3://studies/runs/demo/judgements/judge.jsonl"
        in done.output
    )
    assert len(stored.read_text().splitlines()) == ROWS
    assert CliRunner().invoke(app, ["study", "score", place]).exit_code == 0


def test_a_file_address_is_the_folder_itself(engine: FormulaEngine, tmp_path: Path) -> None:
    with open_run(f"file://{tmp_path}/a%20run") as directory:
        assert directory == RunDirectory(tmp_path / "a run")


def _content(place: str, name: str) -> bytes:
    return (StorePath.parse(place) / name).read_bytes()


def _row_ids(part: StorePath) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    ids: list[str] = pq.read_table(pa.BufferReader(part.read_bytes()), columns=["row_id"])["row_id"].to_pylist()
    return ids
