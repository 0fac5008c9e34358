"""Figures that set several runs side by side: detection, dose response, unsteered rates, layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from batch_jobs.report.figures.axes import alpha_axis, share_axis
from batch_jobs.report.figures.detection import draw_models
from batch_jobs.report.figures.dose_response import DoseResponse
from batch_jobs.report.figures.paper_figure import PaperFigure
from batch_jobs.report.figures.resistance import focus_scenario
from batch_jobs.report.figures.sheet import PANEL_WIDTH, Sheet
from batch_jobs.report.figures.steering import unsteered_rows, unsteered_sheet
from batch_jobs.report.figures.style import SERIES
from batch_jobs.report.number_text import scenario_title
from batch_jobs.report.published import Published
from batch_jobs.report.results import RunResults
from batch_jobs.statistics.signs_of_alpha import delta

Runs = Mapping[str, RunResults]
"""Name of a run -> its results."""
Curves = Mapping[str, Sequence[DoseResponse]]
"""Name of a run -> its dose-response curves of steered directions, controls left out."""
_WIDE_PANEL = (4.6, 2.5)
_PANEL = (PANEL_WIDTH, 2.25)
_DODGE = 0.012
"""Sideways shift between the marks of two runs, as a share of the axis."""


def detection_figure(runs: Runs, published: Published | None) -> PaperFigure:
    """Draw figure 4: AUROC by block read, a line a run; the published models softly, where `published` is given."""
    sheet = Sheet(1, panel=_WIDE_PANEL)
    (axes,) = sheet.panels
    ours = {}
    for name, results in runs.items():
        offset = results.extract_offset or 0
        ours[name] = {layer + offset: row for layer, row in results.validation.layers.items()}
    draw_models(sheet, axes, ours, published)
    sheet.title(axes, "Detection on held-out texts")
    return PaperFigure("4", "detection", "Detection by run", drawing=sheet.render())


def dose_response_figure(curves: Curves) -> PaperFigure:
    """Draw figure 6: the rate by α, a panel a scenario and a line a run, each at the layer of its largest Δ."""
    scenarios = list(dict.fromkeys(curve.scenario for of_run in curves.values() for curve in of_run))
    in_norms = _all_in_norms(curves)
    sheet = Sheet(len(scenarios), panel=_PANEL)
    for axes, scenario in zip(sheet.panels, scenarios, strict=True):
        ticks: set[float] = set()
        for place, (name, of_run) in enumerate(curves.items()):
            found = [curve for curve in of_run if curve.scenario == scenario]
            if not found:
                continue
            curve = max(found, key=_rise)
            xs = _strengths(curve, in_norms)
            ticks |= set(xs)
            low, high = curve.empathy_intervals
            label = f"{name}, layer {curve.setting.layer}" if len(scenarios) == 1 else name
            style = SERIES[place % len(SERIES)]
            sheet.line(axes, label, xs, curve.empathy_rates, style, low=low, high=high, band=True)
        _strength_axis(axes, sorted(ticks), in_norms)
        share_axis(axes, "rate")
        sheet.title(axes, scenario_title(scenario))
    return PaperFigure("6", "dose-response", "Dose response by scenario", drawing=sheet.render())


def unsteered_figure(curves: Curves) -> PaperFigure:
    """Draw figure 7: rates at α = 0, a bar a run in each scenario."""
    scenarios = list(dict.fromkeys(curve.scenario for of_run in curves.values() for curve in of_run))
    sheet = unsteered_sheet({name: unsteered_rows(of_run) for name, of_run in curves.items()}, scenarios, {})
    share_axis(sheet.panels[0], "rate")
    return PaperFigure("7", "unsteered", "Unsteered rates by scenario", drawing=sheet.render())


def layers_figure(curves: Curves) -> PaperFigure:
    """Draw figure 9: one scenario under every layer, a panel a run."""
    scenario = focus_scenario([curve for of_run in curves.values() for curve in of_run])
    chosen = {
        name: [curve for curve in of_run if curve.scenario == scenario][: len(SERIES)]
        for name, of_run in curves.items()
    }
    chosen = {name: of_run for name, of_run in chosen.items() if of_run}
    in_norms = _all_in_norms(chosen)
    sheet = Sheet(len(chosen), columns=2, panel=(3.3, 2.3))
    for axes, (name, of_run) in zip(sheet.panels, chosen.items(), strict=True):
        ticks = sorted({x for curve in of_run for x in _strengths(curve, in_norms)})
        for place, curve in enumerate(of_run):
            shift = _DODGE * (place - (len(of_run) - 1) / 2) * (ticks[-1] - ticks[0])
            low, high = curve.empathy_intervals
            label = f"layer {curve.setting.layer}"
            if len({one.setting.direction for one in of_run}) > 1:
                label += f", {curve.setting.direction}"
            xs = [x + shift for x in _strengths(curve, in_norms)]
            sheet.line(axes, label, xs, curve.empathy_rates, SERIES[place], low=low, high=high)
        _strength_axis(axes, ticks, in_norms)
        share_axis(axes, "rate")
        sheet.title(axes, name)
    return PaperFigure("9", "layers", f"Steering by layer: {scenario_title(scenario)}", drawing=sheet.render())


def _rise(curve: DoseResponse) -> tuple[float, int]:
    """The curve's Δ, the lower layer first among equals."""
    found = delta({row.alpha: row.cell for row in curve.rows})
    return 0.0 if found is None else found.value, -curve.setting.layer


def _all_in_norms(curves: Curves) -> bool:
    return all(len(curve.in_norms) == len(curve.rows) for of_run in curves.values() for curve in of_run)


def _strengths(curve: DoseResponse, in_norms: bool) -> list[float]:
    return [curve.in_norms[alpha] for alpha in curve.alphas] if in_norms else curve.alphas


def _strength_axis(axes: Axes, ticks: Sequence[float], in_norms: bool) -> None:
    alpha_axis(axes, ticks)
    if in_norms:
        axes.set_xlabel("α / mean residual norm")
