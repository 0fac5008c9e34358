from __future__ import annotations

import json
from pathlib import Path

import pytest

from batch_jobs.config.study import SplitSizes, StudyError, load_study
from batch_jobs.run.provenance import StudyRecord, git_commit, package_versions
from batch_jobs.run.run_directory import RunDirectory
from batch_jobs.texts.contrastive import load_split

DEMO = Path(__file__).resolve().parents[3] / "configs" / "studies" / "demo.yaml"


def test_a_run_lies_under_its_configs_name_unless_told() -> None:
    assert RunDirectory.for_config(Path("configs/studies/demo.yaml"), None).path == Path("runs/demo")
    assert RunDirectory.for_config(Path("demo.yaml"), Path("/tmp/x")).path == Path("/tmp/x")


def test_results_of_another_study_are_neither_mixed_nor_lost(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    mine = {"seed": 0, "sampling": {"temperature": 0.7}}
    other = {"seed": 0, "sampling": {"temperature": 0.9}}
    run.claim("mine", mine, overwrite=False)
    run.write_provenance({"run_key": "mine", "config": {**mine, "engine": {}, "rows_per_part": 3}})
    run.claim("other", other, overwrite=False)  # only a record is there: the first start failed early
    run.scores.write_text("x", encoding="utf-8")
    run.claim("mine", mine, overwrite=False)
    with pytest.raises(StudyError, match=r"study: sampling\.temperature: 0\.7 -> 0\.9\. .*--overwrite"):
        run.claim("other", other, overwrite=False)
    with pytest.raises(StudyError, match="pairs or the scenarios"):
        run.claim("other", mine, overwrite=False)
    run.provenance.unlink()
    with pytest.raises(StudyError, match=r"provenance\.json is gone"):
        run.claim("mine", mine, overwrite=False)
    assert run.scores.read_text(encoding="utf-8") == "x"


def test_overwrite_deletes_what_a_run_writes_and_nothing_else(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.generations.mkdir()
    (run.generations / "part-0.parquet").write_bytes(b"")
    run.report.write_text("", encoding="utf-8")
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    run.claim("new", {}, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("", encoding="utf-8")
    with pytest.raises(StudyError, match="is a file"):
        RunDirectory(tmp_path / "run").claim("x", {}, overwrite=False)


def test_a_broken_record_is_named(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.provenance.write_text("{", encoding="utf-8")
    with pytest.raises(StudyError, match=r"provenance\.json: not JSON"):
        run.read_provenance()


def test_the_record_says_what_ran_and_keeps_every_session(tmp_path: Path) -> None:
    run, study = RunDirectory(tmp_path), load_study(DEMO)
    split = load_split(None, SplitSizes())
    StudyRecord(run, study, split, "key").finish(rows_generated=3)
    StudyRecord(run, study, split, "key")
    document = json.loads(run.provenance.read_text(encoding="utf-8"))
    assert document["config"]["steer"]["alpha_unit"] == "residual_norm"
    assert document["config_hash"] == study.config_hash
    assert len(document["pairs_train"]) == 35
    assert len(document["sessions"]) == 2
    assert document["sessions"][0]["rows_generated"] == 3
    assert "finished_at" not in document["sessions"][1]
    assert document["started_at"].endswith("+00:00")
    record = StudyRecord(run, study, split, "another key")
    assert len(run.read_provenance()["sessions"]) == 1
    assert all(isinstance(value, str) for value in record.file_metadata.values())


def test_versions_name_python_and_what_is_installed() -> None:
    versions = package_versions()
    assert {"python", "numpy", "pyarrow"} <= set(versions)
    commit = git_commit()
    assert commit is None or len(commit.removesuffix("-dirty")) == 40
