"""Cohen's κ and Krippendorff's α against published examples, other packages and computations by definition."""

from __future__ import annotations

import warnings
from fractions import Fraction
from itertools import permutations
from typing import Literal

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from batch_jobs.scoring.agreement import Estimate, cohen_kappa, krippendorff_alpha

# Krippendorff, "Computing Krippendorff's alpha-reliability" (2011), section C: four observers, twelve units.
KRIPPENDORFF_2011 = ("12332141 2...", "12332241 25.3", ".3332342 251.", "12332441 251.")

# α = 0.33216405828386397 nominal and 0.36940937007092456 ordinal by the package krippendorff 0.9.0
# (krippendorff.alpha(…, value_domain=[0, 1, 2])).
OF_PACKAGE = (
    "200211222.011100..02.22..",
    "2020212211.2.12...0222112",
    "2.101122.0022101020.22.20",
    "..2.21.02..0002002.2.211.",
)


def counts(raters: tuple[str, ...], grades: str) -> list[list[int]]:
    """Raters' lines of grades, a dot where there is none, as numbers of each grade for each row."""
    lines = [line.replace(" ", "") for line in raters]
    return [[sum(line[row] == grade for line in lines) for grade in grades] for row in range(len(lines[0]))]


def by_definition(table: list[list[int]], level: str) -> Fraction | None:
    """1 - observed/expected disagreement over all ordered pairs of ratings, in exact fractions."""
    rows = [[grade for grade, count in enumerate(row) for _ in range(count)] for row in table]
    rows = [row for row in rows if len(row) >= 2]
    ratings = [grade for row in rows for grade in row]
    if not ratings:
        return None

    def distance(one: int, other: int) -> Fraction:
        if level == "nominal":
            return Fraction(one != other)
        low, high = sorted((one, other))
        between = sum(low <= grade <= high for grade in ratings)
        return (between - Fraction(ratings.count(low) + ratings.count(high), 2)) ** 2 if low != high else Fraction(0)

    observed = sum(
        (sum((distance(*pair) for pair in permutations(row, 2)), Fraction(0)) / (len(row) - 1) for row in rows),
        Fraction(0),
    ) / len(ratings)
    everybody = sum((distance(*pair) for pair in permutations(ratings, 2)), Fraction(0))
    if not everybody:
        return None
    return 1 - observed / (everybody / (len(ratings) * (len(ratings) - 1)))


@pytest.mark.parametrize(("level", "published"), [("nominal", 0.743), ("ordinal", 0.815)])
def test_alpha_of_the_published_example(level: Literal["nominal", "ordinal"], published: float) -> None:
    value = krippendorff_alpha(counts(KRIPPENDORFF_2011, "12345"), level).value
    assert value is not None
    assert round(value, 3) == published


@pytest.mark.parametrize(("level", "theirs"), [("nominal", 0.33216405828386397), ("ordinal", 0.36940937007092456)])
def test_alpha_of_another_package(level: Literal["nominal", "ordinal"], theirs: float) -> None:
    # both are sums of a few hundred doubles
    assert krippendorff_alpha(counts(OF_PACKAGE, "012"), level).value == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize("level", ["nominal", "ordinal"])
def test_alpha_is_that_of_its_definition(level: Literal["nominal", "ordinal"]) -> None:
    rng = np.random.default_rng(1)
    undefined = 0
    for _ in range(60):
        table = rng.integers(0, 3, (rng.integers(1, 12), 3)) * rng.integers(0, 2, 3)
        wanted = by_definition(table.tolist(), level)
        got = krippendorff_alpha(table, level, resamples=2).value
        undefined += wanted is None
        assert (got is None) == (wanted is None)
        if wanted is not None:
            assert got == pytest.approx(float(wanted), abs=1e-12)
    assert 0 < undefined < 60


@pytest.mark.parametrize(("weights", "power"), [(None, 0), ("quadratic", 2)])
def test_kappa_is_that_of_its_definition(weights: Literal["quadratic"] | None, power: int) -> None:
    """1 - observed/expected disagreement, summed over the table of both raters' grades."""
    table = np.array([[25, 13, 12], [12, 2, 16], [3, 15, 2]])
    cells = [(i, j) for i in range(3) for j in range(3)]
    first, second = zip(*[cell for cell in cells for _ in range(table[cell])], strict=True)
    apart = {(i, j): 0.0 if i == j else float(abs(i - j) ** power) for i, j in cells}
    observed = sum(apart[cell] * table[cell] for cell in cells)
    expected = sum(apart[i, j] * table[i].sum() * table[:, j].sum() / table.sum() for i, j in cells)
    got = cohen_kappa(first, second, grades=3, weights=weights).value
    assert got == pytest.approx(1 - observed / expected, abs=1e-12)


