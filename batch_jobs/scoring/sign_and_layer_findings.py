"""Findings beyond rates: which sign of α works, how texts fail, and whether the best detection layer also steers best.

Everything is computed from the scores and the validation, without the texts, and stored as `findings.json`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from pydantic import TypeAdapter, ValidationError

from batch_jobs.directions.validation_file import Validation
from batch_jobs.files.atomic import write_atomically
from batch_jobs.rows.generation_parts import ScoreError
from batch_jobs.scoring.count_statistics import balance
from batch_jobs.scoring.scores_csv import ConditionScore, GroupKey, Scores, SuccessRate, group_key

Sign = Literal["negative", "zero", "positive"]
_SIGNS: Final[tuple[Sign, ...]] = ("negative", "zero", "positive")


@dataclass(frozen=True)
class Asymmetry:
    """+α against -α for one (model, layer, scenario, direction, span), op `add`, over the |α| run with both signs."""

    model: str
    layer: int
    scenario: str
    direction: str
    op: str
    span: str
    gain: float
    """Mean rise of the empathetic rate at +α, in -1..1."""
    loss: float
    """Mean fall of the empathetic rate at -α, in -1..1."""
    index: float | None
    """(gain - loss) / (|gain| + |loss|), in -1..1; None when neither sign moves the rate, or the baseline is 0 or
    1."""
    coherence_positive: float
    """Mean coherence rate at +α."""
    coherence_negative: float
    coherence_asymmetry: float
    """`coherence_positive - coherence_negative`, in -1..1; above 0 when -α breaks the text more than +α."""


@dataclass(frozen=True)
class FailureSignature:
    """How texts of one (model, layer, direction, span), op `add`, fail at one sign of α.

    Covers all scenarios and strengths. Rates are shares of the samples.
    """

    model: str
    layer: int
    direction: str
    op: str
    span: str
    sign: Sign
    """`zero`: the unsteered rows of the model and layer, of any direction."""
    samples: int
    coherence_rate: float
    empty_rate: float
    loop_rate: float
    code_like_rate: float
    mean_repetition: float
    mean_log_likelihood: float | None
    """Mean over the conditions that have one, in nats per token."""


@dataclass(frozen=True)
class LayerMerit:
    """How well one layer steers and detects."""

    layer: int
    corrected_success_rate: float | None
    """Mean over the scenarios that have one."""
    steering_success_rate: float
    """By the paper's rule, mean over scenarios."""
    trend: float | None
    """Mean over the scenarios that have one."""
    auroc: float | None
    """Detection AUROC of the layer's mean-difference direction; None where it was not validated."""


@dataclass(frozen=True)
class LayerComparison:
    """The layers of one (model, direction, span), op `add`."""

    model: str
    direction: str
    span: str
    layers: tuple[LayerMerit, ...]
    """Steered layers, ascending."""
    best_steering_layer: int | None
    """Layer with the highest corrected success rate. Ties go to the larger trend, then to the lower layer. None where
    no scenario has a corrected rate."""
    best_detection_layer: int | None
    """The validation's best layer, which may be one that was not steered; None without a validation."""


@dataclass(frozen=True)
class Findings:
    """Findings of one study, in the order of its scores."""

    asymmetries: tuple[Asymmetry, ...]
    failures: tuple[FailureSignature, ...]
    layers: tuple[LayerComparison, ...]


def make_findings(scores: Scores, validation: Validation | None = None) -> Findings:
    """Compute findings from scores, and from a validation of the same directions where there is one."""
    groups: dict[GroupKey, list[ConditionScore]] = {}
    for row in scores.conditions:
        if row.success is not None:
            groups.setdefault(group_key(row), []).append(row)
    asymmetries = (_asymmetry(key, rows) for key, rows in groups.items())
    return Findings(
        asymmetries=tuple(found for found in asymmetries if found),
        failures=tuple(_failures(scores.conditions)),
        layers=tuple(_layer_comparisons(scores.success, validation)),
    )


def write_findings(path: Path, findings: Findings) -> None:
    """Write the findings as JSON, atomically. `read_findings` returns them unchanged."""
    write_atomically(Path(path), _JSON.dump_json(findings, indent=1).decode() + "\n")


