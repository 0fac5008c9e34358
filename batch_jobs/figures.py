"""Which figures a report shows: detection by layer, dose response by scenario, mean projection by α.

Each function takes results and returns a drawn panel; the geometry is in `panel`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from batch_jobs.panel import STYLE_NAMES, Figure, Line, Panel, Value, draw
from batch_jobs.samples import SampleGroup
from batch_jobs.scores import ConditionScore, Scores
from batch_jobs.validate import Validation


@dataclass(frozen=True)
class Setting:
    """What is held fixed within one row of dose-response panels."""

    model: str
    layer: int
    direction: str
    op: str
    span: str

    @classmethod
    def of(cls, row: ConditionScore | SampleGroup) -> Setting:
        return cls(row.model, row.layer, row.direction, row.op, row.span)


@dataclass(frozen=True)
class SettingFigures:
    """The panels of one setting."""

    setting: Setting
    dose_response: tuple[Figure, ...]
    projection: Figure | None


def scenario_title(scenario: str) -> str:
    """`the_listener` -> `The Listener`."""
    return scenario.replace("_", " ").replace("-", " ").title()


def settings(scores: Scores) -> list[Setting]:
    """The distinct settings, in the order of the scores."""
    return list(dict.fromkeys(Setting.of(row) for row in scores.conditions))


def auroc_figure(validation: Validation) -> Figure:
    """AUROC and accuracy of the held-out texts by layer, with chance as reference."""
    layers = sorted(validation.layers)
    results = [validation.layers[layer] for layer in layers]
    lowest = min(min(result.auroc, result.accuracy) for result in results)
    x_low, x_high = layers[0] - 0.5, layers[-1] + 0.5
    return draw(
        Panel(
            title="Detection by layer",
            x_label="layer (block output read)",
            y_label="share",
            lines=(
                Line("AUROC", "s1", tuple(Value(result.layer, result.auroc) for result in results)),
                Line("accuracy", "s2", tuple(Value(result.layer, result.accuracy) for result in results)),
            ),
            x_ticks=tuple(float(layer) for layer in layers),
            y_range=(0.4 if lowest >= 0.4 else 0.0, 1.03),
            references=(((x_low, 0.5), (x_high, 0.5)),),
        )
    )


def setting_figures(scores: Scores, setting: Setting) -> SettingFigures:
    """A dose-response panel a scenario, and one panel of mean projections, for one setting."""
    rows = [row for row in scores.conditions if Setting.of(row) == setting]
    scenarios = sorted({row.scenario for row in rows})
    by_scenario = {scenario: [row for row in rows if row.scenario == scenario] for scenario in scenarios}
    return SettingFigures(
        setting=setting,
        dose_response=tuple(_dose_response(scenario, by_scenario[scenario]) for scenario in scenarios),
        projection=_projection_figure(setting, by_scenario),
    )


def _alpha_axis(rows: Iterable[ConditionScore]) -> tuple[tuple[float, ...], tuple[tuple[float, float], ...]]:
    in_norms = {row.alpha: row.alpha_residual_norm for row in rows}
    top = tuple((alpha, norms) for alpha, norms in sorted(in_norms.items()) if norms is not None)
    return tuple(sorted(in_norms)), top


def _dose_response(scenario: str, rows: Sequence[ConditionScore]) -> Figure:
    alphas, top = _alpha_axis(rows)
    return draw(
        Panel(
            title=scenario_title(scenario),
            x_label="\u03b1",
            y_label="share of samples",
            lines=(
                Line("coherent", "s2", tuple(Value(row.alpha, row.coherence_rate) for row in rows)),
                Line(
                    "empathetic",
                    "s1",
                    tuple(Value(row.alpha, row.empathy_rate, row.empathy_low, row.empathy_high) for row in rows),
                ),
            ),
            x_ticks=alphas,
            y_range=(-0.04, 1.04),
            top_label="\u03b1 / mean residual norm",
            top_ticks=top,
        )
    )


def _projection_figure(setting: Setting, by_scenario: Mapping[str, Sequence[ConditionScore]]) -> Figure | None:
    lines = []
    for index, (scenario, rows) in enumerate(by_scenario.items()):
        values = tuple(
            Value(row.alpha, row.mean_projection_generated) for row in rows if row.mean_projection_generated is not None
        )
        if values:
            lines.append(Line(scenario_title(scenario), STYLE_NAMES[index % len(STYLE_NAMES)], values))
    if not lines:
        return None
    alphas, top = _alpha_axis(row for rows in by_scenario.values() for row in rows)
    unsteered = [value.y for line in lines for value in line.values if value.x == 0.0]
    references: tuple[tuple[tuple[float, float], tuple[float, float]], ...] = ()
    if unsteered and setting.op == "add" and setting.span != "prompt":
        start = fmean(unsteered)
        references = (((alphas[0], start + alphas[0]), (alphas[-1], start + alphas[-1])),)
    return draw(
        Panel(
            title="Mean projection",
            x_label="\u03b1",
            y_label="projection on the direction",
            lines=tuple(lines),
            x_ticks=alphas,
            top_label="\u03b1 / mean residual norm",
            top_ticks=top,
            references=references,
        )
    )
