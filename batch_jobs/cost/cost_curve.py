"""The cost of steering by layer, direction and α, and the file that stores it, `cost.json`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from batch_jobs.cost.materials import CostMaterials
from batch_jobs.errors import StudyError
from batch_jobs.files.atomic import write_atomically
from batch_jobs.rows.grid import Condition


@dataclass(frozen=True)
class CostPoint:
    """The model under one steering."""

    layer: int | None
    """None for the unsteered model."""
    direction: str | None
    alpha: float
    """Raw; 0 for the unsteered model."""
    alpha_residual_norm: float | None
    perplexity: float
    """exp of minus the mean log-probability of a token of the neutral texts, > 1 in practice."""
    choice_accuracy: float
    """Share of the questions whose right option has the largest log-probability, 0 to 1."""
    tokens: int
    """Tokens of neutral text."""
    choices: int
    """Questions."""


@dataclass(frozen=True)
class CostCurve:
    """Content of `cost.json`."""

    materials: str
    """`CostMaterials.content_hash` of what was read and answered."""
    points: tuple[CostPoint, ...]
    """The unsteered model first."""

    def covers(self, materials: CostMaterials, cells: Iterable[Condition]) -> bool:
        """Whether the curve has a point for every steering of `cells` on these materials."""
        known = {(point.layer, point.direction, point.alpha) for point in self.points}
        wanted = {(cell.layer, cell.direction, cell.alpha) for cell in cells if cell.steered}
        return self.materials == materials.content_hash and wanted <= known


def write_cost(path: Path, curve: CostCurve) -> None:
    """Write the curve as JSON, atomically."""
    write_atomically(path, _CURVE.dump_json(curve, indent=1).decode() + "\n")


def read_cost(path: Path) -> CostCurve:
    """Read a file of `write_cost`.

    Raises:
        StudyError: the file is absent or malformed; the message names it.
    """
    try:
        return _CURVE.validate_json(path.read_bytes())
    except FileNotFoundError:
        raise StudyError(f"There is no cost file {path}; run the study with its section cost.") from None
    except ValidationError as error:
        raise StudyError(f"{path}: {error.errors(include_url=False)[0]['msg']}; delete it and run the study.") from None


_CURVE = TypeAdapter(CostCurve)
