"""Rows of the report's tables that add published values or chosen examples to the run's own fields."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from batch_jobs.cost.cost_curve import CostPoint
from batch_jobs.directions.validate_layer import LayerValidation
from batch_jobs.report.figures.detection import ORIGINAL_EXTRACT_OFFSET
from batch_jobs.report.published import (
    REFERENCE_LAYER,
    Published,
    PublishedBinary,
    PublishedLayer,
    PublishedSteering,
    published_model,
)
from batch_jobs.report.results import RunResults
from batch_jobs.report.samples import Sample, SampleGroup
from batch_jobs.scoring.correlation import Detection
from batch_jobs.scoring.scores_csv import ConditionScore, SuccessRate, group_key
from batch_jobs.scoring.setting import Setting

EXAMPLE_SCENARIO = "the_protector"
"""The scenario of the paper's example outputs."""
MIN_EXAMPLE_COHERENCE = 0.6


@dataclass(frozen=True)
class LayerRow:
    """Table 1: one validated layer."""

    ours: LayerValidation
    read_block: int
    published: PublishedLayer | None
    """The published direction with the same layer number, which was read at the block one below that number."""

    @property
    def published_block(self) -> int | None:
        """Block at which the published direction was read; None without one."""
        return None if self.published is None else self.published.layer + ORIGINAL_EXTRACT_OFFSET


@dataclass(frozen=True)
class SuccessRow:
    """Table 4: one setting and scenario."""

    ours: SuccessRate
    setting: Setting
    published: PublishedSteering | None
    same: bool
    """Whether the published row has the same model and layer. Otherwise it is the row of REFERENCE_LAYER."""
    read_block: int
    num_unmoved: int
    """Negative α at which the rate did not change, where the unsteered rate does not decide the verdict. The paper's
    rule counts them as successes."""


@dataclass(frozen=True)
class MetricRow:
    """Table 3: one metric, with one value per layer and direction, and the paper's value."""

    name: str
    ours: tuple[float | int | None, ...]
    published: float | int
    places: int


@dataclass(frozen=True)
class CostRow:
    """One steering's cost beside what it does to the study's own texts."""

    point: CostPoint
    name: str
    ratio: float
    """Perplexity over the unsteered model's."""
    rate: float | None
    """Mean rate over scenarios at this α."""
    delta: float | None
    """Mean rate at |α| minus that at -|α|; None where one of them was not run."""
    coherence_rate: float | None


@dataclass(frozen=True)
class Example:
    """Table 5: one generated text."""

    group: SampleGroup
    sample: Sample


def layer_rows(results: RunResults, published: Published) -> tuple[str, list[LayerRow]]:
    """The published model of Table 1 and its rows. The model is the run's own if the paper used it, else Phi-3."""
    model = published_model(results.models[0]) or published.random_baseline.model
    known = published.layers_of(model)
    offset = results.extract_offset or 0
    validated = results.validation.layers
    return model, [LayerRow(validated[layer], layer + offset, known.get(layer)) for layer in sorted(validated)]


def success_rows(results: RunResults, published: Published) -> list[SuccessRow]:
    """The rows of Table 4, in the order of the scores; controls are compared in a table of their own."""
    unmoved = Counter(
        group_key(row) for row in results.scores.conditions if row.success and not row.decided and row.effect == 0.0
    )
    rows = []
    for rate in results.scores.without_controls.success:
        of_scenario = [row for row in published.steering if row.scenario == rate.scenario]
        model = published_model(rate.model)
        same = next((row for row in of_scenario if (row.model, row.layer) == (model, rate.layer)), None)
        reference = next((row for row in of_scenario if row.layer == REFERENCE_LAYER), None)
        rows.append(
            SuccessRow(
                ours=rate,
                setting=Setting.of(rate),
                published=same or reference,
                same=same is not None,
                read_block=rate.layer + (results.extract_offset or 0),
                num_unmoved=unmoved[group_key(rate)],
            )
        )
    return rows


