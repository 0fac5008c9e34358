"""What +α does to a rate against -α, over the strengths run with both signs.

Δ = mean rate(+α) - mean rate(-α) needs no unsteered rate, so neither a floor nor a ceiling decides it beforehand.
`gain` and `loss` split it at the unsteered rate. Sums run on whole counts (`Fraction`), so equal effects differ by
exactly 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from batch_jobs.statistics.rates import Cell, Estimate, contrast_interval


@dataclass(frozen=True)
class SignEffects:
    """Effects of both signs of α on a rate, over the |α| run with both."""

    delta: Estimate
    """Mean rate(+|α|) - mean rate(-|α|), in -1..1. Its interval does not use the unsteered samples."""
    gain: float
    """Mean of rate(+|α|) - rate(0), in -1..1."""
    loss: float
    """Mean of rate(0) - rate(-|α|), in -1..1. `gain + loss` is Δ."""
    gain_minus_loss: Estimate
    """Above 0 where +α moves the rate more than -α does, in -2..2. The interval includes the uncertainty of the
    unsteered rate, which both effects are measured from."""


def delta(cells: Mapping[float, Cell]) -> Estimate | None:
    """Δ with its 95 % interval; None where no |α| was run with both signs.

    `cells`: α -> successes and samples (>= 1). α without its opposite, and α = 0, do not count.
    """
    up, down = _sides(cells)
    return contrast_interval((up, down), (1.0, -1.0), float(_mean(up) - _mean(down))) if up else None


def sign_effects(cells: Mapping[float, Cell], unsteered: Cell) -> SignEffects | None:
    """All effects; None where no |α| was run with both signs.

    Args:
        cells: as for `delta`.
        unsteered: successes and samples (>= 1) at α = 0.
    """
    found = delta(cells)
    if found is None:
        return None
    up, down = _sides(cells)
    base = Fraction(*unsteered)
    gain, loss = _mean(up) - base, base - _mean(down)
    difference = contrast_interval((up, down, [unsteered]), (1.0, 1.0, -2.0), float(gain - loss))
    return SignEffects(found, float(gain), float(loss), difference)


def _sides(cells: Mapping[float, Cell]) -> tuple[list[Cell], list[Cell]]:
    """The cells at +α and at -α, in the same order of |α|."""
    paired = sorted(alpha for alpha in cells if alpha > 0 and -alpha in cells)
    return [cells[alpha] for alpha in paired], [cells[-alpha] for alpha in paired]


def _mean(cells: list[Cell]) -> Fraction:
    return sum((Fraction(*cell) for cell in cells), Fraction(0)) / len(cells)
