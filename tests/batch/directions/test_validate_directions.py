"""A study's validation on synthetic readouts, for which every result is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from batch_jobs.config.study import Study
from batch_jobs.directions.readout_file import ReadoutFileError, ReadoutKey, StudyReadouts
from batch_jobs.directions.validate_directions import validate_study
from tests.support.made_pairs import made_split, read_texts

HIDDEN = 24
BLOCKS = (3, 4, 5)
SINK_BLOCK = 4
PAIRS = made_split(35, 15, writers=("writer-a", "writer-b"), telling=0.8)


def study(**changes: Any) -> Study:
    return Study.model_validate(
        {
            "name": "s",
            "model": "m",
            "seed": 1,
            "extract": {"layers": [4, 5]},
            "validation": {"bootstrap": 200, "random_directions": 20},
            "steer": {"layers": [5], "alphas": [0], "scenarios": ["s"]},
        }
        | changes
    )


def readouts() -> StudyReadouts:
    """The class is 4 along axis 0, block b sits b along axis 1, and the ablated texts have half the class.

    At SINK_BLOCK the mean of all tokens also holds a huge first token along axis 2, of random size: it drowns the class
    unless the first token is left out.
    """
    draw = np.random.default_rng(0)
    shares = {
        "train_positive": (35, 1.0),
        "train_negative": (35, 0.0),
        "test_positive": (15, 1.0),
        "test_negative": (15, 0.0),
        "test_positive_ablated": (15, 0.5),
    }
    arrays = {}
    for name, (size, share) in shares.items():
        for block in BLOCKS:
            means = draw.normal(0, 1, (size, HIDDEN))
            means[:, 0] += 4 * share
            means[:, 1] += block
            sink = np.zeros_like(means)
            sink[:, 2] = 1000 + draw.normal(0, 300, size) if block == SINK_BLOCK else 0.0
            arrays[ReadoutKey(name, 0, block)] = (means + sink).astype(np.float32)
            arrays[ReadoutKey(name, 1, block)] = means.astype(np.float32)
    return StudyReadouts(read_texts(PAIRS, replacements=range(15)), arrays)


def test_pooling_with_and_without_the_sink_stand_side_by_side() -> None:
    got = validate_study(study(), readouts(), PAIRS)
    everything, without_first = got.pooling[0], got.pooling[1]
    assert (everything.label, without_first.label) == ("all tokens", "without the first token")
    assert set(everything.blocks) == set(without_first.blocks) == set(BLOCKS)
    assert without_first.blocks[SINK_BLOCK].auroc > 0.95
    assert everything.blocks[SINK_BLOCK].auroc < 0.8
    assert everything.blocks[3].auroc > 0.95
    assert everything.mean_residual_norms[SINK_BLOCK] > 900
    assert without_first.mean_residual_norms[SINK_BLOCK] < 20
    assert got.sweep == everything.blocks
    assert got.skip_first == 0


def test_the_study_is_judged_under_its_own_pooling() -> None:
    got = validate_study(study(skip_first=1), readouts(), PAIRS)
    assert got.sweep == got.pooling[1].blocks
    assert got.layers == {layer: got.pooling[1].blocks[layer] for layer in (4, 5)}
    assert got.mean_residual_norms == {layer: got.pooling[1].mean_residual_norms[layer] for layer in (4, 5)}
    assert got.best_layer in (4, 5)


def test_with_the_papers_offset_layers_are_read_one_block_before_and_norms_are_not() -> None:
    got = validate_study(study(extract={"layers": [4, 5], "extract_offset": -1}), readouts(), PAIRS)
    for layer in (4, 5):
        assert got.layers[layer] == replace(got.sweep[layer - 1], layer=layer)
        assert got.mean_residual_norms[layer] == got.pooling[0].mean_residual_norms[layer]
    assert got.extra["extract_offset"] == -1


def test_methods_are_set_beside_the_mean_difference() -> None:
    got = validate_study(study(skip_first=1), readouts(), PAIRS)
    for layer, methods in got.methods.items():
        assert set(methods) == {"mean_difference", "logistic_regression", "pca"}
        assert methods["mean_difference"].cosine == pytest.approx(1.0, abs=1e-6)
        assert methods["mean_difference"].auroc == got.layers[layer].auroc
        for method in ("logistic_regression", "pca"):
            # one planted axis in 24, 35 pairs with noise of a quarter of the step
            assert 0.6 < methods[method].cosine < 1.0
            assert methods[method].auroc > 0.9


def test_the_direction_is_held_against_random_ones_on_the_same_texts() -> None:
    got = validate_study(study(skip_first=1), readouts(), PAIRS)
    for layer in (4, 5):
        baseline = got.random_baseline[layer]
        assert len(baseline.aurocs) == 20
        assert baseline.z == pytest.approx(
            (got.layers[layer].auroc - np.mean(baseline.aurocs)) / np.std(baseline.aurocs)
        )
        assert baseline.percentile_95 < got.layers[layer].auroc


def test_ablation_changes_the_positive_side_and_keeps_the_probe() -> None:
    got = validate_study(study(skip_first=1), readouts(), PAIRS).ablation
    assert got is not None
    assert got.keywords == 41
    assert got.replacements == tuple(range(15))
    for layer in (4, 5):
        before, after = got.layers[layer].before, got.layers[layer].after
        # half the step of 4 is gone: means of 15 texts with noise 1 are good to 0.26 each
        assert before.mean_positive - after.mean_positive == pytest.approx(2.0, abs=0.8)
        assert after.separation < before.separation
        assert (after.mean_negative, after.threshold_train) == (before.mean_negative, before.threshold_train)
    assert validate_study(study(validation={"lexical_ablation": False}), readouts(), PAIRS).ablation is None


def test_the_result_is_the_same_every_time_and_its_draws_follow_the_seed() -> None:
    first = validate_study(study(), readouts(), PAIRS)
    assert validate_study(study(), readouts(), PAIRS) == first
    other = validate_study(study(seed=2), readouts(), PAIRS)
    assert other.random_baseline[5].aurocs != first.random_baseline[5].aurocs
    assert other.layers[5].auroc == first.layers[5].auroc


def test_facts_about_the_texts_leave_the_ablated_copies_out() -> None:
    kept = readouts()
    long = tuple(replace(text, num_tokens=9000) for text in kept.texts["test_positive_ablated"])
    extra = validate_study(
        study(), StudyReadouts({**kept.texts, "test_positive_ablated": long}, kept.arrays), PAIRS
    ).extra
    assert (extra["train_pairs"], extra["test_pairs"], extra["mean_tokens_per_text"]) == (35, 15, 100.0)


def test_a_layer_that_was_not_read_is_refused() -> None:
    with pytest.raises(ReadoutFileError, match="block 9"):
        validate_study(study(extract={"layers": [5, 9]}), readouts(), PAIRS)


def test_the_layer_is_chosen_by_train_texts_and_not_by_test_texts() -> None:
    # at block 4 the train texts are told apart better, at block 5 the test texts
    kept = readouts()
    arrays = {key: array.copy() for key, array in kept.arrays.items()}
    for key, array in arrays.items():
        if key.text_set.endswith("positive") and key.skip_first == 1:
            wrong_block = 5 if key.text_set.startswith("train") else 4
            array[:, 0] -= 2.5 * (key.block == wrong_block)
    got = validate_study(study(skip_first=1), StudyReadouts(kept.texts, arrays), PAIRS)
    assert got.layers[5].auroc > got.layers[4].auroc
    assert got.best_layer == 4
    assert got.layer_choice.aurocs[4].auroc > got.layer_choice.aurocs[5].auroc
    assert (got.layer_choice.grouped_by, got.layer_choice.folds) == ("scenario", 3)


def test_words_alone_stand_beside_the_directions() -> None:
    got = validate_study(study(skip_first=1), readouts(), PAIRS)
    assert 0.5 < got.words.bag_of_words.auroc < 1.0  # four in five of the made-up texts hold a telling word
    for layer in (4, 5):
        beyond = got.beyond_words[layer]
        assert beyond.direction.auroc == got.layers[layer].auroc
        assert (beyond.direction.low, beyond.direction.high) == (
            got.layers[layer].auroc_low,
            got.layers[layer].auroc_high,
        )
        assert beyond.bag_of_words == got.words.bag_of_words
    assert got.ablation is not None
    assert got.ablation.words == got.words  # no made-up word is one that the ablation replaces


def test_ablated_texts_of_another_word_list_have_no_word_baseline() -> None:
    kept = readouts()
    other = tuple(replace(text, sha256="00" * 32) for text in kept.texts["test_positive_ablated"])
    changed = StudyReadouts({**kept.texts, "test_positive_ablated": other}, kept.arrays)
    ablation = validate_study(study(), changed, PAIRS).ablation
    assert ablation is not None
    assert ablation.words is None


def test_scenarios_and_writers_are_left_out_one_at_a_time() -> None:
    got = validate_study(study(skip_first=1), readouts(), PAIRS)
    assert set(got.left_out_scenarios) == {"harbour", "market", "station"}
    assert set(got.left_out_writers) == {"writer-a", "writer-b"}
    for groups in (got.left_out_scenarios, got.left_out_writers):
        assert sum(group.pairs for group in groups.values()) == 50  # train and test
        assert all(set(group.layers) == {4, 5} for group in groups.values())
        assert all(group.layers[5].auroc > 0.9 for group in groups.values())
    one_writer = made_split(35, 15, telling=0.8)
    assert validate_study(study(), readouts(), one_writer).left_out_writers == {}
