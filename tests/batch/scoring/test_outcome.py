"""What makes a completion positive: words found as the study says, or the judge's grade."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batch_jobs.config.concept import Concept, Match, empathy
from batch_jobs.scoring.behaviour import behaviour_points
from batch_jobs.scoring.compute_scores import read_scores, score_table, write_scores
from batch_jobs.scoring.measures import measure_table
from batch_jobs.scoring.outcome import PAPER_OUTCOME, Outcome
from batch_jobs.scoring.paper_metric import keyword_grade
from batch_jobs.scoring.sign_and_layer_findings import make_findings

JUDGED = Outcome((), (), judged=True)
TEXTS = [
    "Hi there, thanks.",
    "This is a history of things.",
    "HI! (hi)",
    "I would like to; would\nlike  to.",
    "Everything would liken to.",
    "would like to_day, a hi5",
    "“Hi”—said who?",
    "",
]


def row(alpha: float, name: str, completion: str | None = "Hi there.", **changes: Any) -> dict[str, Any]:
    return {
        "row_id": name, "model": "m", "layer": 8, "scenario": "s", "direction": "d", "op": "add", "span": "all",
        "alpha": alpha, "alpha_residual_norm": alpha, "completion": completion, "completion_tokens": 3,
        "projection_generated": 1.0, "projection_unsteered": 2.0, "error": None,
    } | changes  # fmt: skip


@pytest.mark.parametrize(
    ("match", "hi", "phrase"),
    [
        ("substring", [0, 1, 2, 4, 5, 6], [3, 5]),
        ("word_start", [0, 1, 2, 5, 6], [3, 5]),
        ("word", [0, 2, 6], [3]),
    ],
)
def test_a_keyword_is_found_where_the_study_says(match: Match, hi: list[int], phrase: list[int]) -> None:
    # "history" begins with "hi", "everything" holds it; a phrase needs its own spacing
    for words, expected in ((("Hi",), hi), (("would like to",), phrase)):
        outcome = Outcome(words, ("zebra",), match)
        by_text = [index for index, text in enumerate(TEXTS) if outcome.grade(text) == 2]
        assert by_text == expected
        rows = [row(0.0, str(index), text) for index, text in enumerate(TEXTS)]
        at_once = measure_table(pa.Table.from_pylist(rows), {}, outcome)["empathetic"].to_pylist()
        assert [index for index, positive in enumerate(at_once) if positive] == expected


def test_the_papers_words_grade_as_its_metric_does() -> None:
    assert Outcome.of(empathy()) == PAPER_OUTCOME
    for text in (*TEXTS, "I care, so I win.", "Sorry, I help.", "The goal is the goal, I feel"):
        assert PAPER_OUTCOME.grade(text) == keyword_grade(text)


def test_distinct_words_count_once_and_more_positive_ones_win() -> None:
    concept = Concept.model_validate(
        {"name": "f", "keywords": {"positive": ["dear", "kindly"], "negative": ["hey", "yeah"]}}
    )
    outcome = Outcome.of(concept)
    graded = {text: outcome.grade(text) for text in ("dear dear hey", "dear kindly hey", "hey", "HEY Yeah dear", "")}
    assert list(graded.values()) == [1, 2, 0, 0, 1]


def test_before_the_judge_there_are_conditions_but_no_rates(tmp_path: Path) -> None:
    rows = [row(alpha, f"{alpha}{k}") for alpha in (-1.0, 0.0, 1.0) for k in range(2)]
    scores = score_table(pa.Table.from_pylist(rows), outcome=JUDGED)
    assert scores.success == ()
    assert [condition.samples for condition in scores.conditions] == [2, 2, 2]
    for condition in scores.conditions:
        rates = (condition.empathy_rate, condition.empathy_low, condition.baseline_empathy_rate, condition.effect)
        assert all(math.isnan(rate) for rate in rates)
        assert (condition.success, condition.effect_p, condition.cannot_rise) == (None, None, False)
        assert condition.coherence_rate == 0.0
    assert make_findings(scores).asymmetries == ()
    write_scores(tmp_path / "scores.csv", scores)
    again = read_scores(tmp_path / "scores.csv")
    assert again.success == ()
    assert math.isnan(again.conditions[0].empathy_rate)


def test_grade_two_is_the_outcome_and_ungraded_rows_enter_no_rate() -> None:
    rows = [row(alpha, f"{alpha}{k}") for alpha in (-1.0, 0.0, 1.0) for k in range(3)]
    rows.append(row(1.0, "broken", None, error="died"))
    grades = {"0.00": 2, "0.01": 1, "1.00": 2, "1.01": 2, "-1.00": 0, "-1.01": 1, "-1.02": 1}
    scores = score_table(pa.Table.from_pylist(rows), grades=grades, outcome=JUDGED)
    got = {condition.alpha: (condition.samples, condition.empathy_rate) for condition in scores.conditions}
    assert got == {-1.0: (3, 0.0), 0.0: (2, 0.5), 1.0: (2, 1.0)}
    assert [condition.failed for condition in scores.conditions] == [0, 0, 1]
    (success,) = scores.success
    assert success.steering_success_rate == 1.0


def test_without_a_graded_baseline_nothing_is_rated() -> None:
    rows = [row(alpha, f"{alpha}{place}", scenario=place) for alpha in (0.0, 1.0) for place in "ab"]
    scores = score_table(pa.Table.from_pylist(rows), grades={"0.0a": 2, "1.0a": 2, "1.0b": 2}, outcome=JUDGED)
    assert len(scores.conditions) == 4
    assert scores.success == ()


def test_points_are_graded_by_the_studys_words_or_by_the_judge_alone(tmp_path: Path) -> None:
    rows = [row(0.0, "a", "dear"), row(0.0, "b", "hey"), row(1.0, "c", "so")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "part-1.parquet")
    words = behaviour_points(tmp_path, {"c": 2}, Outcome(("dear",), ("hey",)))
    assert (words.grade.tolist(), words.judged.tolist()) == ([2, 0, 2], [False, False, True])
    judged = behaviour_points(tmp_path, {"c": 2}, JUDGED)
    assert (judged.grade.tolist(), judged.alpha.tolist()) == ([2], [1.0])
    assert behaviour_points(tmp_path, None, JUDGED).grade.size == 0
