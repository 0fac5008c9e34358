"""Validation results of a study's directions, and the file that stores them, `validation.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pydantic

from batch_jobs.config.study import DirectionMethod
from batch_jobs.directions.baselines import RandomBaseline
from batch_jobs.directions.validate_layer import LayerValidation, ValidationError
from batch_jobs.files.atomic import write_atomically
from batch_jobs.files.documents import read_json


@dataclass(frozen=True)
class MethodValidation:
    """How well one method's direction separates the test texts, to compare the methods at one layer."""

    auroc: float
    auroc_low: float
    """Lower end of the AUROC's 95 % bootstrap interval."""
    auroc_high: float
    accuracy: float
    """With the threshold at the midpoint of the test class means, as in the paper."""
    accuracy_train_threshold: float
    """With the threshold at the midpoint of the train class means."""
    cosine: float
    """Cosine similarity to the mean difference at this layer, -1..1; 1 for the mean difference itself."""


@dataclass(frozen=True)
class PoolingValidation:
    """Mean-difference directions made and tested under one pooling."""

    skip_first: int
    """Leading tokens left out of every mean; 0 means all tokens count."""
    blocks: dict[int, LayerValidation]
    """Block read (0-based) -> validation of the mean difference at its output. Its `layer` is the block as well,
    regardless of `extract_offset`."""
    mean_residual_norms: dict[int, float]
    """Block read -> mean L2 norm of the train texts' readouts, in units of the residual stream."""

    @property
    def label(self) -> str:
        """The pooling in words."""
        if self.skip_first == 0:
            return "all tokens"
        return "without the first token" if self.skip_first == 1 else f"without the first {self.skip_first} tokens"


@dataclass(frozen=True)
class AblatedLayer:
    """One layer's direction on the test texts, before and after the replacement of empathy words.

    Only the positive test texts change; the direction and `threshold_train` stay the same.
    """

    before: LayerValidation
    after: LayerValidation


@dataclass(frozen=True)
class LexicalAblation:
    """Tests whether the direction reads more than empathy words: they are replaced in the positive test texts."""

    keywords: int
    """Size of the word list; each keyword counts once, regardless of its number of forms."""
    replacements: tuple[int, ...]
    """Words replaced in each positive test text, in the order of the test pairs."""
    layers: dict[int, AblatedLayer]
    """Layer -> its mean-difference direction before and after."""


@dataclass(frozen=True)
class Validation:
    """Content of `validation.json`.

    `layers`, `methods`, `random_baseline` and `ablation` are keyed by the direction's layer and use the study's own
    pooling.
    """

    layers: dict[int, LayerValidation]
    """Layer -> validation of its mean-difference direction."""
    best_layer: int
    mean_residual_norms: dict[int, float]
    """Layer -> mean residual norm at the output of that block, in units of the residual stream. A study's α in
    `residual_norm` is a multiple of it."""
    skip_first: int
    """The study's own pooling, a key of `pooling`."""
    methods: dict[int, dict[DirectionMethod, MethodValidation]]
    """Layer -> method -> validation of its direction."""
    pooling: dict[int, PoolingValidation]
    """`skip_first` -> validation of every block read under that pooling."""
    random_baseline: dict[int, RandomBaseline]
    """Layer -> AUROCs of random directions there."""
    ablation: LexicalAblation | None
    """None when the study does not run it."""
    extra: dict[str, Any]
    """Facts for the reader that no computation uses: counts, cut length, offset."""

    @property
    def sweep(self) -> dict[int, LayerValidation]:
        """Every block read under the study's own pooling; all blocks of the model with `validation.all_layers`."""
        return self.pooling[self.skip_first].blocks


_TYPED_FIELDS = tuple(field.name for field in fields(Validation) if field.name != "extra")


def write_validation(path: Path, validation: Validation) -> None:
    """Write the fields as one JSON object, atomically.

    The entries of `extra` become fields of the same object. Numeric keys become strings.

    Raises:
        ValidationError: `extra` uses another field's name, or a value has no JSON form.
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
    """Read a file of `write_validation`.

    Raises:
        ValidationError: the file is absent, malformed or of an earlier version; the message names it.
    """
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
