from __future__ import annotations

import io
import random
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from batch_jobs.config.concept import Concept
from batch_jobs.config.study import StudyError
from batch_jobs.pairs.check import check_pairs
from batch_jobs.pairs.summary import print_pair_report
from batch_jobs.texts.contrastive import Pair, load_pairs

_LETTERS = random.Random(0)
# No vowels, so no keyword is among them; enough of them that two texts have little in common.
NEUTRAL = ["".join(_LETTERS.choices("bcdfghjklmnpqrstvwxz", k=5)) for _ in range(400)]


def random_pairs(
    count: int, *, positive: str = "", negative: str = "", words: tuple[int, int] = (40, 40)
) -> list[Pair]:
    """Pairs of random neutral words, so that only the added words can tell the sides apart."""
    draw = random.Random(7)

    def text(length: int, extra: str) -> str:
        return " ".join([*draw.choices(NEUTRAL, k=length), extra])

    return [
        Pair(f"p{number:02d}", f"s{number % 4}", text(words[0], positive), text(words[1], negative))
        for number in range(count)
    ]


def test_neutral_pairs_have_no_findings() -> None:
    report = check_pairs(random_pairs(24))
    assert report.problems == ()
    assert report.warnings == ()
    assert report.exit_code == 0
    assert report.pairs_by_scenario == {"s0": 6, "s1": 6, "s2": 6, "s3": 6}
    assert report.length.ratio == 1.0
    assert report.length.p_value == 1.0
    # chance for 24 random texts a side: 0.5 with a standard error near 0.09
    assert 0.2 < report.leakage.lexical_baseline_auroc < 0.8
    assert report.leakage.keyword_aurocs == {"empathetic": 0.5, "task-focused": 0.5}


def test_a_text_given_twice_is_a_problem_whatever_its_case_and_spacing() -> None:
    pairs = random_pairs(8)
    pairs[5] = replace(pairs[5], positive="  " + pairs[2].positive.upper().replace(" ", "\n", 3))
    report = check_pairs(pairs)
    assert [(found.first, found.second, found.exact) for found in report.duplicates] == [
        ("p02/positive", "p05/positive", True)
    ]
    assert report.exit_code == 1
    assert report.problems == ("Duplicate: p02/positive and p05/positive (the same text).",)


def test_a_lightly_edited_copy_is_a_near_duplicate() -> None:
    pairs = list(load_pairs(None))
    kept, _, _ = pairs[3].positive.rpartition(". ")
    pairs[9] = replace(pairs[9], positive=f"{kept}. This ending is new and was written by somebody else.")
    (found,) = check_pairs(pairs).duplicates
    assert (found.first, found.second) == (f"{pairs[3].pair_id}/positive", f"{pairs[9].pair_id}/positive")
    assert 0.8 <= found.similarity < 1.0
    assert not found.exact


def test_sides_that_are_too_much_alike_make_a_pair_without_contrast() -> None:
    pairs = random_pairs(8)
    pairs[0] = replace(pairs[0], negative=pairs[0].positive + " bit")
    report = check_pairs(pairs)
    assert report.duplicates == ()
    assert [(found.first, found.second) for found in report.weak_contrasts] == [("p00/positive", "p00/negative")]
    assert report.problems[0].startswith("Pair without contrast: p00/positive")


def test_one_sided_length_is_a_warning() -> None:
    report = check_pairs(random_pairs(12, words=(60, 40)))
    assert report.length.ratio == 1.5
    assert report.length.auroc == 1.0
    assert report.length.p_value < 0.001
    assert any(warning.startswith("Length: positive texts have 1.50 times") for warning in report.warnings)
    assert report.exit_code == 0


@pytest.mark.parametrize(
    ("positive", "negative", "warned"),
    [
        ("sorry comfort listen", "", "count of empathetic keywords alone tells the sides apart, AUROC 1.00"),
        ("", "optimal strategy", "count of task-focused keywords alone tells the sides apart, AUROC 1.00"),
    ],
)
def test_keywords_on_one_side_are_a_warning(positive: str, negative: str, warned: str) -> None:
    report = check_pairs(random_pairs(12, positive=positive, negative=negative))
    assert any(warned in warning for warning in report.warnings)


def test_a_word_that_gives_a_side_away_is_found_and_named() -> None:
    report = check_pairs(random_pairs(20, positive="zebra", negative="!"))
    assert report.leakage.lexical_baseline_auroc > 0.9
    assert report.leakage.positive_words[0] == "zebra"
    assert report.leakage.negative_words[0] == "!"
    assert any(warning.startswith("Lexical baseline") for warning in report.warnings)


def test_both_texts_of_a_pair_are_held_out_together() -> None:
    # each pair has its own words on both sides: seen on one side in training, they would point to the wrong side
    pairs = []
    for number, pair in enumerate(random_pairs(24)):
        own = " ".join(f"own{number}x{index}" for index in range(30))
        pairs.append(replace(pair, positive=f"{pair.positive} {own}a", negative=f"{pair.negative} {own}b"))
    assert 0.2 < check_pairs(pairs).leakage.lexical_baseline_auroc < 0.8


def test_scenarios_of_very_different_numbers_are_a_warning() -> None:
    pairs = [replace(pair, scenario_id="few" if number < 2 else "many") for number, pair in enumerate(random_pairs(12))]
    assert "Balance: the scenarios have between 2 and 10 pairs." in check_pairs(pairs).warnings


def test_the_bundled_pairs_are_clean_and_their_vocabulary_is_not_hidden() -> None:
    report = check_pairs(load_pairs(None))
    assert report.problems == ()
    assert report.leakage.lexical_baseline_auroc > 0.95
    log = io.StringIO()
    print_pair_report(report, Console(file=log, width=80))
    printed = log.getvalue()
    assert "warning  Lexical baseline: a bag of words tells the sides apart with AUROC" in printed
    assert "No problems found; see the warnings." in printed
    assert "food_delivery 10" in printed


def test_problems_are_printed_unfolded() -> None:
    pairs = random_pairs(4)
    log = io.StringIO()
    print_pair_report(check_pairs([*pairs, replace(pairs[0], pair_id="copy")]), Console(file=log, width=30))
    assert "problem  Duplicate: p00/positive and copy/positive (the same text)." in log.getvalue().splitlines()


def test_a_single_pair_cannot_be_checked() -> None:
    with pytest.raises(StudyError, match="Got 1 pairs"):
        check_pairs(random_pairs(1))


def test_the_papers_pairs_are_clean_and_lexically_separable(paper_data: Path) -> None:
    report = check_pairs(load_pairs(paper_data))
    assert report.problems == ()
    assert set(report.pairs_by_scenario.values()) == {10}
    assert any(warning.startswith("Lexical baseline") for warning in report.warnings)


def test_the_keywords_of_another_concept_are_looked_for() -> None:
    keywords = {"positive": ["dear"], "negative": ["hey"], "match": "word"}
    concept = Concept.model_validate(
        {"name": "f", "poles": {"positive": "formal", "negative": "informal"}, "keywords": keywords}
    )
    report = check_pairs(random_pairs(12, positive="dear sorry", negative="they endear"), concept)
    # "they" and "endear" hold the keywords, but not as words
    assert report.leakage.keyword_aurocs == {"formal": 1.0, "informal": 0.5}
    assert [one for one in report.warnings if one.startswith("Keywords")] == [
        "Keywords: the count of formal keywords alone tells the sides apart, AUROC 1.00."
    ]
    judged = Concept.model_validate({"name": "f", "outcome": "judge"})
    assert check_pairs(random_pairs(12), judged).leakage.keyword_aurocs == {}
