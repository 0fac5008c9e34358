"""Figures that set several runs side by side: detection, dose response, unsteered rates, layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from batch_jobs.report.figures.axes import alpha_axis, block_axis, share_axis
from batch_jobs.report.figures.detection import ORIGINAL_EXTRACT_OFFSET, chance_line, draw_sweep
from batch_jobs.report.figures.dose_response import DoseResponse
from batch_jobs.report.figures.paper_figure import PaperFigure
from batch_jobs.report.figures.resistance import focus_scenario
from batch_jobs.report.figures.sheet import PANEL_WIDTH, Sheet
from batch_jobs.report.figures.style import SERIES, Style
from batch_jobs.report.number_text import scenario_title
from batch_jobs.report.published import Published
from batch_jobs.report.results import RunResults
from batch_jobs.scoring.scores_csv import ConditionScore

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
    for place, (name, results) in enumerate(runs.items()):
        offset = results.extract_offset or 0
        shown = {layer + offset: row for layer, row in results.validation.layers.items()}
        draw_sweep(sheet, axes, name, shown, SERIES[place % len(SERIES)])
    for place, model in enumerate(published.models() if published else ()):
        assert published is not None
        rows = published.layers_of(model)
        style = SERIES[(len(runs) + place) % len(SERIES)]
        soft = Style("soft", style.marker, style.line, style.filled)
        blocks = [layer + ORIGINAL_EXTRACT_OFFSET for layer in rows]
        sheet.line(axes, f"{model}, published", blocks, [row.auroc for row in rows.values()], soft)
    chance_line(axes)
    lowest = min(row.auroc_low for results in runs.values() for row in results.validation.layers.values())
    share_axis(axes, "AUROC", lowest)
    block_axis(axes)
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
    width = 0.8 / len(curves)
    sheet = Sheet(1, panel=(max(3.6, 1.1 * len(scenarios) + 1.2), 2.4))
    (axes,) = sheet.panels
    for place, (name, of_run) in enumerate(curves.items()):
        bars: dict[str, ConditionScore] = {}
        for curve in of_run:
            for row in curve.rows:
                if row.alpha == 0.0:
                    bars.setdefault(curve.scenario, row)
        sheet.bars(
            axes,
            name,
            [scenarios.index(scenario) + place * width for scenario in bars],
            [row.empathy_rate for row in bars.values()],
            SERIES[place % len(SERIES)],
            width=width * 0.9,
            low=[row.empathy_low for row in bars.values()],
            high=[row.empathy_high for row in bars.values()],
        )
    middle = width * (len(curves) - 1) / 2
    axes.set_xticks([place + middle for place in range(len(scenarios))], [scenario_title(one) for one in scenarios])
    share_axis(axes, "rate")
    axes.set_xlabel("scenario")
    sheet.title(axes, "α = 0")
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
    """Mean rate at +α less that at -α over the strengths with both signs, the lower layer first among equals."""
    rates = {row.alpha: row.empathy_rate for row in curve.rows}
    gaps = [rate - rates[-alpha] for alpha, rate in rates.items() if alpha > 0 and -alpha in rates]
    return sum(gaps) / len(gaps) if gaps else 0.0, -curve.setting.layer


def _all_in_norms(curves: Curves) -> bool:
    return all(len(curve.in_norms) == len(curve.rows) for of_run in curves.values() for curve in of_run)


def _strengths(curve: DoseResponse, in_norms: bool) -> list[float]:
    return [curve.in_norms[alpha] for alpha in curve.alphas] if in_norms else curve.alphas


def _strength_axis(axes: Axes, ticks: Sequence[float], in_norms: bool) -> None:
    alpha_axis(axes, ticks)
    if in_norms:
        axes.set_xlabel("α / mean residual norm")
