"""The report of a study whose concept is not empathy: its own words, no published values, a judge yet to judge."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from batch_jobs.config.concept import Concept
from batch_jobs.directions.validation_file import read_validation
from batch_jobs.pipeline import score_run
from batch_jobs.report.figures.catalogue import draw_figures
from batch_jobs.report.page import report_page
from batch_jobs.report.results import read_run
from batch_jobs.run.run_directory import RunDirectory
from tests.support.synthetic_run import demo_rows, study, write_run

FORMALITY: dict[str, Any] = {
    "name": "formality",
    "poles": {"positive": "formal", "negative": "informal"},
    # the synthetic texts turn from "objective" to "sorry" as α grows
    "keywords": {"positive": ["sorry"], "negative": ["objective"], "match": "word"},
    "focus_scenario": "the_protector",
}


def report_of(folder: Path, concept: dict[str, Any], grades: dict[str, int] | None = None) -> str:
    """The page of a run of this concept, scored anew, without its style sheet and script."""
    write_run(folder, demo_rows(), of=study(concept=concept))
    run = RunDirectory(folder)
    if grades is not None:
        lines = [json.dumps({"row_id": row_id, "grade": grade, "model": "j"}) for row_id, grade in grades.items()]
        run.earlier_judgements.write_text("\n".join(lines) + "\n", encoding="utf-8")
    score_run(run, {}, read_validation(run.validation), Concept.model_validate(concept))
    results = read_run(folder, per_condition=5, max_samples=1000)
    page = report_page(results, draw_figures(results))
    return re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.DOTALL)


@pytest.fixture(scope="module")
def formality(tmp_path_factory: pytest.TempPathFactory) -> str:
    return report_of(tmp_path_factory.mktemp("run"), FORMALITY)


def test_the_report_speaks_of_the_studys_own_poles(formality: str) -> None:
    assert "Formal rate" in formality
    assert ">not formal<" in formality
    assert "calls formal" in formality
    assert "the lists: sorry; objective." in formality.lower()
    assert "Resistance: The Protector" in formality
    shown = re.sub(r"empathy@\d+|<pre>.*?</pre>", "", formality, flags=re.DOTALL)  # the synthetic rows' direction
    assert not re.findall(r"\bempath(?:etic|ic|ically)\b", shown)


def test_the_papers_values_are_not_set_beside_another_concept(formality: str) -> None:
    assert 'class="paper"' not in formality
    for word in ("Phi-3", "Qwen2.5", "Dolphin", ", published"):
        assert word not in formality


def test_a_judged_study_renders_before_it_is_judged(tmp_path: Path) -> None:
    page = report_of(tmp_path, {"name": "formality", "outcome": "judge"})
    assert "Not judged yet" in page
    assert "Test AUROC, best layer" in page
    assert "Coherent samples" in page
    assert ">not judged<" in page
    assert not re.search(r"(?<![a-z])nan(?![a-z])", page)


def test_grades_become_the_verdicts_of_the_samples(tmp_path: Path) -> None:
    grades = {row["row_id"]: 2 if row["alpha"] > 0 else 0 for row in demo_rows()}
    page = report_of(tmp_path, {**FORMALITY, "outcome": "judge"}, grades)
    assert "Not judged yet" not in page
    verdicts = re.findall(r'data-alpha="([^"]+)".*?class="tally">(\d+) of (\d+) formal', page, flags=re.DOTALL)
    assert len(verdicts) == 21
    assert all(int(count) == (int(total) if float(alpha) > 0 else 0) for alpha, count, total in verdicts)
