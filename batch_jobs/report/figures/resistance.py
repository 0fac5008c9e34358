"""Figures of one scenario: its resistance to steering, and steering by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes

from batch_jobs.report.figures.axes import alpha_axis, share_axis
from batch_jobs.report.figures.dose_response import DoseResponse
from batch_jobs.report.figures.paper_figure import PaperFigure
from batch_jobs.report.figures.sheet import Sheet
from batch_jobs.report.figures.steering import draw_rates, main_direction_first
from batch_jobs.report.figures.style import PALETTE, PUBLISHED, SERIES, Style
from batch_jobs.report.number_text import fixed, scenario_title
from batch_jobs.report.published import REFERENCE_LAYER, Published, PublishedCurve
from batch_jobs.scoring.setting import SettingNames

FOCUS_SCENARIO = "the_listener"
"""The scenario whose resistance the paper studies. A run without it shows the one with the highest unsteered rate."""
_PANEL = (3.4, 2.45)
_DODGE = 0.012
"""Horizontal offset between neighbouring series at one strength, as a share of the axis."""


def focus_scenario(curves: Sequence[DoseResponse], wanted: str | None = None) -> str:
    """The scenario that the resistance figures show: the one `wanted` by the concept, the paper's, or the one with the
    highest unsteered rate."""
    scenarios = {curve.scenario for curve in curves}
    for scenario in (wanted, FOCUS_SCENARIO):
        if scenario in scenarios:
            return scenario
    return max(curves, key=_unsteered_rate).scenario


def _unsteered_rate(curve: DoseResponse) -> float:
    rate = curve.rows[0].baseline_empathy_rate
    return -1.0 if math.isnan(rate) else rate


def resistance_figure(
    curves: Sequence[DoseResponse],
    layer: int | None,
    names: SettingNames,
    published: Published | None,
    wanted: str | None = None,
) -> PaperFigure:
    """Draw figure 8: one scenario's curve against the ideal linear response.

    `layer`: the best steering layer. If it is None or has no curve, the first setting is shown. `wanted`: see
    `focus_scenario`.
    """
    scenario = focus_scenario(curves, wanted)
    of_scenario = [curve for curve in curves if curve.scenario == scenario]
    curve = next((curve for curve in of_scenario if curve.setting.layer == layer), of_scenario[0])
    theirs = [known for known in _published_curves(published) if known.scenario == scenario]
    sheet = Sheet(2 if theirs else 1, columns=2, panel=_PANEL)
    axes = sheet.panels[0]
    draw_rates(sheet, axes, curve)
    _ideal(sheet, axes, curve.alphas)
    alpha_axis(axes, curve.alphas, curve.in_norms)
    share_axis(axes, "share of samples")
    sheet.title(axes, f"This run, {names(curve.setting)}")
    if theirs:
        known = next((known for known in theirs if known.layer == REFERENCE_LAYER), theirs[0])
        axes = sheet.panels[1]
        sheet.line(axes, f"{curve.positive}, published", known.alphas, known.empathy_rates, PUBLISHED)
        _ideal(sheet, axes, known.alphas)
        alpha_axis(axes, known.alphas)
        share_axis(axes, "share of samples")
        sheet.title(axes, f"{known.model}, layer {known.layer}")
    baseline = curve.rows[0].baseline_empathy_rate
    ceiling = " No α can raise it: a flat right half is a ceiling, not resistance." if baseline == 1.0 else ""
    return PaperFigure(
        label="8",
        name="resistance",
        title=f"Resistance: {scenario_title(scenario)}",
        drawing=sheet.render(),
        note=f"The unsteered rate of this run is {fixed(baseline, 2)}.{ceiling}",
    )


def layers_figure(
    curves: Sequence[DoseResponse], names: SettingNames, published: Published | None, wanted: str | None = None
) -> PaperFigure:
    """Draw figure 9: the layers compared on one scenario."""
    scenario = focus_scenario(curves, wanted)
    of_scenario = [curve for curve in main_direction_first(curves) if curve.scenario == scenario]
    chosen = of_scenario[: len(SERIES)]
    left_out = len(of_scenario) - len(chosen)
    title = scenario_title(scenario)
    figure = PaperFigure(
        label="9",
        name="layers-compared",
        note=f"{left_out} more settings are in the tables only." if left_out else "",
        title=f"Steering by layer: {title}",
        missing="This run steers one layer with one direction, so there is nothing to compare; figure 8 shows it.",
    )
    if len({curve.setting for curve in chosen}) < 2:
        return figure
    theirs = [known for known in _published_curves(published) if known.scenario == scenario]
    sheet = Sheet(2 if theirs else 1, columns=2, panel=_PANEL)
    axes = sheet.panels[0]
    in_norms = len({tuple(curve.alphas) for curve in chosen}) > 1 and all(
        len(curve.in_norms) == len(curve.rows) for curve in chosen
    )
    ticks = {row.alpha_residual_norm if in_norms else row.alpha for curve in chosen for row in curve.rows}
    strengths = sorted(tick for tick in ticks if tick is not None)
    for place, curve in enumerate(chosen):
        # shifted slightly, so that intervals at the same strength do not hide each other
        shift = _DODGE * (place - (len(chosen) - 1) / 2) * (strengths[-1] - strengths[0])
        xs = [shift + (curve.in_norms[alpha] if in_norms else alpha) for alpha in curve.alphas]
        low, high = curve.empathy_intervals
        sheet.line(axes, names(curve.setting), xs, curve.empathy_rates, SERIES[place], low=low, high=high)
    alpha_axis(axes, strengths)
    if in_norms:
        axes.set_xlabel("\u03b1 / mean residual norm")
    share_axis(axes, f"share {curves[0].positive}")
    sheet.title(axes, f"This run, {title}")
    if theirs:
        axes = sheet.panels[1]
        for place, known in enumerate(sorted(theirs, key=lambda known: known.layer)):
            style = SERIES[place % len(SERIES)]
            line = Style("soft", style.marker, style.line, style.filled)
            sheet.line(axes, f"published, layer {known.layer}", known.alphas, known.empathy_rates, line)
        alpha_axis(axes, theirs[0].alphas)
        share_axis(axes, f"share {curves[0].positive}")
        sheet.title(axes, theirs[0].model)
    return figure.drawn(sheet.render())


def _published_curves(published: Published | None) -> tuple[PublishedCurve, ...]:
    return published.dose_response.curves if published else ()


def _ideal(sheet: Sheet, axes: Axes, alphas: Sequence[float]) -> None:
    ends = [min(alphas), max(alphas)]
    axes.plot(ends, [0.0, 1.0], color=PALETTE["soft"], linestyle="--", linewidth=1.0, label="ideal linear response")
