"""The layer is chosen on train pairs, and its AUROC on test pairs is no better than it looks."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from batch_jobs.directions.layer_choice import choose_layer, cross_validated, make_folds
from batch_jobs.directions.readout_file import PairReadouts
from batch_jobs.directions.validate_layer import ValidationError
from batch_jobs.directions.word_baselines import TextSides
from tests.support.made_pairs import made_split

HIDDEN = 6


def pairs(count: int, shift: float, *, seed: int = 0) -> PairReadouts:
    """The positive side is shifted along the first axis; noise of 1 everywhere."""
    draw = np.random.default_rng(seed)
    positive, negative = draw.normal(size=(2, count, HIDDEN))
    positive[:, 0] += shift
    return PairReadouts(positive, negative)


def texts(count: int) -> TextSides:
    made = made_split(count, 1).train
    return TextSides(tuple(pair.positive for pair in made), tuple(pair.negative for pair in made))


def test_no_scenario_is_on_both_sides_of_a_fold_and_every_pair_is_tested_once() -> None:
    scenarios = [f"s{number % 7}" for number in range(35)]
    folds = make_folds(scenarios)
    assert (folds.grouped_by, len(folds.parts)) == ("scenario", 5)
    for fitted, held_out in folds.parts:
        assert not {scenarios[row] for row in fitted} & {scenarios[row] for row in held_out}
    assert sorted(row for _, held_out in folds.parts for row in held_out) == list(range(35))


@pytest.mark.parametrize(
    ("scenarios", "grouped_by", "folds"),
    [(["a", "b"], "scenario", 2), (["a"] * 9, "pair", 5), (["a"] * 3, "pair", 3), (["a"], "pair", 0)],
)
def test_few_scenarios_give_fewer_folds_and_one_scenario_folds_of_pairs(
    scenarios: list[str], grouped_by: str, folds: int
) -> None:
    got = make_folds(scenarios)
    assert (got.grouped_by, len(got.parts)) == (grouped_by, folds)


def test_a_text_is_scored_by_the_threshold_and_the_direction_of_the_other_folds() -> None:
    train, scenarios = pairs(12, 1.5), ["a", "b", "c"] * 4
    positive, negative = cross_validated(train, make_folds(scenarios))
    for scenario in "abc":
        out = np.array([one == scenario for one in scenarios])
        means = [side[~out].mean(axis=0) for side in (train.positive_ND, train.negative_ND)]
        direction = (means[0] - means[1]) / np.linalg.norm(means[0] - means[1])
        middle = (means[0] + means[1]) / 2
        # the direction is rounded to float32
        np.testing.assert_allclose(positive[out], (train.positive_ND[out] - middle) @ direction, atol=1e-5)
        np.testing.assert_allclose(negative[out], (train.negative_ND[out] - middle) @ direction, atol=1e-5)


def test_the_layer_with_the_highest_cross_validated_auroc_is_chosen() -> None:
    scenarios = ["a", "b", "c", "d"] * 5
    layers = {4: pairs(20, 0.5), 8: pairs(20, 1.5, seed=1), 12: pairs(20, 0.2, seed=2)}
    best, choice = choose_layer(layers, texts(20), scenarios)
    assert best == 8
    assert (choice.grouped_by, choice.folds) == ("scenario", 4)
    for layer, train in layers.items():
        positive, negative = cross_validated(train, make_folds(scenarios))
        assert choice.aurocs[layer].auroc == pytest.approx(roc_auc_score([1] * 20 + [0] * 20, [*positive, *negative]))
    assert choice.bag_of_words is not None


def test_ties_go_to_the_larger_separation_in_stds_and_then_to_the_lower_layer() -> None:
    scenarios = ["a", "b", "c", "d"] * 5
    far, farther = pairs(20, 40.0), pairs(20, 80.0)
    best, choice = choose_layer({4: far, 8: farther, 12: farther}, texts(20), scenarios)
    assert {estimate.auroc for estimate in choice.aurocs.values()} == {1.0}
    assert best == 8
    # units of the residual stream must not decide: the same texts ten times as large, with ten times the noise
    larger = PairReadouts(far.positive_ND * 10, far.negative_ND * 10)
    assert choose_layer({4: farther, 8: larger}, texts(20), scenarios)[0] == 4


def test_a_single_pair_chooses_the_lowest_layer_and_says_that_nothing_was_tested() -> None:
    best, choice = choose_layer({8: pairs(1, 1.0), 4: pairs(1, 9.0)}, texts(1), ["a"])
    assert (best, choice.folds, choice.aurocs, choice.bag_of_words) == (4, 0, {}, None)
    with pytest.raises(ValidationError, match="at least one layer"):
        choose_layer({}, texts(1), ["a"])


def test_the_bag_of_words_is_tested_in_the_same_folds() -> None:
    # each scenario's positive texts have a word of their own: telling within a scenario, useless for another
    scenarios = ["a", "b", "c", "d"] * 3
    positive = tuple(f"one two {scenario}{scenario}" for scenario in scenarios)
    negative = tuple("one two" for _ in scenarios)
    _, choice = choose_layer({4: pairs(12, 1.0)}, TextSides(positive, negative), scenarios)
    assert choice.bag_of_words is not None
    assert choice.bag_of_words.auroc == 0.5
    _, by_pair = choose_layer({4: pairs(12, 1.0)}, TextSides(("one aa",) * 12, negative), ["a"] * 12)
    assert by_pair.bag_of_words is not None
    assert by_pair.bag_of_words.auroc == 1.0


@pytest.mark.slow
def test_the_test_auroc_of_a_layer_chosen_on_train_is_that_of_any_layer() -> None:
    # ten layers that are equally good: the best on test looks better than it is, the one chosen on train does not
    scenarios = [f"s{number % 5}" for number in range(20)]
    chosen, best_on_test, everywhere = [], [], []
    for seed in range(40):
        train = {layer: pairs(20, 1.6, seed=seed * 100 + layer) for layer in range(10)}
        test = {layer: pairs(15, 1.6, seed=10**6 + seed * 100 + layer) for layer in range(10)}
        aurocs = {}
        for layer in train:
            direction = train[layer].positive_ND.mean(axis=0) - train[layer].negative_ND.mean(axis=0)
            projections = [*(test[layer].positive_ND @ direction), *(test[layer].negative_ND @ direction)]
            aurocs[layer] = roc_auc_score([1] * 15 + [0] * 15, projections)
        best, _ = choose_layer(train, texts(20), scenarios)
        chosen.append(aurocs[best])
        best_on_test.append(max(aurocs.values()))
        everywhere.append(np.mean(list(aurocs.values())))
    # the std of one AUROC is 0.065 here: 40 rounds give the mean a standard error of 0.01
    assert np.mean(chosen) == pytest.approx(np.mean(everywhere), abs=0.03)
    assert np.mean(best_on_test) > np.mean(everywhere) + 0.05
    assert np.mean(everywhere) < norm.cdf(1.6 / 2**0.5)  # the true AUROC along the true axis bounds it
