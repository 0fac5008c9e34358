"""All that is known about a study's directions, and `validation.json`, which holds it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pydantic

from batch_jobs.config.study import DirectionMethod
from batch_jobs.directions.baselines import RandomBaseline
from batch_jobs.directions.layer_validation import LayerValidation, ValidationError
from batch_jobs.files.atomic import write_atomically
from batch_jobs.files.documents import read_json


@dataclass(frozen=True)
class MethodValidation:
    """How a direction made by one method separates the test texts, beside the other methods at the same layer."""

    auroc: float
    auroc_low: float
    """Ends of the 95 % bootstrap interval."""
    auroc_high: float
    accuracy: float
    """At the midpoint of the test class means, as in the paper."""
    accuracy_train_threshold: float
    """At the midpoint of the train class means."""
    cosine: float
    """Cosine similarity to the mean difference at this layer, -1..1; 1 for the mean difference itself."""


@dataclass(frozen=True)
class PoolingValidation:
    """Mean-difference directions made and tested on readouts that leave the same leading tokens out."""

    skip_first: int
    """Leading tokens left out of every mean; 0: all tokens are in."""
    blocks: dict[int, LayerValidation]
    """Block read (0-based) -> the mean difference at its output on the test texts. `layer` in it is the block too,
    whatever `extract_offset` is."""
    mean_residual_norms: dict[int, float]
    """Block read -> mean over the train texts of the L2 norm of the text's readout, in units of the residual
    stream."""

    @property
    def label(self) -> str:
        """The pooling in words."""
        if self.skip_first == 0:
            return "all tokens"
        return "without the first token" if self.skip_first == 1 else f"without the first {self.skip_first} tokens"


@dataclass(frozen=True)
class AblatedLayer:
    """One layer's direction on the test texts, with the empathic ones as they are and with words replaced.

    The direction and `threshold_train` are the same in both: only the empathic test texts changed.
    """

    before: LayerValidation
    after: LayerValidation


@dataclass(frozen=True)
class LexicalAblation:
    """Does the direction read more than empathy words? The empathic test texts, those words replaced by others."""

    keywords: int
    """Size of the word list, each keyword counted once however many forms it has."""
    replacements: tuple[int, ...]
    """Words replaced in each empathic test text, in the order of the test pairs."""
    layers: dict[int, AblatedLayer]
    """Layer -> its mean-difference direction before and after."""


@dataclass(frozen=True)
class Validation:
    """What `validation.json` holds. `layers`, `methods`, `random_baseline` and `ablation` go by the direction's layer
    and use the study's own pooling."""

    layers: dict[int, LayerValidation]
    """Layer -> its mean-difference direction on the test texts."""
    best_layer: int
    mean_residual_norms: dict[int, float]
    """Layer -> what a study's α in `residual_norm` is a multiple of: the mean residual norm at the output of that
    block, in units of the residual stream."""
    skip_first: int
    """The study's own pooling, a key of `pooling`."""
    methods: dict[int, dict[DirectionMethod, MethodValidation]]
    """Layer -> method -> how its direction does."""
    pooling: dict[int, PoolingValidation]
    """`skip_first` -> the same validation of every block read under that pooling."""
    random_baseline: dict[int, RandomBaseline]
    """Layer -> what directions drawn at random reach there."""
    ablation: LexicalAblation | None
    """None when the study leaves it out."""
    extra: dict[str, Any]
    """Facts for the reader that nothing is computed from: counts, cut length, offset."""

    @property
    def sweep(self) -> dict[int, LayerValidation]:
        """Every block read under the study's own pooling; all of the model's with `validation.all_layers`."""
        return self.pooling[self.skip_first].blocks


_TYPED_FIELDS = tuple(field.name for field in fields(Validation) if field.name != "extra")


def write_validation(path: Path, validation: Validation) -> None:
    """Write the fields as one JSON object, atomically; those of `extra` stand beside the others.

    Numbers that are keys become strings. Raises ValidationError when `extra` uses another field's name or something
    is not what JSON can hold.
    """
    if clash := sorted({*_TYPED_FIELDS, "extra"} & set(validation.extra)):
        raise ValidationError(f"The extra fields {clash} are reserved; give them another name.")
    document = asdict(validation)
    document |= document.pop("extra")
    try:
        text = json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise ValidationError(
            f"The validation results cannot be written as JSON ({error}); use finite numbers and strings."
        ) from error
    write_atomically(path, text + "\n")


def read_validation(path: Path) -> Validation:
    """Read what `write_validation` wrote. Raises ValidationError, naming the file, when it is absent or not of that
    form, as the files of earlier versions are."""
    if not path.exists():
        raise ValidationError(f"There is no validation file {path}; run the study's validation first.")
    document = read_json(path, advice="write it again by running the validation", error=ValidationError)
    if not isinstance(document, dict):
        raise ValidationError(
            f"{path}: got {type(document).__name__}; it must hold a JSON object. Run the study again."
        )
    if missing := [name for name in _TYPED_FIELDS if name not in document]:
        raise ValidationError(
            f"{path} lacks {', '.join(missing)}; it is of an earlier version, so run the study again."
        )
    typed = {name: document.pop(name) for name in _TYPED_FIELDS}
    try:
        validation = pydantic.TypeAdapter(Validation).validate_python({**typed, "extra": document})
    except pydantic.ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in fault["loc"])
        raise ValidationError(f"{path}: field {place}: {fault['msg']}; run the study again.") from error
    for name, value, known in (
        ("best_layer", validation.best_layer, validation.layers),
        ("skip_first", validation.skip_first, validation.pooling),
    ):
        if value not in known:
            raise ValidationError(f"{path} names {name} {value} but has results for {sorted(known)} only.")
    return validation
