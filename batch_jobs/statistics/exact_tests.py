"""Exact tests of counts, and p values corrected for how many there are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy import stats

MOST_BOSCHLOO_SAMPLES: Final = 50
"""Samples on one side above which a condition gets Fisher's p. Boschloo's takes seconds there, and gains little."""

Integers = npt.NDArray[np.integer[Any]]
Floats = npt.NDArray[np.float64]


def directional_p(
    signs: Integers, successes: Integers, trials: Integers, baseline_successes: Integers, baseline_trials: Integers
) -> Floats:
    """Boschloo's exact one-sided p of each condition against its baseline, in the direction given by the sign of α.

    Boschloo's test (1970, scipy's `boschloo_exact`) orders the tables by Fisher's p and takes the largest chance, over
    all common rates, of one as extreme. It is never less powerful than Fisher's, which also fixes the total of
    successes: 5 of 5 against 0 of 5 has p .0010, Fisher's .0040. Samples count as independent. Seeds shared between
    strengths make samples similar, which errs towards larger p.

    Args:
        signs: (N,) sign of α, +1 or -1; one entry per condition, as in all arguments.
        successes: (N,) empathetic samples.
        trials: (N,) samples, >= 1.
        baseline_successes: (N,) empathetic unsteered samples.
        baseline_trials: (N,) unsteered samples, >= 1.

    Returns:
        (N,) float64 in (0, 1]. With more than 50 samples on a side, Fisher's p, which is never smaller.
    """
    cells = np.stack([signs, successes, trials, baseline_successes, baseline_trials], axis=1).astype(np.int64)
    return np.array([_directional_p(*cell) for cell in cells.tolist()], dtype=np.float64)


@lru_cache(maxsize=65536)  # even a grid of many conditions has few distinct tables of counts
def _directional_p(sign: int, hits: int, tries: int, base_hits: int, base_tries: int) -> float:
    if sign < 0:  # a fall of successes is a rise of failures
        return _directional_p(1, tries - hits, tries, base_tries - base_hits, base_tries)
    total = hits + base_hits
    if hits == 0 or total == tries + base_tries:
        return 1.0  # no table rises less
    if max(tries, base_tries) > MOST_BOSCHLOO_SAMPLES:
        return min(1.0, float(stats.hypergeom(tries + base_tries, total, tries).sf(hits - 1)))
    table = [[hits, base_hits], [tries - hits, base_tries - base_hits]]
    return min(1.0, float(stats.boschloo_exact(table, alternative="greater").pvalue))


def false_discovery_q(p_values: Sequence[float | None]) -> list[float | None]:
    """Benjamini and Hochberg's adjusted p of each value that is not None: reject those up to q, and a share of at most
    q of the rejected is expected to be false."""
    known = [p for p in p_values if p is not None]
    adjusted = iter(stats.false_discovery_control(known).tolist() if known else [])
    return [None if p is None else next(adjusted) for p in p_values]


def holm_p(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's (1979) adjusted p of each value that is not None: reject those up to 0.05, and the chance of any false
    rejection is at most 0.05."""
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[index] = largest
    return adjusted
