"""Does a direction separate held-out texts? AUROC, accuracy and separation of the two classes' projections.

Shape suffixes: N texts, D hidden size. Needs numpy and scikit-learn only, so results can be checked where no
engine is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import roc_auc_score

from batch_jobs.atomic_file import write_atomically
from vllm_steer.errors import SteerError

Floats = npt.NDArray[np.floating[Any]]

# Published directions are often stored in float16, whose rounding moves the norm by up to about 1e-3.
UNIT_NORM_TOLERANCE = 1e-2
RESERVED_KEYS = frozenset({"layers", "best_layer"})


class ValidationError(SteerError):
    """The readouts, direction or file handed to validation cannot be used; the message says which and why."""


@dataclass(frozen=True)
class LayerValidation:
    """How well one direction tells empathic from non-empathic test texts at one layer.

    All but `auroc` and `accuracy` (both in 0..1) are in the units of the residual stream, since the direction
    has norm 1.
    """

    layer: int
    """0-based decoder block whose output was read."""
    auroc: float
    """Chance that a random empathic text projects higher than a random non-empathic one; ties count one
    half."""
    accuracy: float
    """Share of test texts on the right side of `threshold` (at or above it reads as empathic)."""
    threshold: float
    """Midpoint of the two class means below: it is fitted on the test texts, so `accuracy` is slightly
    optimistic."""
    mean_empathic: float
    mean_non_empathic: float
    separation: float
    """`mean_empathic - mean_non_empathic`; negative when the direction points the wrong way."""
    std_empathic: float
    """Population standard deviation (divided by N, not N - 1), as in the paper's tables."""
    std_non_empathic: float

    @property
    def separation_in_stds(self) -> float:
        """Separation over the root mean square of the two stds; comparable across layers. inf when both are
        0."""
        spread = math.sqrt((self.std_empathic**2 + self.std_non_empathic**2) / 2)
        if spread == 0.0:
            return math.copysign(math.inf, self.separation) if self.separation else 0.0
        return self.separation / spread


@dataclass(frozen=True)
class Validation:
    """What `validation.json` holds: results by layer, the best layer, and whatever else the study
    recorded."""

    layers: dict[int, LayerValidation]
    best_layer: int
    extra: dict[str, Any]


def validate_layer(layer: int, empathic_ND: Floats, non_empathic_ND: Floats, direction_D: Floats) -> LayerValidation:
    """Project held-out readouts on a unit direction and measure how well the classes part.

    `empathic_ND`, `non_empathic_ND`: any float dtype, (N, D), one pooled readout a row; the two N may differ,
    each >= 1. `direction_D`: (D,), norm 1. Everything is computed in float64. Method: paper, section on probe
    validation (AUROC; threshold halfway between the test means; population standard deviations).

    Raises ValidationError for a wrong shape, an empty class, a value that is not finite, or a direction not
    of norm 1.
    """
    direction_D = np.asarray(direction_D, dtype=np.float64)
    if direction_D.ndim != 1:
        raise ValidationError(
            f"layer {layer}: the direction has shape {direction_D.shape}; it must be one vector, (D,)."
        )
    norm = float(np.linalg.norm(direction_D))
    # written this way round so that a NaN norm is refused too
    if not abs(norm - 1.0) <= UNIT_NORM_TOLERANCE:
        raise ValidationError(f"layer {layer}: the direction has norm {norm:.4g}; divide it by its norm first.")
    empathic = _project(layer, "empathic", empathic_ND, direction_D)
    non_empathic = _project(layer, "non-empathic", non_empathic_ND, direction_D)

    scores = np.concatenate([empathic, non_empathic])
    is_empathic = np.concatenate([np.ones(len(empathic)), np.zeros(len(non_empathic))])
    mean_empathic, mean_non_empathic = float(empathic.mean()), float(non_empathic.mean())
    threshold = (mean_empathic + mean_non_empathic) / 2
    return LayerValidation(
        layer=layer,
        auroc=float(roc_auc_score(is_empathic, scores)),
        accuracy=float(np.mean((scores >= threshold) == (is_empathic == 1))),
        threshold=threshold,
        mean_empathic=mean_empathic,
        mean_non_empathic=mean_non_empathic,
        separation=mean_empathic - mean_non_empathic,
        std_empathic=float(empathic.std()),
        std_non_empathic=float(non_empathic.std()),
    )


def best_layer(results: Mapping[int, LayerValidation]) -> int:
    """The layer of highest AUROC. With few test texts many layers tie at 1.0, so ties go to the larger
    separation in standard deviations, then to the lower layer. Raises ValidationError when there is no
    result."""
    if not results:
        raise ValidationError("There are no validation results; validate at least one layer.")
    return max(results, key=lambda layer: (results[layer].auroc, results[layer].separation_in_stds, -layer))


def write_validation(
    path: Path, results: Mapping[int, LayerValidation], extra: Mapping[str, Any] | None = None
) -> None:
    """Write `{"layers": {"8": {...}}, "best_layer": 8, **extra}` as JSON, atomically.

    `extra` is anything JSON can hold: counts, pooling, mean residual norms by layer (integer keys become
    strings). Raises ValidationError when there is no result, or `extra` uses a reserved key or holds what
    JSON cannot.
    """
    extra = extra or {}
    if clash := RESERVED_KEYS & set(extra):
        raise ValidationError(f"The extra fields {sorted(clash)} are reserved; give them another name.")
    document = {
        "layers": {str(layer): asdict(results[layer]) for layer in sorted(results)},
        "best_layer": best_layer(results),
        **extra,
    }
    try:
        text = json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise ValidationError(
            f"The validation results cannot be written as JSON ({error}); use finite numbers and strings."
        ) from error
    write_atomically(Path(path), text + "\n")


def read_validation(path: Path) -> Validation:
    """Read what `write_validation` wrote. Raises ValidationError, naming the file, when it is absent or not
    of that form."""
    path = Path(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValidationError(f"There is no validation file {path}; run the study's validation first.") from error
    except ValueError as error:
        raise ValidationError(f"{path} is not JSON ({error}); write it again by running the validation.") from error
    names = [field.name for field in fields(LayerValidation)]
    try:
        layers = {
            int(key): LayerValidation(**{name: entry[name] for name in names})
            for key, entry in document["layers"].items()
        }
        best = int(document["best_layer"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValidationError(
            f"{path} lacks or misspells {error}; it must hold 'best_layer' and, for each layer, {', '.join(names)}."
        ) from error
    if best not in layers:
        raise ValidationError(f"{path} names layer {best} as best but has results for {sorted(layers)} only.")
    return Validation(
        layers=layers,
        best_layer=best,
        extra={key: value for key, value in document.items() if key not in RESERVED_KEYS},
    )


def _project(layer: int, name: str, readouts_ND: Floats, direction_D: Floats) -> npt.NDArray[np.float64]:
    readouts_ND = np.asarray(readouts_ND, dtype=np.float64)
    size = direction_D.shape[0]
    if readouts_ND.ndim != 2 or readouts_ND.shape[0] == 0 or readouts_ND.shape[1] != size:
        raise ValidationError(
            f"layer {layer}: the {name} readouts have shape {readouts_ND.shape}; the direction needs "
            f"(N, {size}) with N >= 1."
        )
    if not np.isfinite(readouts_ND).all():
        raise ValidationError(f"layer {layer}: the {name} readouts hold NaN or infinity; look for a failed readout.")
    projections: npt.NDArray[np.float64] = readouts_ND @ direction_D
    return projections
