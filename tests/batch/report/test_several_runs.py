"""Several runs on one page."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from typer.testing import CliRunner

from batch_jobs.cli.main import app
from batch_jobs.report.results import ReportError
from batch_jobs.report.several_runs import write_joint_report
from batch_jobs.scoring.scores_csv import read_scores
from tests.batch.report.test_page import outline, words
from tests.support.synthetic_run import demo_rows, study, write_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [
        write_run(folder / "one", demo_rows(layers=(12, 16))),
        write_run(folder / "two", demo_rows(), of=study(name="other", model="big-model")),
    ]


def test_runs_stand_side_by_side_with_their_own_numbers(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "both.html"
    done = CliRunner().invoke(app, ["study", "report", *map(str, runs), "--out", str(out)])
    assert done.exit_code == 0, done.output
    page = out.read_text(encoding="utf-8")
    parsed, text = outline(page), words(page)
    assert parsed.unbalanced == []
    assert len(parsed.ids) == len(set(parsed.ids))
    for number in (4, 6, 7, 9):
        assert f"Figure {number}." in text
    for run, name in zip(runs, ("synthetic", "other"), strict=True):
        for row in read_scores(run / "scores.csv").success:
            ends = f"{row.delta_low:.2f} to {row.delta_high:.2f}".replace("-", "−")
            assert f"{row.delta:.2f} {ends}".replace("-", "−") in text
        assert name in text
    stems = {path.stem for path in (tmp_path / "both-figures").glob("*.csv")}
    assert stems == {"figure-4-detection", "figure-6-dose-response", "figure-7-unsteered", "figure-9-layers"}
    with (tmp_path / "both-figures" / "figure-7-unsteered.csv").open(encoding="utf-8") as file:
        bars = list(csv.DictReader(file))
    assert {bar["series"] for bar in bars} == {"synthetic", "other"}
    assert len(bars) == 2 * 3


def test_studies_of_one_name_are_told_apart_by_their_folders(runs: list[Path], tmp_path: Path) -> None:
    again = write_run(tmp_path / "again", demo_rows())
    page = write_joint_report([runs[0], again], tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"synthetic ({runs[0].parent.name}/one)" in words(page)
    assert f"synthetic ({tmp_path.name}/again)" in words(page)


def test_one_run_alone_or_twice_is_refused(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="Got 1 run; give at least two"):
        write_joint_report(runs[:1], tmp_path / "page.html")
    with pytest.raises(ReportError, match="given twice"):
        write_joint_report([runs[0], runs[0].parent / "one"], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
