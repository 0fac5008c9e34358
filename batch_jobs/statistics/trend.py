"""Dose response of a group: whether the empathetic rate rises with α."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

PERMUTATIONS: Final = 9999
"""Permutations for each trend's p. The smallest possible p is 1e-4."""
_PERMUTATION_SEED = 20251116  # any constant: the same counts must give the same p in every run

Integers = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Trend:
    """Whether the empathetic rate rises with α, over single samples, including α = 0."""

    rho: float
    """Spearman correlation of α with empathetic (0/1), in -1..1."""
    p: float
    """One-sided permutation p of a `rho` this large or larger; a falling rate gives a p near 1."""


def trend(alphas: Sequence[float], successes: Sequence[int], trials: Sequence[int]) -> Trend | None:
    """Dose response of one group.

    p comes from 9999 seeded permutations of the outcomes over the samples, drawn as counts from the multivariate
    hypergeometric distribution. The observed order counts as one more.

    Args:
        alphas: distinct strengths.
        successes: empathetic samples at each strength.
        trials: samples at each strength, >= 1.

    Returns:
        None where nothing varies: a single α, or equal outcomes.
    """
    order = np.argsort(alphas)
    hits, sizes = np.asarray(successes)[order], np.asarray(trials)[order]
    total = int(hits.sum())
    if len(sizes) < 2 or total in (0, int(sizes.sum())):
        return None
    doubled = _doubled_ranks(sizes)
    null = _null_rank_sums(tuple(int(size) for size in sizes), total)
    observed = int(hits @ doubled)
    as_large = len(null) - int(np.searchsorted(null, observed, side="left"))
    samples = int(sizes.sum())
    ranks, rate = doubled / 2, total / samples
    centred = ranks - (samples + 1) / 2
    spread = math.sqrt(float(sizes @ centred**2) * samples * rate * (1 - rate))
    # Spearman's ρ: Pearson's correlation of ranks and outcomes, since the ranks of a 0/1 series are its values, scaled
    return Trend(rho=float(hits @ centred) / spread, p=(1 + as_large) / (1 + len(null)))


def _doubled_ranks(sizes: Integers) -> Integers:
    """Twice the mean rank of each group's samples, as integers, which compare exactly. Groups are in ascending α."""
    ends = np.cumsum(sizes)
    return np.asarray(2 * ends - sizes + 1)


@lru_cache(maxsize=256)
def _null_rank_sums(sizes: tuple[int, ...], total: int) -> Integers:
    """Sorted rank sums of shuffled outcomes. Groups of one grid share sizes, so most calls hit the cache."""
    draws = np.random.default_rng(_PERMUTATION_SEED).multivariate_hypergeometric(
        sizes, total, size=PERMUTATIONS, method="marginals"
    )
    return np.sort(draws @ _doubled_ranks(np.asarray(sizes)))
