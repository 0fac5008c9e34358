"""The grid of a study: conditions (scenario × layer × α) and their rows (one per sample), with stable ids and
seeds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from batch_jobs.config.study import Study


@dataclass(frozen=True)
class Condition:
    """One cell of the grid. Its samples differ only in the seed."""

    model: str
    """The name in the study, not the path of the files, so that ids agree between machines."""
    layer: int
    direction: str
    alpha: float
    """Raw multiplier of the unit direction, in the units of the residual stream."""
    alpha_residual_norm: float
    """The same strength in multiples of the layer's mean residual norm."""
    alpha_unit: Literal["raw", "residual_norm"]
    """Which of the two the study states; the other one is computed from the measured norm."""
    scenario_id: str
    op: Literal["add", "ablate", "set"]
    span: str

    @property
    def steered(self) -> bool:
        """False at α = 0: the baseline runs without any steering entry, whatever the op."""
        return self.alpha != 0.0

    @property
    def canonical_json(self) -> str:
        """The fields that identify the condition, as JSON. α enters as stated: the derived one changes with the last
        bits of a measured norm."""
        stated = self.alpha if self.alpha_unit == "raw" else self.alpha_residual_norm
        return json.dumps(
            {
                "model": self.model,
                "layer": self.layer,
                "direction": self.direction,
                "alpha": stated,
                "alpha_unit": self.alpha_unit,
                "scenario": self.scenario_id,
                "op": self.op,
                "span": self.span,
            },
            sort_keys=True,
        )


@dataclass(frozen=True)
class Row:
    """One completion to generate."""

    row_id: str
    """16 hex digits; depends on the condition and the sample number only, never on the rest of the grid."""
    condition: Condition
    sample: int
    seed: int


def row_id(condition: Condition, sample: int) -> str:
    """First 16 hex digits (64 bits) of sha256(canonical condition, "#", sample)."""
    return hashlib.sha256(f"{condition.canonical_json}#{sample}".encode()).hexdigest()[:16]


def sample_seed(study_seed: int, scenario_id: str, sample: int) -> int:
    """Sampling seed in 0 .. 2**31 - 1, independent of α and layer.

    Sample k of a scenario gets the same random numbers at every strength, so differences between strengths are
    paired and less noisy than with independent draws. The baselines of two layers must then be identical, which
    makes a leak between requests visible.
    """
    digest = hashlib.sha256(f"{study_seed}/{scenario_id}/{sample}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def conditions(study: Study, mean_residual_norms: Mapping[int, float]) -> Iterator[Condition]:
    """Yield all conditions in nested order: layers, scenarios, α ascending, directions.

    α = 0 appears once per layer and scenario, under the first direction: the unsteered baseline of all directions is
    the same.

    Args:
        study: gives the grid.
        mean_residual_norms: layer -> mean residual norm, > 0, for every steered layer.
    """
    grid = study.steer
    for layer in grid.layers:
        norm = mean_residual_norms[layer]
        for scenario_id in grid.scenarios:
            for stated in sorted(grid.alphas):
                # + 0.0 turns a -0.0 of the config into 0.0, so that the baseline has one spelling
                alpha = stated + 0.0
                raw = alpha if grid.alpha_unit == "raw" else alpha * norm
                for method in grid.directions if alpha else grid.directions[:1]:
                    yield Condition(
                        model=study.model,
                        layer=layer,
                        direction=study.direction_name(method),
                        alpha=raw,
                        alpha_residual_norm=alpha / norm if grid.alpha_unit == "raw" else alpha,
                        alpha_unit=grid.alpha_unit,
                        scenario_id=scenario_id,
                        op=grid.op,
                        span=grid.span,
                    )


def rows(study: Study, cells: Iterable[Condition]) -> list[Row]:
    """Rows of the given conditions in their order, `study.steer.samples` for each."""
    return [
        Row(row_id(cell, sample), cell, sample, sample_seed(study.seed, cell.scenario_id, sample))
        for cell in cells
        for sample in range(study.steer.samples)
    ]


def study_rows(study: Study, mean_residual_norms: Mapping[int, float]) -> list[Row]:
    """All rows of a study's grid; see `conditions` for their order."""
    return rows(study, conditions(study, mean_residual_norms))
