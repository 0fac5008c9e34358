"""The grid of a study: conditions (scenario × layer × direction × α) and their rows (one per sample), with stable ids
and seeds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from batch_jobs.config.steering import control_name, controlled_direction
from batch_jobs.config.study import AlphaUnit, Study


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
    alpha_unit: AlphaUnit
    """Which of the units the study states; the others are computed from what was measured."""
    scenario_id: str
    op: Literal["add", "ablate", "set"]
    span: str
    alpha_separation: float | None = None
    """The same strength in multiples of what separates the two sides of the train texts along the direction; a control
    has its direction's. None where that is unknown or not above 0."""

    @property
    def steered(self) -> bool:
        """False at α = 0: the baseline runs without any steering entry, whatever the op."""
        return self.alpha != 0.0

    @property
    def is_control(self) -> bool:
        """Whether the direction is a random control."""
        return controlled_direction(self.direction) is not None

    @property
    def canonical_json(self) -> str:
        """The fields that identify the condition, as JSON. α enters as stated: the derived one changes with the last
        bits of a measured norm."""
        in_units = {
            "raw": self.alpha,
            "residual_norm": self.alpha_residual_norm,
            "separation": self.alpha_separation,
        }
        return json.dumps(
            {
                "model": self.model,
                "layer": self.layer,
                "direction": self.direction,
                "alpha": in_units[self.alpha_unit],
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
    return _row_id(condition.canonical_json, sample)


def _row_id(canonical_json: str, sample: int) -> str:
    return hashlib.sha256(f"{canonical_json}#{sample}".encode()).hexdigest()[:16]


def sample_seed(study_seed: int, scenario_id: str, sample: int) -> int:
    """Sampling seed in 0 .. 2**31 - 1, independent of α and layer.

    Sample k of a scenario gets the same random numbers at every strength, so differences between strengths are
    paired and less noisy than with independent draws. The baselines of two layers must then be identical, which
    makes a leak between requests visible.
    """
    digest = hashlib.sha256(f"{study_seed}/{scenario_id}/{sample}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def conditions(
    study: Study, mean_residual_norms: Mapping[int, float], separations: Mapping[tuple[str, int], float] | None = None
) -> Iterator[Condition]:
    """Yield all conditions in nested order: layers, scenarios, α ascending, directions, each with its controls behind
    it.

    α = 0 appears once per layer and scenario, under the first direction: the unsteered baseline of all directions is
    the same.

    Args:
        study: gives the grid.
        mean_residual_norms: layer -> mean residual norm, > 0, for every steered layer.
        separations: (direction, layer) -> class separation of the train texts along it, in units of the residual
            stream; needed, > 0, for every direction that steers where the study's α are multiples of it.
    """
    for layer in study.steer.layers:
        for scenario_id in study.steer.scenarios:
            yield from _cells(study, layer, scenario_id, mean_residual_norms[layer], separations)


def _cells(
    study: Study,
    layer: int,
    scenario_id: str,
    mean_residual_norm: float,
    separations: Mapping[tuple[str, int], float] | None,
) -> Iterator[Condition]:
    """The conditions of one layer and scenario."""
    grid = study.steer
    number = grid.controls.random if grid.controls else 0
    names = _names(study, layer)
    for stated in sorted(grid.alphas):
        # + 0.0 turns a -0.0 of the config into 0.0, so that the baseline has one spelling
        alpha = stated + 0.0
        for name in names if alpha else names[:1]:
            separation = separations.get((name, layer)) if separations else None
            strength = _strength(study, alpha, mean_residual_norm, separation)
            controls = [control_name(name, index) for index in range(number)] if alpha else []
            for direction in (name, *controls):
                yield Condition(
                    model=study.model,
                    layer=layer,
                    direction=direction,
                    alpha_unit=grid.alpha_unit,
                    scenario_id=scenario_id,
                    op=grid.op,
                    span=grid.span,
                    **strength,
                )


def _names(study: Study, layer: int) -> list[str]:
    return [study.direction_name(entry) for entry in study.steer.directions_at(layer)]


def _num_cells(study: Study, layer: int) -> int:
    """Number of conditions of one scenario at a layer."""
    grid = study.steer
    steered = sum(alpha != 0 for alpha in grid.alphas)
    each = 1 + (grid.controls.random if grid.controls else 0)
    names = len(_names(study, layer))
    return steered * names * each + (len(grid.alphas) - steered) * min(names, 1)


def _strength(study: Study, alpha: float, norm: float, separation: float | None) -> dict[str, Any]:
    """A stated α in every unit, as fields of Condition. The stated one is exact."""
    unit = study.steer.alpha_unit
    usable = separation if separation is not None and separation > 0.0 else None
    if unit == "separation" and usable is None:
        raise ValueError(f"the separation is {separation} where α counts in separations; give one above 0")
    raw = alpha * {"raw": 1.0, "residual_norm": norm, "separation": usable or 1.0}[unit]
    return {
        "alpha": raw,
        "alpha_residual_norm": alpha if unit == "residual_norm" else raw / norm,
        "alpha_separation": alpha if unit == "separation" else raw / usable if usable else None,
    }


def rows(study: Study, cells: Iterable[Condition]) -> Iterator[Row]:
    """Rows of the given conditions in their order, `study.steer.samples` for each."""
    for cell in cells:
        canonical_json = cell.canonical_json
        for sample in range(study.steer.samples):
            seed = sample_seed(study.seed, cell.scenario_id, sample)
            yield Row(_row_id(canonical_json, sample), cell, sample, seed)


@dataclass(frozen=True)
class StudyRows:
    """All rows of a study's grid, made when they are asked for; see `conditions` for their order and the fields."""

    study: Study
    mean_residual_norms: Mapping[int, float]
    separations: Mapping[tuple[str, int], float] | None = None

    def __len__(self) -> int:
        """Number of rows."""
        grid = self.study.steer
        return grid.samples * len(grid.scenarios) * sum(_num_cells(self.study, layer) for layer in grid.layers)

    def __iter__(self) -> Iterator[Row]:
        """All rows."""
        return rows(self.study, conditions(self.study, self.mean_residual_norms, self.separations))

    def part(self, first: int, stop: int) -> Iterator[Row]:
        """The rows from number `first` to the one before `stop`, at the cost of these rows and a few conditions."""
        study, begin = self.study, 0
        for layer in study.steer.layers:
            size = _num_cells(study, layer) * study.steer.samples
            for scenario_id in study.steer.scenarios:
                if begin < stop and first < begin + size:
                    norm = self.mean_residual_norms[layer]
                    inside = rows(study, _cells(study, layer, scenario_id, norm, self.separations))
                    yield from islice(inside, max(0, first - begin), stop - begin)
                begin += size
