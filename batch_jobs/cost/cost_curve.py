"""The cost of steering by layer, direction and α, and the file that stores it, `cost.json`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from batch_jobs.errors import StudyError
from batch_jobs.files.atomic import write_atomically


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


def write_cost(path: Path, points: Sequence[CostPoint]) -> None:
    """Write the points as JSON, atomically."""
    write_atomically(path, _POINTS.dump_json(tuple(points), indent=1).decode() + "\n")


def read_cost(path: Path) -> tuple[CostPoint, ...]:
    """Read a file of `write_cost`.

    Raises:
        StudyError: the file is absent or malformed; the message names it.
    """
    try:
        return _POINTS.validate_json(path.read_bytes())
    except FileNotFoundError:
        raise StudyError(f"There is no cost file {path}; run the study with its section cost.") from None
    except ValidationError as error:
        raise StudyError(f"{path}: {error.errors(include_url=False)[0]['msg']}; delete it and run the study.") from None


_POINTS = TypeAdapter(tuple[CostPoint, ...])
