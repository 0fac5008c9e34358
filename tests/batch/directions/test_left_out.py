"""Each scenario, or writer, tested on what was made of all others."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from batch_jobs.directions.left_out import leave_groups_out
from batch_jobs.directions.readout_file import PairReadouts
from batch_jobs.directions.word_baselines import TextSides

GROUPS = ["cave", "dune", "fjord"] * 6
TEXTS = TextSides(("a warm hand",) * 18, ("a cold task",) * 18)


def readouts(towards: dict[str, int]) -> PairReadouts:
    """The positive side of a group is shifted along its own axis."""
    draw = np.random.default_rng(0)
    positive, negative = draw.normal(size=(2, len(GROUPS), 8))
    for row, group in enumerate(GROUPS):
        positive[row, towards[group]] += 5.0
    return PairReadouts(positive, negative)


def test_a_direction_that_all_groups_share_carries_over() -> None:
    got = leave_groups_out({4: readouts(dict.fromkeys(GROUPS, 0))}, TEXTS, GROUPS)
    assert list(got) == ["cave", "dune", "fjord"]
    assert {group.pairs for group in got.values()} == {6}
    for group in got.values():
        assert group.layers[4].auroc > 0.95
        assert group.layers[4].low < group.layers[4].auroc


def test_a_group_with_a_direction_of_its_own_is_found_out() -> None:
    pairs = readouts({"cave": 0, "dune": 0, "fjord": 3})
    got = leave_groups_out({4: pairs}, TEXTS, GROUPS)
    assert got["cave"].layers[4].auroc > 0.95
    assert got["fjord"].layers[4].auroc < 0.85
    out = np.array([group == "fjord" for group in GROUPS])
    direction = pairs.positive_ND[~out].mean(axis=0) - pairs.negative_ND[~out].mean(axis=0)
    projections = [*(pairs.positive_ND[out] @ direction), *(pairs.negative_ND[out] @ direction)]
    assert got["fjord"].layers[4].auroc == pytest.approx(roc_auc_score([1] * 6 + [0] * 6, projections))


def test_the_bag_of_words_knows_the_other_groups_only() -> None:
    # the words of a side are those of its group
    positive = tuple(f"up {group}up" for group in GROUPS)
    negative = tuple(f"up {group}down" for group in GROUPS)
    got = leave_groups_out({4: readouts(dict.fromkeys(GROUPS, 0))}, TextSides(positive, negative), GROUPS)
    assert {group.words.bag_of_words.auroc for group in got.values()} == {0.5}
    shared = leave_groups_out({4: readouts(dict.fromkeys(GROUPS, 0))}, TEXTS, GROUPS)
    assert {group.words.bag_of_words.auroc for group in shared.values()} == {1.0}
    assert {group.words.length.auroc for group in shared.values()} == {0.5}


def test_pairs_of_an_unknown_writer_help_to_make_directions_and_are_no_group() -> None:
    writers = ["ada", "bo", None] * 6
    got = leave_groups_out({4: readouts(dict.fromkeys(GROUPS, 0))}, TEXTS, writers)
    assert list(got) == ["ada", "bo"]


@pytest.mark.parametrize("groups", [["one"] * 18, ["one", None] * 9, [None] * 18])
def test_fewer_than_two_groups_leave_nothing_to_test(groups: list[str | None]) -> None:
    assert leave_groups_out({4: readouts(dict.fromkeys(GROUPS, 0))}, TEXTS, groups) == {}
