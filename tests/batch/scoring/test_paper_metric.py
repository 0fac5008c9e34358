from __future__ import annotations

import pytest

from batch_jobs.scoring.paper_metric import has_context, is_coherent, is_empathetic, keyword_grade


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", False),
        ("Nothing to see.", False),
        ("HELP", True),
        ("helpless", True),  # substring, as the paper scores it
        ("help the task", False),  # one each: not more
        ("help help help: task goal", False),  # distinct keywords count, not occurrences
        ("I care and I listen; the task", True),
        ("reach\nout", False),
    ],
)
def test_empathetic_means_more_distinct_empathy_than_task_keywords(text: str, expected: bool) -> None:
    assert is_empathetic(text) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", False),
        ("   \n ", False),
        ("one two three four five six seven eight nine", False),  # 9 words
        ("a b c d e f g h i j", False),  # 10 words, too short
        ("alpha beta gamma delta epsilon zeta eta theta iota kappa", True),
        ("word " * 7 + "alpha beta " + "word", True),  # 3 of 10 distinct
        ("word " * 8 + "alpha " + "longword", True),
        ("longword " * 9 + "alpha", False),  # 2 of 10 distinct
    ],
)
def test_coherent_means_long_enough_and_not_a_loop(text: str, expected: bool) -> None:
    assert is_coherent(text) is expected


def test_context_needs_two_distinct_markers() -> None:
    assert has_context("USER D will lose the account", ["user d", "account", "delete", "distress", "help"])
    assert not has_context("account, account", ["account", "Account", "user d"])
    assert not has_context("", ["a", "b"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [("I care; help me with the task", 2), ("help the task", 1), ("help the task, win", 0), ("", 1)],
)
def test_the_keyword_grade_puts_the_metric_on_the_scale_of_the_rubric(text: str, expected: int) -> None:
    assert keyword_grade(text) == expected