def read_findings(path: Path) -> Findings:
    """Read a file of `write_findings`.

    Raises:
        ScoreError: the file is absent or malformed; the message names it.
    """
    try:
        return _JSON.validate_json(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise ScoreError(f"There is no findings file {path}; score the generations first.") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise ScoreError(f"{path}: {place}: {first['msg']}; score the generations again.") from error


_JSON = TypeAdapter(Findings)


def _asymmetry(key: GroupKey, rows: list[ConditionScore]) -> Asymmetry | None:
    by_alpha = {row.alpha: row for row in rows}
    found = balance({alpha: row.empathy_rate for alpha, row in by_alpha.items()}, rows[0].baseline_empathy_rate)
    if found is None:
        return None
    paired = [alpha for alpha in by_alpha if alpha > 0 and -alpha in by_alpha]
    positive = math.fsum(by_alpha[alpha].coherence_rate for alpha in paired) / len(paired)
    negative = math.fsum(by_alpha[-alpha].coherence_rate for alpha in paired) / len(paired)
    return Asymmetry(*key, found.gain, found.loss, found.index, positive, negative, positive - negative)


def _failures(conditions: Iterable[ConditionScore]) -> Iterable[FailureSignature]:
    steered: dict[tuple[str, int, str, str, str], dict[Sign, list[ConditionScore]]] = {}
    unsteered: dict[tuple[str, int], list[ConditionScore]] = {}
    for row in conditions:
        if row.alpha == 0.0:
            unsteered.setdefault((row.model, row.layer), []).append(row)
        elif row.op == "add":
            signs = steered.setdefault((row.model, row.layer, row.direction, row.op, row.span), {})
            signs.setdefault("positive" if row.alpha > 0 else "negative", []).append(row)
    for key, signs in steered.items():
        signs["zero"] = unsteered[key[:2]]
        yield from (_failure(key, sign, signs[sign]) for sign in _SIGNS if sign in signs)


def _failure(key: tuple[str, int, str, str, str], sign: Sign, rows: list[ConditionScore]) -> FailureSignature:
    samples = sum(row.samples for row in rows)

    def mean(name: str) -> float:
        return math.fsum(getattr(row, name) * row.samples for row in rows) / samples

    return FailureSignature(
        *key,
        sign=sign,
        samples=samples,
        coherence_rate=mean("coherence_rate"),
        empty_rate=mean("empty_rate"),
        loop_rate=mean("loop_rate"),
        code_like_rate=mean("code_like_rate"),
        mean_repetition=mean("mean_repetition"),
        mean_log_likelihood=_mean(row.mean_log_likelihood for row in rows),
    )


def _layer_comparisons(rates: Iterable[SuccessRate], validation: Validation | None) -> Iterable[LayerComparison]:
    settings: dict[tuple[str, str, str], dict[int, list[SuccessRate]]] = {}
    for rate in rates:
        layers = settings.setdefault((rate.model, rate.direction, rate.span), {})
        layers.setdefault(rate.layer, []).append(rate)
    for (model, direction, span), layers in settings.items():
        merits = tuple(_merit(layer, layers[layer], validation) for layer in sorted(layers))
        decided = [merit for merit in merits if merit.corrected_success_rate is not None]
        yield LayerComparison(
            model=model,
            direction=direction,
            span=span,
            layers=merits,
            best_steering_layer=max(decided, key=_rank).layer if decided else None,
            best_detection_layer=validation.best_layer if validation else None,
        )


def _merit(layer: int, rates: list[SuccessRate], validation: Validation | None) -> LayerMerit:
    validated = validation.layers.get(layer) if validation else None
    return LayerMerit(
        layer=layer,
        corrected_success_rate=_mean(rate.corrected_success_rate for rate in rates),
        steering_success_rate=math.fsum(rate.steering_success_rate for rate in rates) / len(rates),
        trend=_mean(rate.trend for rate in rates),
        auroc=validated.auroc if validated else None,
    )


def _rank(merit: LayerMerit) -> tuple[float, float, int]:
    # an undefined trend (all outcomes equal) ranks as 0
    return merit.corrected_success_rate or 0.0, merit.trend or 0.0, -merit.layer


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