def metric_rows(detections: Sequence[Detection], published: PublishedBinary) -> list[MetricRow]:
    """The rows of Table 3: the number of points, scores in 0..1, then the confusion matrix."""

    def row(name: str, ours: str, theirs: float | int, places: int = 2) -> MetricRow:
        return MetricRow(name, tuple(getattr(detection, ours) for detection in detections), theirs, places)

    return [
        row("N", "n", published.n, 0),
        row("Accuracy", "accuracy", published.accuracy),
        row("Precision", "precision", published.precision),
        row("Recall", "recall", published.recall),
        row("F1", "f1", published.f1),
        row("Specificity", "specificity", published.specificity),
        row("True positives", "tp", published.true_positives, 0),
        row("False positives", "fp", published.false_positives, 0),
        row("True negatives", "tn", published.true_negatives, 0),
        row("False negatives", "fn", published.false_negatives, 0),
    ]


def examples(results: RunResults) -> list[Example]:
    """Choose texts at -α, 0 and +α of one scenario, at the best steering layer where one is known.

    The scenario is the concept's, else The Protector, as in the paper, else the first. α is the largest strength at
    which both signs have a coherence rate of at least MIN_EXAMPLE_COHERENCE, so that the texts show the direction and
    not a collapse; if there is none, the smallest strength with both signs. Each condition gives its first coherent
    text, else its first text.
    """
    scenarios = [group.scenario for group in results.generations.groups]
    wanted = (results.concept.focus_scenario, EXAMPLE_SCENARIO, *scenarios[:1])
    scenario = next((one for one in wanted if one in scenarios), "") or ""
    rates = [row for row in results.scores.conditions if row.scenario == scenario]
    layers = {row.layer for row in rates}
    layer = results.best_steering_layer
    rates = [row for row in rates if row.layer == (layer if layer in layers else rates[0].layer)]
    steered = [row for row in rates if row.alpha]
    setting = Setting.of(steered[0] if steered else rates[0]) if rates else None
    strength = _example_strength([row for row in steered if Setting.of(row) == setting])
    if strength is None:
        return []
    found = []
    for alpha in (-strength, 0.0, strength):
        group = next(
            (
                group
                for group in results.generations.groups
                # α = 0 is stored once per layer, under one direction
                if group.scenario == scenario
                and group.alpha == alpha
                and (group.setting == setting or (alpha == 0.0 and group.layer == rates[0].layer))
            ),
            None,
        )
        if group is not None and group.samples:
            coherent = [sample for sample in group.samples if sample.coherent]
            found.append(Example(group, (coherent or list(group.samples))[0]))
    return found


def _example_strength(steered: Sequence[ConditionScore]) -> float | None:
    by_alpha = {row.alpha: row for row in steered}
    paired = sorted(alpha for alpha in by_alpha if alpha > 0 and -alpha in by_alpha)
    coherent = [
        alpha
        for alpha in paired
        if min(by_alpha[alpha].coherence_rate, by_alpha[-alpha].coherence_rate) >= MIN_EXAMPLE_COHERENCE
    ]
    return coherent[-1] if coherent else paired[0] if paired else None


def cost_rows(results: RunResults) -> list[CostRow]:
    """The measured costs, the unsteered model first, then by layer, direction and α; empty where none were measured."""
    plain = next((point for point in results.cost if point.layer is None), None)
    if plain is None:
        return []
    cells: dict[tuple[int | None, str | None, float], list[ConditionScore]] = {}
    for row in results.scores.conditions:
        cells.setdefault((row.layer, row.direction, row.alpha) if row.alpha else (None, None, 0.0), []).append(row)

    def mean(name: str, layer: int | None, direction: str | None, alpha: float) -> float | None:
        rows = cells.get((layer, direction, alpha), [])
        values = [getattr(row, name) for row in rows]
        return fmean(values) if values and not any(map(math.isnan, values)) else None

    found = []
    for point in sorted(results.cost, key=lambda one: (one.layer or -1, one.direction or "", one.alpha)):
        place = (point.layer, point.direction)
        ends = [mean("empathy_rate", *place, sign * abs(point.alpha)) for sign in (1, -1)]
        found.append(
            CostRow(
                point=point,
                name="unsteered" if point.layer is None else f"layer {point.layer}, {point.direction}",
                ratio=point.perplexity / plain.perplexity,
                rate=mean("empathy_rate", *place, point.alpha),
                delta=None if point.layer is None or None in ends else (ends[0] or 0.0) - (ends[1] or 0.0),
                coherence_rate=mean("coherence_rate", *place, point.alpha),
            )
        )
    return found
