"""Findings beyond rates: which sign of α works, how texts fail, what the whole grid says, whether a direction does more
than its controls, and whether the best detection layer also steers best.

Everything is computed from the scores, the measures and the validation, without the texts, and stored as
`findings.json`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from pydantic import TypeAdapter, ValidationError

from batch_jobs.config.steering import controlled_direction
from batch_jobs.directions.validation_file import Validation
from batch_jobs.files.atomic import write_atomically
from batch_jobs.rows.generation_parts import ScoreError
from batch_jobs.scoring.block_outcomes import BlockOutcomes, GridKey
from batch_jobs.scoring.scores_csv import ConditionScore, GroupKey, Scores, SuccessRate, group_key
from batch_jobs.statistics.against_controls import AgainstControls, against_controls
from batch_jobs.statistics.blocks import BlockMean, grid_slope

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
    gain_minus_loss: float
    """Above 0 when +α moves the rate more, in -2..2."""
    gain_minus_loss_low: float
    """95 % interval, with the uncertainty of the unsteered rate."""
    gain_minus_loss_high: float
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
    soft_loop_rate: float
    refusal_rate: float
    short_rate: float
    log_likelihood_distance: float | None
    """Mean over the conditions that have one of |mean log-likelihood - median of the unsteered texts|, in nats per
    token."""


@dataclass(frozen=True)
class GridEffect:
    """One number for a whole grid: (model, layer, direction, span), op `add`, over all scenarios, seeds and α."""

    model: str
    layer: int
    direction: str
    span: str
    slope: BlockMean
    """Fitted change of the outcome's rate from the lowest α to the highest."""


@dataclass(frozen=True)
class ControlEffect:
    """A direction against its control directions, at one model, layer and span, op `add`."""

    model: str
    layer: int
    direction: str
    span: str
    scenario: str | None
    """None: all scenarios together."""
    controls: tuple[str, ...]
    """Names of the controls, in the order of `comparison.control_deltas`."""
    comparison: AgainstControls


@dataclass(frozen=True)
class LayerMerit:
    """How well one layer steers and detects."""

    layer: int
    delta: float | None
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
    """Layer with the highest Δ. Ties go to the larger trend, then to the lower layer. None where no scenario has
    one."""
    best_detection_layer: int | None
    """The validation's best layer, which may be one that was not steered; None without a validation."""


@dataclass(frozen=True)
class Findings:
    """Findings of one study, in the order of its scores."""

    asymmetries: tuple[Asymmetry, ...]
    failures: tuple[FailureSignature, ...]
    layers: tuple[LayerComparison, ...]
    grid: tuple[GridEffect, ...]
    controls: tuple[ControlEffect, ...]


def make_findings(
    scores: Scores, validation: Validation | None = None, outcomes: BlockOutcomes | None = None
) -> Findings:
    """Compute findings.

    Control directions have failure signatures, and appear beside their direction in `controls`; the other findings are
    of the directions themselves.

    Args:
        scores: of the run.
        validation: of the same directions, where there is one.
        outcomes: of the same rows; without them there are no `grid` and no `controls`.
    """
    outcomes, own = outcomes or {}, scores.without_controls
    groups: dict[GroupKey, list[ConditionScore]] = {}
    for row in own.conditions:
        if row.success is not None:
            groups.setdefault(group_key(row), []).append(row)
    rates = {group_key(rate): rate for rate in own.success}
    asymmetries = (_asymmetry(rates[key], rows) for key, rows in groups.items() if key in rates)
    return Findings(
        asymmetries=tuple(found for found in asymmetries if found),
        failures=tuple(_failures(scores.conditions)),
        layers=tuple(_layer_comparisons(own.success, validation)),
        grid=tuple(_grid_effects(outcomes)),
        controls=tuple(_control_effects(outcomes)),
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


def _asymmetry(rate: SuccessRate, rows: list[ConditionScore]) -> Asymmetry | None:
    by_alpha = {row.alpha: row for row in rows}
    numbers = rate.gain, rate.loss, rate.gain_minus_loss, rate.gain_minus_loss_low, rate.gain_minus_loss_high
    gain, loss, difference, low, high = numbers
    if gain is None or loss is None or difference is None or low is None or high is None:
        return None
    paired = [alpha for alpha in by_alpha if alpha > 0 and -alpha in by_alpha]
    positive = math.fsum(by_alpha[alpha].coherence_rate for alpha in paired) / len(paired)
    negative = math.fsum(by_alpha[-alpha].coherence_rate for alpha in paired) / len(paired)
    return Asymmetry(*group_key(rate), gain, loss, difference, low, high, positive, negative, positive - negative)


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
        soft_loop_rate=mean("soft_loop_rate"),
        refusal_rate=mean("refusal_rate"),
        short_rate=mean("short_rate"),
        log_likelihood_distance=_mean(row.log_likelihood_distance for row in rows),
    )


def _grid_effects(outcomes: BlockOutcomes) -> Iterable[GridEffect]:
    for key, blocks in outcomes.items():
        slope = grid_slope(blocks) if controlled_direction(key.direction) is None else None
        if slope is not None:
            yield GridEffect(key.model, key.layer, key.direction, key.span, slope)


def _control_effects(outcomes: BlockOutcomes) -> Iterable[ControlEffect]:
    controls: dict[GridKey, list[GridKey]] = {}
    for key in outcomes:
        if (real := controlled_direction(key.direction)) is not None:
            controls.setdefault(GridKey(key.model, key.layer, real, key.span), []).append(key)
    for key, others in controls.items():
        if key not in outcomes:
            continue
        names = tuple(other.direction for other in others)
        scenarios = sorted({scenario for scenario, _ in outcomes[key]})
        for scenario in (None, *scenarios):
            direction, *rest = (
                {place: cells for place, cells in outcomes[one].items() if scenario in (None, place[0])}
                for one in (key, *others)
            )
            comparison = against_controls(direction, rest)
            if comparison is not None:
                yield ControlEffect(key.model, key.layer, key.direction, key.span, scenario, names, comparison)


def _layer_comparisons(rates: Iterable[SuccessRate], validation: Validation | None) -> Iterable[LayerComparison]:
    settings: dict[tuple[str, str, str], dict[int, list[SuccessRate]]] = {}
    for rate in rates:
        layers = settings.setdefault((rate.model, rate.direction, rate.span), {})
        layers.setdefault(rate.layer, []).append(rate)
    for (model, direction, span), layers in settings.items():
        merits = tuple(_merit(layer, layers[layer], validation) for layer in sorted(layers))
        decided = [merit for merit in merits if merit.delta is not None]
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
        delta=_mean(rate.delta for rate in rates),
        steering_success_rate=math.fsum(rate.steering_success_rate for rate in rates) / len(rates),
        trend=_mean(rate.trend for rate in rates),
        auroc=validated.auroc if validated else None,
    )


def _rank(merit: LayerMerit) -> tuple[float, float, int]:
    # an undefined trend (all outcomes equal) ranks as 0
    return merit.delta or 0.0, merit.trend or 0.0, -merit.layer


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
