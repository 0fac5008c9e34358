"""Dose-response curves: how one setting responds to α in one scenario."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from batch_jobs.scoring.scores_csv import ConditionScore
from batch_jobs.scoring.setting import Setting
from batch_jobs.statistics.rates import wilson_interval


@dataclass(frozen=True)
class DoseResponse:
    """The conditions of one setting and scenario in ascending α, including the unsteered one."""

    setting: Setting
    scenario: str
    rows: tuple[ConditionScore, ...]
    positive: str = "empathetic"
    """What a sample is that the outcome calls positive: the concept's positive pole."""

    @property
    def alphas(self) -> list[float]:
        """α of each condition."""
        return [row.alpha for row in self.rows]

    @property
    def in_norms(self) -> dict[float, float]:
        """α -> α over the layer's mean residual norm, where known."""
        return {row.alpha: row.alpha_residual_norm for row in self.rows if row.alpha_residual_norm is not None}

    @property
    def empathy_rates(self) -> list[float]:
        """Positive share of each condition."""
        return [row.empathy_rate for row in self.rows]

    @property
    def empathy_intervals(self) -> tuple[list[float], list[float]]:
        """Lower and upper ends of the 95 % Wilson intervals of `empathy_rates`."""
        return [row.empathy_low for row in self.rows], [row.empathy_high for row in self.rows]

    @property
    def coherence_rates(self) -> list[float]:
        """Coherent share of each condition."""
        return [row.coherence_rate for row in self.rows]

    @property
    def coherence_intervals(self) -> tuple[list[float], list[float]]:
        """Lower and upper ends of the 95 % Wilson intervals of `coherence_rates`."""
        ends = [wilson_interval(round(row.coherence_rate * row.samples), row.samples) for row in self.rows]
        return [low for low, _ in ends], [high for _, high in ends]


def dose_responses(conditions: Sequence[ConditionScore], positive: str = "empathetic") -> tuple[DoseResponse, ...]:
    """Make the curves of all settings and scenarios, in the order of the conditions. `positive`: the concept's pole.

    The grid runs α = 0 only once per layer and scenario, under its first direction, since nothing is added then. All
    settings of that model and layer share that row.
    """
    unsteered = {(row.model, row.layer, row.scenario): row for row in reversed(conditions) if row.alpha == 0.0}
    groups: dict[tuple[Setting, str], list[ConditionScore]] = {}
    for row in conditions:
        groups.setdefault((Setting.of(row), row.scenario), []).append(row)
    curves = []
    for (setting, scenario), rows in groups.items():
        if not any(row.alpha == 0.0 for row in rows):
            shared = unsteered.get((setting.model, setting.layer, scenario))
            rows = [*rows, shared] if shared is not None else rows
        curves.append(DoseResponse(setting, scenario, tuple(sorted(rows, key=lambda row: row.alpha)), positive))
    return tuple(curves)