def test_quadratic_weights_are_those_of_the_scale_and_not_of_the_grades_that_were_given() -> None:
    """Nobody gave grade 1: 0 and 2 are still two apart, which leaves κ as it is, and 4 times as far as 0 and 1."""
    first, second = [0, 0, 2, 2, 2, 0], [0, 2, 2, 2, 0, 0]
    assert cohen_kappa(first, second, grades=3, weights="quadratic").value == pytest.approx(1 / 3)
    third = [0, 1, 2, 2, 2, 0]
    # observed 1, expected Σ (i-j)² n_i n_j / n = (3·1·1 + 3·3·4 + 3·1·1 + 3·2·4) / 6 = 11
    assert cohen_kappa(first, third, grades=3, weights="quadratic").value == pytest.approx(1 - 1 / 11)


@pytest.mark.parametrize("weights", [None, "quadratic"])
def test_the_interval_of_kappa_is_that_of_resampled_rows(weights: Literal["quadratic"] | None) -> None:
    rng = np.random.default_rng(2)
    first = rng.integers(0, 3, 60)
    second = np.where(rng.random(60) < 0.6, first, rng.integers(0, 3, 60))
    got = cohen_kappa(first, second, grades=3, weights=weights)
    drawn = []
    for _ in range(400):
        rows = rng.integers(0, 60, 60)
        drawn.append(cohen_kappa_score(first[rows], second[rows], labels=[0, 1, 2], weights=weights))
    assert got.low is not None
    assert got.high is not None
    # a 2.5 % quantile of 400 draws with a spread of 0.09 has a standard error of about 0.012
    assert np.quantile(drawn, [0.025, 0.975]) == pytest.approx([got.low, got.high], abs=0.05)


@pytest.mark.parametrize("level", ["nominal", "ordinal"])
def test_the_interval_of_alpha_is_that_of_resampled_rows(level: Literal["nominal", "ordinal"]) -> None:
    table = np.array(counts(OF_PACKAGE, "012"))
    got = krippendorff_alpha(table, level)
    rng = np.random.default_rng(3)
    drawn = [krippendorff_alpha(table[rng.integers(0, 25, 25)], level, resamples=2).value for _ in range(1000)]
    assert got.low is not None
    assert got.high is not None
    # the spread is 0.12; a 2.5 % quantile of 1,000 draws has a standard error of about 0.01
    low, high = np.quantile([value for value in drawn if value is not None], [0.025, 0.975])
    assert (low, high) == pytest.approx((got.low, got.high), abs=0.045)


def test_what_cannot_be_computed_is_undefined_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nothing = Estimate(None, None, None)
        assert cohen_kappa([], [], grades=3) == nothing
        assert cohen_kappa([1, 1, 1], [1, 1, 1], grades=3) == nothing
        assert krippendorff_alpha(np.zeros((0, 3)), "ordinal") == nothing
        assert krippendorff_alpha([[1, 0, 0], [0, 1, 0]], "nominal") == nothing
        assert krippendorff_alpha([[0, 2, 0], [0, 3, 0]], "ordinal") == nothing
        # one rater has no variance: no better than chance
        assert cohen_kappa([1, 1, 1, 1], [0, 1, 2, 1], grades=3).value == pytest.approx(0.0)
        # many resamples hold one row twice, where κ is undefined; the others count
        assert cohen_kappa([0, 2], [0, 2], grades=3) == Estimate(1.0, 1.0, 1.0)


def test_the_same_seed_gives_the_same_interval() -> None:
    first, second = [0, 1, 2, 0, 1, 2, 2, 1], [0, 1, 1, 0, 2, 2, 2, 0]
    assert cohen_kappa(first, second, grades=3) == cohen_kappa(first, second, grades=3)
    assert cohen_kappa(first, second, grades=3) != cohen_kappa(first, second, grades=3, seed=1)
