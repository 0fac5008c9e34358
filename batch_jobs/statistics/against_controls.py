"""A direction against random directions of its length that went through the same grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy import stats

from batch_jobs.statistics.blocks import Block, Outcomes, stratified_t_interval

PERMUTATIONS: Final = 9999
MOST_SHUFFLED_BLOCKS: Final = 1000
"""With more blocks the p comes from the normal distribution with the permutations' exact mean and variance."""
_SEED: Final = 20251116  # any constant: the same outcomes must give the same p in every run

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class AgainstControls:
    """Δ of a direction against the mean Δ of its controls, over the blocks that all of them have.

    Δ of a block is its mean outcome at +α minus that at -α, over the |α| run with both signs.
    """

    blocks: int
    delta: float
    """Mean Δ of the direction."""
    control_deltas: tuple[float, ...]
    """Mean Δ of each control."""
    control_mean: float
    difference: float
    """`delta - control_mean`, in -2..2."""
    difference_low: float | None
    """95 % interval over blocks, Student's t with the scenarios as fixed strata; for these controls, not for all random
    directions. None where all blocks agree or no scenario has two."""
    difference_high: float | None
    p: float
    """Two-sided, by permutation: within each block any of the directions is as likely to be the real one. Small where
    the direction differs from these controls by more than seeds explain."""
    rank_p: float
    """(1 + controls with a Δ at least as large) / (1 + controls), one-sided: the direction's place among random
    directions. Random directions differ from each other too, and only this p takes that into account."""
    rank_p_floor: float
    """1 / (1 + controls): no `rank_p` can be smaller. 19 controls allow 0.05."""


def against_controls(
    direction: Outcomes, controls: Sequence[Outcomes], *, permutations: int = PERMUTATIONS
) -> AgainstControls | None:
    """Compare a direction with its controls; None without controls or without a block that all have Δ in.

    Args:
        direction: outcomes of the direction; α = 0 is not used.
        controls: outcomes of each control.
        permutations: shuffles for `p`; fewer for simulations.
    """
    deltas = [_block_deltas(outcomes) for outcomes in (direction, *controls)]
    blocks = sorted(set.intersection(*(set(found) for found in deltas)))
    if not controls or not blocks:
        return None
    values_DB = np.array([[found[block] for block in blocks] for found in deltas])
    means = values_DB.mean(axis=1)
    differences_B = values_DB[0] - values_DB[1:].mean(axis=0)
    low, high = stratified_t_interval(differences_B, [scenario for scenario, _ in blocks])
    # equal Δ may differ in their last bits, and count as equal
    as_large = int((means[1:] >= means[0] - 1e-9).sum())
    return AgainstControls(
        blocks=len(blocks),
        delta=float(means[0]),
        control_deltas=tuple(means[1:].tolist()),
        control_mean=float(means[1:].mean()),
        difference=float(differences_B.mean()),
        difference_low=low,
        difference_high=high,
        p=_label_p(values_DB, permutations),
        rank_p=(1 + as_large) / (1 + len(controls)),
        rank_p_floor=1 / (1 + len(controls)),
    )


def _block_deltas(outcomes: Outcomes) -> dict[Block, float]:
    """Δ of each block that has an |α| with both signs. |α| that another block has and this one lacks do not count."""
    found = {}
    for block, cells in outcomes.items():
        paired = [alpha for alpha in cells if alpha > 0 and -alpha in cells]
        if paired:
            steps = (cells[alpha][0] / cells[alpha][1] - cells[-alpha][0] / cells[-alpha][1] for alpha in paired)
            found[block] = math.fsum(steps) / len(paired)
    return found


def _label_p(values_DB: Floats, permutations: int) -> float:
    directions, blocks = values_DB.shape
    # difference of a block if direction d were the real one: v_d - mean of the others
    as_real_DB = (directions * values_DB - values_DB.sum(axis=0)) / (directions - 1)
    observed = abs(float(as_real_DB[0].sum()))
    if blocks > MOST_SHUFFLED_BLOCKS:
        variance = float((as_real_DB**2).mean(axis=0).sum())
        return 1.0 if variance == 0.0 else float(2 * stats.norm.sf(observed / math.sqrt(variance)))
    random = np.random.default_rng(_SEED)
    total = np.zeros(permutations)
    for block_D in as_real_DB.T:
        total += block_D[random.integers(directions, size=permutations)]
    as_large = int((np.abs(total) >= observed - 1e-9).sum())
    return (1 + as_large) / (1 + permutations)
