"""Validation results of a study's directions, and the file that stores them, `validation.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pydantic

from batch_jobs.config.study import DirectionMethod
from batch_jobs.directions.baselines import RandomBaseline
from batch_jobs.directions.layer_choice import LayerChoice
from batch_jobs.directions.left_out import LeftOutGroup
from batch_jobs.directions.validate_layer import LayerValidation, ValidationError
from batch_jobs.directions.word_baselines import BeyondWords, WordBaselines
from batch_jobs.files.atomic import write_atomically
from batch_jobs.files.documents import read_json


@dataclass(frozen=True)
class MethodValidation:
    """How well one method's direction separates the test texts, to compare the methods at one layer."""

    auroc: float
    auroc_low: float
    """Lower end of the AUROC's 95 % score interval."""
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
    """The directions and the word baselines on test texts whose positive side has its empathy words replaced.

    It shows what the replaced words contribute, not that a direction detects more than words: the words that are left
    often tell the sides apart as well, as `words` shows.
    """

    keywords: int
    """Size of the word list; each keyword counts once, regardless of its number of forms."""
    replacements: tuple[int, ...]
    """Words replaced in each positive test text, in the order of the test pairs."""
    layers: dict[int, AblatedLayer]
    """Layer -> its mean-difference direction before and after."""
    words: WordBaselines | None
    """The baselines of `Validation.words` after the replacement; the bag of words is still that of the unchanged train
    texts. None where an earlier word list made the texts that were read."""


@dataclass(frozen=True)
class Validation:
    """Content of `validation.json`.

    What is keyed by a layer is about the direction of that layer under the study's own pooling.
    """

    layers: dict[int, LayerValidation]
    """Layer -> validation of its mean-difference direction."""
    best_layer: int
    """The layer chosen by `layer_choice`, on train texts alone."""
    layer_choice: LayerChoice
    words: WordBaselines
    """Bag of words and length on the test texts."""
    beyond_words: dict[int, BeyondWords]
    """Layer -> its mean-difference direction against the bag of words."""
    left_out_scenarios: dict[str, LeftOutGroup]
    """Scenario -> its pairs, tested on directions of all other scenarios; empty with a single scenario."""
    left_out_writers: dict[str, LeftOutGroup]
    """The same by the model that wrote the pairs; empty unless the pairs name two or more."""
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
    """Layer -> random directions there."""
    ablation: LexicalAblation | None
    """None when the study does not run it."""
    extra: dict[str, Any]
    """Facts for the reader that no computation uses: counts, cut length, offset."""

    @property
    def sweep(self) -> dict[int, LayerValidation]:
        """Every block read under the study's own pooling; all blocks of the model with `validation.all_layers`."""
        return self.pooling[self.skip_first].blocks


class OutdatedValidation(ValidationError):
    """The file is of another version; it can be made again from the run's readouts (`current_validation`)."""


_FORMAT = 2
"""Files before format 2 name none."""
_TYPED_FIELDS = tuple(field.name for field in fields(Validation) if field.name != "extra")


def write_validation(path: Path, validation: Validation) -> None:
    """Write the fields as one JSON object with its `format`, atomically.

    The entries of `extra` become fields of the same object. Numeric keys become strings.

    Raises:
        ValidationError: `extra` uses another field's name, or a value has no JSON form.
    """
    if clash := sorted({*_TYPED_FIELDS, "extra", "format"} & set(validation.extra)):
        raise ValidationError(f"The extra fields {clash} are reserved; give them another name.")
    document = {"format": _FORMAT, **asdict(validation)}
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
        OutdatedValidation: the file is of another version.
        ValidationError: the file is absent or malformed; the message names it.
    """
    if not path.exists():
        raise ValidationError(f"There is no validation file {path}; run the study's validation first.")
    document = read_json(path, advice="write it again by running the validation", error=ValidationError)
    if not isinstance(document, dict):
        raise ValidationError(
            f"{path}: got {type(document).__name__}; it must hold a JSON object. Run the study again."
        )
    if (found := document.pop("format", 1)) != _FORMAT:
        raise OutdatedValidation(
            f"{path} has format {found!r}, this version writes {_FORMAT}; run the study again, which makes the file "
            "anew from the run's readouts."
        )
    if missing := [name for name in _TYPED_FIELDS if name not in document]:
        raise ValidationError(f"{path} lacks {', '.join(missing)}; delete it and run the study again.")
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
