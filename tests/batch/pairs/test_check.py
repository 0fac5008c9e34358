from __future__ import annotations

import io
import random
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from batch_jobs.config.study import StudyError
from batch_jobs.pairs.check import check_pairs
from batch_jobs.pairs.summary import print_pair_report
from batch_jobs.texts.contrastive import Pair, load_pairs

_LETTERS = random.Random(0)
# No vowels, so no keyword is among them; enough of them that two texts have little in common.
NEUTRAL = ["".join(_LETTERS.choices("bcdfghjklmnpqrstvwxz", k=5)) for _ in range(400)]


def random_pairs(
    count: int, *, empathic: str = "", non_empathic: str = "", words: tuple[int, int] = (40, 40)
) -> list[Pair]:
    """Pairs of random neutral words, so that only the added words can tell the sides apart."""
    draw = random.Random(7)

    def text(length: int, extra: str) -> str:
        return " ".join([*draw.choices(NEUTRAL, k=length), extra])

    return [
        Pair(f"p{number:02d}", f"s{number % 4}", text(words[0], empathic), text(words[1], non_empathic))
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
    assert report.leakage.empathy_keyword_auroc == report.leakage.task_keyword_auroc == 0.5


def test_a_text_given_twice_is_a_problem_whatever_its_case_and_spacing() -> None:
    pairs = random_pairs(8)
    pairs[5] = replace(pairs[5], empathic="  " + pairs[2].empathic.upper().replace(" ", "\n", 3))
    report = check_pairs(pairs)
    assert [(found.first, found.second, found.exact) for found in report.duplicates] == [
        ("p02/empathic", "p05/empathic", True)
    ]
    assert report.exit_code == 1
    assert report.problems == ("Duplicate: p02/empathic and p05/empathic (the same text).",)


def test_a_lightly_edited_copy_is_a_near_duplicate() -> None:
    pairs = list(load_pairs(None))
    kept, _, _ = pairs[3].empathic.rpartition(". ")
    pairs[9] = replace(pairs[9], empathic=f"{kept}. This ending is new and was written by somebody else.")
    (found,) = check_pairs(pairs).duplicates
    assert (found.first, found.second) == (f"{pairs[3].pair_id}/empathic", f"{pairs[9].pair_id}/empathic")
    assert 0.8 <= found.similarity < 1.0
    assert not found.exact


def test_sides_that_are_too_much_alike_make_a_pair_without_contrast() -> None:
    pairs = random_pairs(8)
    pairs[0] = replace(pairs[0], non_empathic=pairs[0].empathic + " bit")
    report = check_pairs(pairs)
    assert report.duplicates == ()
    assert [(found.first, found.second) for found in report.weak_contrasts] == [("p00/empathic", "p00/non_empathic")]
    assert report.problems[0].startswith("Pair without contrast: p00/empathic")


def test_one_sided_length_is_a_warning() -> None:
    report = check_pairs(random_pairs(12, words=(60, 40)))
    assert report.length.ratio == 1.5
    assert report.length.auroc == 1.0
    assert report.length.p_value < 0.001
    assert any(warning.startswith("Length: empathic texts have 1.50 times") for warning in report.warnings)
    assert report.exit_code == 0


@pytest.mark.parametrize(
    ("empathic", "non_empathic", "warned"),
    [
        ("sorry comfort listen", "", "count of empathy keywords alone tells the sides apart, AUROC 1.00"),
        ("", "optimal strategy", "count of task keywords alone tells the sides apart, AUROC 1.00"),
    ],
)
def test_keywords_on_one_side_are_a_warning(empathic: str, non_empathic: str, warned: str) -> None:
    report = check_pairs(random_pairs(12, empathic=empathic, non_empathic=non_empathic))
    assert any(warned in warning for warning in report.warnings)


def test_a_word_that_gives_a_side_away_is_found_and_named() -> None:
    report = check_pairs(random_pairs(20, empathic="zebra", non_empathic="!"))
    assert report.leakage.lexical_baseline_auroc > 0.9
    assert report.leakage.empathic_words[0] == "zebra"
    assert report.leakage.non_empathic_words[0] == "!"
    assert any(warning.startswith("Lexical baseline") for warning in report.warnings)


def test_both_texts_of_a_pair_are_held_out_together() -> None:
    # each pair has its own words on both sides: seen on one side in training, they would point to the wrong side
    pairs = []
    for number, pair in enumerate(random_pairs(24)):
        own = " ".join(f"own{number}x{index}" for index in range(30))
        pairs.append(replace(pair, empathic=f"{pair.empathic} {own}a", non_empathic=f"{pair.non_empathic} {own}b"))
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
    assert "problem  Duplicate: p00/empathic and copy/empathic (the same text)." in log.getvalue().splitlines()


def test_a_single_pair_cannot_be_checked() -> None:
    with pytest.raises(StudyError, match="Got 1 pairs"):
        check_pairs(random_pairs(1))


def test_the_papers_pairs_are_clean_and_lexically_separable(paper_data: Path) -> None:
    report = check_pairs(load_pairs(paper_data))
    assert report.problems == ()
    assert set(report.pairs_by_scenario.values()) == {10}
    assert any(warning.startswith("Lexical baseline") for warning in report.warnings)
