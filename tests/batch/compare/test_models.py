"""Two models, one made from the other by a known map, so that their agreement is known too."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
from scipy.linalg import orthogonal_procrustes
from scipy.stats import ortho_group

from batch_jobs.compare.models import BlockReadouts, CrossModelAgreement, CrossModelError, compare_readouts
from batch_jobs.directions.readout_file import PairReadouts

Rows = npt.NDArray[np.float64]
TRAIN, TEST = 20, 12  # pairs
ROUNDS = 40
# float64 through two decompositions of matrices of some hundred entries: errors are near 1e-13
EXACT = 1e-9


@dataclass(frozen=True)
class Texts:
    """A model's readouts, (texts, D): train positive, train negative, test positive, test negative."""

    rows: Rows

    def block(self, number: int = 0) -> BlockReadouts:
        train_positive, train_other, test_positive, test_other = np.split(self.rows, np.cumsum([TRAIN, TRAIN, TEST]))
        return BlockReadouts(number, PairReadouts(train_positive, train_other), PairReadouts(test_positive, test_other))


def texts(hidden_size: int, *, seed: int, class_shift: float = 1.5) -> Texts:
    """Gaussian readouts, the positive ones shifted along the first axis."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((2 * TRAIN + 2 * TEST, hidden_size))
    positive = np.repeat([True, False, True, False], [TRAIN, TRAIN, TEST, TEST])
    rows[positive, 0] += class_shift
    return Texts(rows)


def compare(a: Texts, b: Texts) -> CrossModelAgreement:
    return compare_readouts(a.block(3), b.block(5), rounds=ROUNDS, seed=1)


def test_a_rotated_model_is_the_same_model_after_alignment() -> None:
    a = texts(8, seed=0)
    b = Texts(a.rows @ ortho_group.rvs(8, random_state=1) + 7.0)
    got = compare(a, b)
    assert (got.block_a, got.block_b, got.train_texts, got.test_texts) == (3, 5, 40, 24)
    assert got.rank == 8
    for correlation in (got.raw, got.raw_within_class, got.aligned, got.aligned_within_class):
        assert correlation.pearson_r == pytest.approx(1.0, abs=1e-6)  # the directions are float32
    assert got.similarity_train == pytest.approx(1.0, abs=EXACT)
    assert got.similarity_test == pytest.approx(1.0, abs=EXACT)
    assert got.mapped_norm == pytest.approx(1.0, abs=1e-6)
    assert got.transfer_cosine == pytest.approx(1.0, abs=1e-6)
    # no shuffle does as well as the true pairing
    assert got.shuffled.similarity_test.p == pytest.approx(1 / (1 + ROUNDS))
    assert got.shuffled_within_class.similarity_test.p == pytest.approx(1 / (1 + ROUNDS))


@pytest.mark.parametrize("swapped", [False, True])
def test_models_of_different_hidden_sizes_are_aligned(swapped: bool) -> None:
    small = texts(6, seed=2)
    large = Texts(small.rows @ ortho_group.rvs(15, random_state=3)[:6])
    a, b = (large, small) if swapped else (small, large)
    got = compare(a, b)
    assert got.rank == 6
    assert got.similarity_test == pytest.approx(1.0, abs=EXACT)
    assert got.transfer_cosine == pytest.approx(1.0, abs=1e-6)


def test_a_direction_that_b_has_turned_round_transfers_as_b_knows_it() -> None:
    # B is A mirrored: its own direction is mirrored with it, so both agree, and an unaligned comparison cannot tell
    a = texts(5, seed=4)
    got = compare(a, Texts(-a.rows))
    assert got.transfer_auroc == pytest.approx(compare(a, a).transfer_auroc)
    assert got.transfer_cosine == pytest.approx(1.0, abs=1e-6)


def test_with_fewer_texts_than_dimensions_the_fit_is_scipys_and_knows_the_train_span_only() -> None:
    a = texts(100, seed=5)
    b = Texts(a.rows @ ortho_group.rvs(100, random_state=6))
    got = compare(a, b)
    assert got.rank == 2 * TRAIN - 1  # centring removes one dimension
    # scipy's map agrees on the train span and is arbitrary outside it; its second value is <A W, B> on train
    train_a, train_b = (side.rows[: 2 * TRAIN] - side.rows[: 2 * TRAIN].mean(axis=0) for side in (a, b))
    _, inner = orthogonal_procrustes(train_a, train_b)
    norms = np.linalg.norm(train_a) * np.linalg.norm(train_b)
    assert got.similarity_train == pytest.approx(inner / norms, abs=EXACT)
    assert got.similarity_train == pytest.approx(1.0, abs=EXACT)
    # the map carries the part of a test readout inside the span of the train readouts, here by least squares
    test_a = a.rows[2 * TRAIN :] - a.rows[: 2 * TRAIN].mean(axis=0)
    inside = train_a.T @ np.linalg.lstsq(train_a.T, test_a.T, rcond=None)[0]
    assert got.similarity_test == pytest.approx(np.sum(inside**2) / np.sum(test_a**2), abs=EXACT)
    assert got.similarity_test < 0.8


def test_unrelated_models_look_aligned_on_train_and_the_shuffles_give_them_away() -> None:
    got = compare(texts(200, seed=7, class_shift=0.0), texts(300, seed=8, class_shift=0.0))
    assert got.similarity_train > 0.9
    assert abs(got.similarity_test) < 0.1
    # fixed seeds; on 24 unrelated test texts |r| stays below 0.5 in 99 of 100 cases
    assert abs(got.aligned.pearson_r or 0.0) < 0.5
    assert got.shuffled.similarity_test.p > 0.05
    assert got.shuffled.transfer_auroc.p > 0.05
    # Map and directions share their train texts, so any pairing that keeps the classes carries one onto the other.
    assert got.transfer_cosine > 0.9
    assert got.shuffled_within_class.transfer_cosine.p > 0.05


def test_models_that_share_the_classes_only_are_told_from_models_that_share_texts() -> None:
    a, b = texts(30, seed=9, class_shift=6.0), texts(40, seed=10, class_shift=6.0)
    got = compare(a, b)
    # The class mean is enough to transfer: shuffling within the classes does as well, shuffling across both does not.
    assert got.transfer_auroc > 0.95
    assert got.shuffled.transfer_auroc.mean < 0.8
    assert got.shuffled.transfer_cosine.p == pytest.approx(1 / (1 + ROUNDS))
    assert got.shuffled_within_class.transfer_auroc.mean > 0.95
    assert got.shuffled_within_class.similarity_test.p > 0.05
    assert (got.raw.pearson_r or 0.0) > 0.8
    assert abs(got.raw_within_class.pearson_r or 0.0) < 0.5


def test_the_seed_fixes_the_shuffles() -> None:
    a, b = texts(10, seed=11).block(), texts(10, seed=12).block()
    assert compare_readouts(a, b, rounds=5, seed=3) == compare_readouts(a, b, rounds=5, seed=3)
    assert compare_readouts(a, b, rounds=5, seed=3) != compare_readouts(a, b, rounds=5, seed=4)


def test_readouts_of_other_texts_or_broken_ones_are_refused() -> None:
    a = texts(4, seed=13).block()
    fewer = BlockReadouts(0, a.train, PairReadouts(a.test.positive_ND[1:], a.test.negative_ND))
    with pytest.raises(CrossModelError, match=r"\(12, 12\) test texts .* \(11, 12\) of the other"):
        compare_readouts(a, fewer)
    broken = BlockReadouts(9, a.train, PairReadouts(a.test.positive_ND * np.nan, a.test.negative_ND))
    with pytest.raises(CrossModelError, match="block 9: the readouts hold NaN"):
        compare_readouts(a, broken)
    other_size = BlockReadouts(9, a.train, PairReadouts(a.test.positive_ND[:, :3], a.test.negative_ND))
    with pytest.raises(CrossModelError, match="the same D"):
        compare_readouts(a, other_size)
