"""Statistics on counts of empathetic samples: intervals, exact tests, dose response, asymmetry.

The `paper` metric uses only the sign of an effect. These functions measure how certain that sign is. All take plain
numbers or arrays; `batch_jobs.scoring.scores_csv` groups the rows, and separates α that failed from α whose effect the
unsteered rate rules out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy.stats import hypergeom

Z_95_PERCENT: Final = 1.959963984540054
PERMUTATIONS: Final = 9999
"""Permutations for each trend's p. The smallest possible p is 1e-4."""
_PERMUTATION_SEED = 20251116  # any constant: the same counts must give the same p in every run

Integers = npt.NDArray[np.integer[Any]]
Floats = npt.NDArray[np.float64]


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share (Wilson 1927).

    Raises:
        ValueError: unless 0 <= successes <= trials and trials > 0.
    """
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"{successes} of {trials} is not a share; give 0 <= successes <= trials with trials >= 1.")
    share, z2 = successes / trials, Z_95_PERCENT**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z_95_PERCENT / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    # at a share of 0 or 1 the bound equals the share exactly; rounding must not push it past
    return min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))


def directional_p(
    signs: Integers, successes: Integers, trials: Integers, baseline_successes: Integers, baseline_trials: Integers
) -> Floats:
    """Fisher's exact one-sided p of each condition against its baseline, in the direction given by the sign of α.

    Samples count as independent. Seeds shared between strengths make samples similar, which errs towards larger p.

    Args:
        signs: (N,) sign of α, +1 or -1; one entry per condition, as in all arguments.
        successes: (N,) empathetic samples.
        trials: (N,) samples, >= 1.
        baseline_successes: (N,) empathetic unsteered samples.
        baseline_trials: (N,) unsteered samples, >= 1.

    Returns:
        (N,) float64 in (0, 1]: the chance, under no effect and with both margins fixed, of at least as many successes
        (sign +1) or at most as many (sign -1) as observed.
    """
    if len(signs) == 0:
        return np.empty(0)
    cells = np.stack([signs, successes, trials, baseline_successes, baseline_trials], axis=1)
    # even a grid of many conditions has few distinct tables of counts
    distinct, place = np.unique(cells, axis=0, return_inverse=True)
    sign, hits, tries, base_hits, base_tries = distinct.T
    law = hypergeom(tries + base_tries, hits + base_hits, tries)
    p = np.where(sign > 0, law.sf(hits - 1), law.cdf(hits))
    return np.asarray(np.minimum(p, 1.0)[place.reshape(-1)], dtype=np.float64)


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


@dataclass(frozen=True)
class Balance:
    """Effects of +α and -α, over the |α| that were run with both signs."""

    gain: float
    """Mean of rate(+|α|) - rate(0), in -1..1."""
    loss: float
    """Mean of rate(0) - rate(-|α|), in -1..1."""
    index: float | None
    """(gain - loss) / (|gain| + |loss|), in -1..1: 1 when only +α moves the rate (or when both signs raise it), -1 when
    only -α moves it (or both lower it), 0 when the effects mirror each other. None when neither sign moves the rate, or
    the baseline is 0 or 1, where one sign cannot have an effect."""


def balance(rates: Mapping[float, float], baseline: float) -> Balance | None:
    """Compare the two signs of α. None when no |α| was run with both signs.

    `rates`: nonzero α -> empathetic rate. `baseline`: rate at α = 0.
    """
    paired = [alpha for alpha in rates if alpha > 0 and -alpha in rates]
    if not paired:
        return None
    gain = math.fsum(rates[alpha] - baseline for alpha in paired) / len(paired)
    loss = math.fsum(baseline - rates[-alpha] for alpha in paired) / len(paired)
    moved = abs(gain) + abs(loss)
    return Balance(gain, loss, (gain - loss) / moved if moved and 0.0 < baseline < 1.0 else None)
