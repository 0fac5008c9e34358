"""What the counts of empathetic samples say of steering: intervals, exact tests, dose response, asymmetry.

The `paper` metric asks for the sign of an effect only. Here the same counts are asked how sure that sign is, and the
α whose direction the unsteered rate makes impossible are told apart from those that failed. All functions take plain
numbers or arrays; which rows belong together is decided in `batch_jobs.scoring.scores`.
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
"""Shufflings behind each trend's p, so the smallest p that can come out is 1e-4."""
_PERMUTATION_SEED = 20251116  # any constant: the same counts must give the same p in every run

Integers = npt.NDArray[np.integer[Any]]
Floats = npt.NDArray[np.float64]


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share (Wilson 1927). Raises ValueError unless 0 <= successes <= trials,
    trials > 0."""
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"{successes} of {trials} is no share; give 0 <= successes <= trials with trials >= 1.")
    share, z2 = successes / trials, Z_95_PERCENT**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z_95_PERCENT / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    # at 0 and 1 the bound equals the share exactly; rounding must not push it past
    return min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))


def directional_p(
    signs: Integers, successes: Integers, trials: Integers, baseline_successes: Integers, baseline_trials: Integers
) -> Floats:
    """Fisher's exact one-sided p of each condition against its baseline, in the direction that α asks for.

    All arguments are (N,) integers, one entry a condition; `signs` is +1 or -1, the sign of α, and the trials are
    >= 1. Returns (N,) float64 in (0, 1]: the chance, both margins held, of at least as many successes (sign +1) or
    at most as many (sign -1) as were seen, were steering without effect. Samples count as independent; seeds shared
    between strengths make them alike, which errs towards larger p.
    """
    if len(signs) == 0:
        return np.empty(0)
    cells = np.stack([signs, successes, trials, baseline_successes, baseline_trials], axis=1)
    # a grid has few distinct tables of counts, however many conditions
    distinct, place = np.unique(cells, axis=0, return_inverse=True)
    sign, hits, tries, base_hits, base_tries = distinct.T
    law = hypergeom(tries + base_tries, hits + base_hits, tries)
    p = np.where(sign > 0, law.sf(hits - 1), law.cdf(hits))
    return np.asarray(np.minimum(p, 1.0)[place.reshape(-1)], dtype=np.float64)


@dataclass(frozen=True)
class Trend:
    """Does the empathetic rate rise with α? Over single samples, α = 0 among them."""

    rho: float
    """Spearman correlation of α with empathetic (0/1), in -1..1."""
    p: float
    """One-sided permutation p of a `rho` this large or larger; a falling rate gives a p near 1."""


def trend(alphas: Sequence[float], successes: Sequence[int], trials: Sequence[int]) -> Trend | None:
    """Dose response of one group: entry i says that `successes[i]` of `trials[i]` samples at `alphas[i]` were
    empathetic. The α are distinct, trials >= 1.

    p comes from 9999 seeded shufflings of the outcomes over the samples (so from the multivariate hypergeometric law of
    the counts), with the observed order counted in. None where nothing varies: one α, or all outcomes alike.
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
    # Pearson's correlation of ranks and outcomes; the ranks of a two-valued series are its values, scaled
    return Trend(rho=float(hits @ centred) / spread, p=(1 + as_large) / (1 + len(null)))


def _doubled_ranks(sizes: Integers) -> Integers:
    """Twice the mean rank of each group's samples, in integers, which compare exactly; groups come in ascending α."""
    ends = np.cumsum(sizes)
    return np.asarray(2 * ends - sizes + 1)


@lru_cache(maxsize=256)
def _null_rank_sums(sizes: tuple[int, ...], total: int) -> Integers:
    """Sorted rank sums of shuffled outcomes. Groups of one grid share sizes: most calls are answered from memory."""
    draws = np.random.default_rng(_PERMUTATION_SEED).multivariate_hypergeometric(
        sizes, total, size=PERMUTATIONS, method="marginals"
    )
    return np.sort(draws @ _doubled_ranks(np.asarray(sizes)))


@dataclass(frozen=True)
class Balance:
    """What +α and -α do, over the |α| that were run with both signs."""

    gain: float
    """Mean of rate(+|α|) - rate(0), in -1..1."""
    loss: float
    """Mean of rate(0) - rate(-|α|), in -1..1."""
    index: float | None
    """(gain - loss) / (|gain| + |loss|), in -1..1: 1 when only +α moves the rate (or when both signs raise it), -1 when
    only -α does (or both lower it), 0 when the two mirror each other. None when neither moves it, and when the baseline
    is 0 or 1, since then one sign has nowhere to go."""


def balance(rates: Mapping[float, float], baseline: float) -> Balance | None:
    """The two signs of α against each other. `rates`: α -> empathetic rate, nonzero α; `baseline`: rate at α = 0.
    None when no |α| was run with both signs."""
    paired = [alpha for alpha in rates if alpha > 0 and -alpha in rates]
    if not paired:
        return None
    gain = math.fsum(rates[alpha] - baseline for alpha in paired) / len(paired)
    loss = math.fsum(baseline - rates[-alpha] for alpha in paired) / len(paired)
    moved = abs(gain) + abs(loss)
    return Balance(gain, loss, (gain - loss) / moved if moved and 0.0 < baseline < 1.0 else None)
