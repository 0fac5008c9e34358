"""Figures of steering: dose response, projection, unsteered rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from batch_jobs.report.figures.axes import alpha_axis, share_axis
from batch_jobs.report.figures.dose_response import DoseResponse
from batch_jobs.report.figures.paper_figure import PaperFigure
from batch_jobs.report.figures.sheet import PANEL_WIDTH, Sheet
from batch_jobs.report.figures.style import PALETTE, PUBLISHED, SERIES, Style
from batch_jobs.report.number_text import scenario_title
from batch_jobs.report.published import Published, PublishedCurve, published_model
from batch_jobs.scoring.scores_csv import ConditionScore
from batch_jobs.scoring.setting import Setting, SettingNames

MAX_PANELS = 18
"""Most panels of one sheet, so that it fits a page. The tables show all settings."""
_PANEL = (PANEL_WIDTH, 2.25)
_WIDE_PANEL = (3.4, 2.45)


def main_direction_first(curves: Sequence[DoseResponse]) -> list[DoseResponse]:
    """Sort the curves of the first direction first, so that a figure without space for all compares its layers."""
    first = curves[0].setting.direction
    return sorted(curves, key=lambda curve: curve.setting.direction != first)


def dose_response_figure(
    curves: Sequence[DoseResponse], names: SettingNames, published: Published | None
) -> PaperFigure:
    """Draw figure 6: positive and coherent share by α, one panel per setting and scenario."""
    chosen = _first_settings(curves)
    several = len({curve.setting for curve in chosen}) > 1
    sheet = Sheet(len(chosen), panel=_PANEL)
    for axes, curve in zip(sheet.panels, chosen, strict=True):
        draw_rates(sheet, axes, curve)
        known = _published_curve(published, curve)
        if known is not None:
            sheet.line(axes, f"{curve.positive}, published", known.alphas, known.empathy_rates, PUBLISHED)
        alpha_axis(axes, sorted({*curve.alphas, *(known.alphas if known else ())}), curve.in_norms)
        share_axis(axes, "share of samples")
        title = scenario_title(curve.scenario)
        sheet.title(axes, title, *([names(curve.setting)] if several else []))
    return PaperFigure(
        label="6a",
        name="dose-response",
        title="Dose response by scenario",
        drawing=sheet.render(),
        note=_left_out(curves),
    )


def projection_figure(curves: Sequence[DoseResponse], names: SettingNames) -> PaperFigure:
    """Draw figure 6, second part: mean projection by α, read while steering and read again without steering."""
    chosen = [
        curve
        for curve in _first_settings(curves)
        if any(row.mean_projection_generated is not None for row in curve.rows)
    ]
    figure = PaperFigure(
        label="6b",
        name="projection",
        title="Mean projection by α",
        note=_left_out(curves),
        missing="No row of this run has a readout of its generated tokens.",
    )
    if not chosen:
        return figure
    settings = list(dict.fromkeys(curve.setting for curve in chosen))
    sheet = Sheet(2 * len(settings), columns=2, panel=_WIDE_PANEL)
    scenarios = list(dict.fromkeys(curve.scenario for curve in chosen))
    for place, setting in enumerate(settings):
        steered, unsteered = sheet.panels[2 * place : 2 * place + 2]
        of_setting = [curve for curve in chosen if curve.setting == setting]
        for curve in of_setting:
            style = SERIES[scenarios.index(curve.scenario) % len(SERIES)]
            title = scenario_title(curve.scenario)
            read = [(row.alpha, row.mean_projection_generated) for row in curve.rows]
            known = [(alpha, value) for alpha, value in read if value is not None]
            sheet.line(steered, title, [alpha for alpha, _ in known], [value for _, value in known], style)
            again = [(row.alpha, row.mean_projection_unsteered) for row in curve.rows]
            values = [(alpha, value) for alpha, value in again if value is not None]
            if values:
                sheet.line(unsteered, title, [alpha for alpha, _ in values], [value for _, value in values], style)
        _unsteered_plus_alpha(sheet, steered, setting, of_setting)
        alphas = sorted({alpha for curve in of_setting for alpha in curve.alphas})
        for axes, how in ((steered, "read while steering"), (unsteered, "read again, unsteered")):
            alpha_axis(axes, alphas)
            axes.set_ylabel("projection")
            sheet.title(axes, f"{names(setting)}: {how}")
        if not unsteered.lines:
            unsteered.text(0.5, 0.5, "not read in this run", ha="center", transform=unsteered.transAxes)
            unsteered.set_yticks([])
    return figure.drawn(sheet.render())


def published_curves_figure(published: Published | None) -> PaperFigure:
    """Draw figure 6, third part: the published model's curves."""
    if published is None:
        return PaperFigure(
            label="6c",
            name="published-dose-response",
            title="Published",
            missing="The published curves are about empathy; this run's concept is another.",
        )
    curves = published.dose_response.curves
    scenarios = list(dict.fromkeys(curve.scenario for curve in curves))
    layers = sorted({curve.layer for curve in curves})
    sheet = Sheet(len(scenarios), panel=_PANEL)
    for axes, scenario in zip(sheet.panels, scenarios, strict=True):
        for curve in sorted((curve for curve in curves if curve.scenario == scenario), key=lambda curve: curve.layer):
            sheet.line(
                axes, f"layer {curve.layer}", curve.alphas, curve.empathy_rates, SERIES[layers.index(curve.layer)]
            )
        alpha_axis(axes, curves[0].alphas)
        share_axis(axes, "share empathetic")
        sheet.title(axes, scenario_title(scenario))
    model = curves[0].model
    return PaperFigure(
        label="6c",
        name="published-dose-response",
        title=f"Published: {model}",
        drawing=sheet.render(),
    )


def baseline_figure(curves: Sequence[DoseResponse], published: Published | None) -> PaperFigure:
    """Draw figure 7: rates at α = 0 by scenario."""
    by_model: dict[str, list[DoseResponse]] = {}
    for curve in curves:
        by_model.setdefault(curve.setting.model, []).append(curve)
    groups = {model: rows for model, own in by_model.items() if (rows := unsteered_rows(own))}
    figure = PaperFigure(
        label="7",
        name="baseline",
        title=f"Unsteered share {curves[0].positive} by scenario",
        missing="This run has no unsteered condition.",
    )
    if not groups:
        return figure
    paper: dict[str, list[float]] = {}
    for known in published.steering if published else ():
        if known.baseline_empathy_rate is not None:
            paper.setdefault(known.scenario, []).append(known.baseline_empathy_rate)
    scenarios = list(dict.fromkeys([curve.scenario for curve in curves]))
    means = {scenario: sum(paper[scenario]) / len(paper[scenario]) for scenario in scenarios if scenario in paper}
    theirs = {f"{published.steering[0].model}, published": means} if published and means else {}
    sheet = unsteered_sheet(groups, scenarios, theirs)
    share_axis(sheet.panels[0], f"share {curves[0].positive}")
    return figure.drawn(sheet.render())


def unsteered_rows(curves: Sequence[DoseResponse]) -> dict[str, ConditionScore]:
    """Scenario -> its condition at α = 0, of the first curve that has one."""
    found: dict[str, ConditionScore] = {}
    for curve in curves:
        for row in curve.rows:
            if row.alpha == 0.0:
                found.setdefault(curve.scenario, row)
    return found


def unsteered_sheet(
    groups: Mapping[str, Mapping[str, ConditionScore]],
    scenarios: Sequence[str],
    published: Mapping[str, Mapping[str, float]],
) -> Sheet:
    """A sheet with one bar a scenario and group, with its interval, and the published rates hatched behind them.

    `groups` and `published`: name -> scenario -> unsteered condition, or rate.
    """
    bars_each = len(groups) + len(published)
    width = 0.8 / bars_each
    sheet = Sheet(1, panel=(max(3.6, 1.1 * len(scenarios) + 1.2), 2.4))
    (axes,) = sheet.panels
    for place, (name, rows) in enumerate(groups.items()):
        sheet.bars(
            axes,
            name,
            [scenarios.index(scenario) + place * width for scenario in rows],
            [row.empathy_rate for row in rows.values()],
            SERIES[place % len(SERIES)],
            width=width * 0.9,
            low=[row.empathy_low for row in rows.values()],
            high=[row.empathy_high for row in rows.values()],
        )
    for place, (name, rates) in enumerate(published.items(), start=len(groups)):
        xs = [scenarios.index(scenario) + place * width for scenario in rates]
        style = Style(PUBLISHED.colour, filled=False)
        sheet.bars(axes, name, xs, list(rates.values()), style, width=width * 0.9)
    middle = width * (bars_each - 1) / 2
    axes.set_xticks([place + middle for place in range(len(scenarios))], [scenario_title(one) for one in scenarios])
    axes.set_xlabel("scenario")
    sheet.title(axes, "\u03b1 = 0")
    return sheet


def draw_rates(sheet: Sheet, axes: Axes, curve: DoseResponse) -> None:
    """Draw a curve's positive share with a band, and its coherent share with error bars."""
    low, high = curve.coherence_intervals
    sheet.line(axes, "coherent", curve.alphas, curve.coherence_rates, SERIES[1], low=low, high=high)
    low, high = curve.empathy_intervals
    sheet.line(axes, curve.positive, curve.alphas, curve.empathy_rates, SERIES[0], low=low, high=high, band=True)


def _unsteered_plus_alpha(sheet: Sheet, axes: Axes, setting: Setting, curves: Sequence[DoseResponse]) -> None:
    """Draw the values of a model that does not respond to steering: its unsteered mean plus α."""
    starts = [
        row.mean_projection_generated
        for curve in curves
        for row in curve.rows
        if row.alpha == 0.0 and row.mean_projection_generated is not None
    ]
    if not starts or setting.op != "add" or setting.span not in ("all", "generated", "response"):
        return
    start = sum(starts) / len(starts)
    ends = [min(curve.alphas[0] for curve in curves), max(curve.alphas[-1] for curve in curves)]
    values = [start + alpha for alpha in ends]
    axes.plot(ends, values, color=PALETTE["soft"], linestyle="--", linewidth=1.0, label="unsteered + \u03b1")


def _published_curve(published: Published | None, curve: DoseResponse) -> PublishedCurve | None:
    if published is None:
        return None
    model = published_model(curve.setting.model)
    return next(
        (
            known
            for known in published.dose_response.curves
            if (known.model, known.layer, known.scenario) == (model, curve.setting.layer, curve.scenario)
        ),
        None,
    )


def _first_settings(curves: Sequence[DoseResponse]) -> list[DoseResponse]:
    """The curves of as many settings as fit on one sheet, setting by setting."""
    settings = list(dict.fromkeys(curve.setting for curve in main_direction_first(curves)))
    scenarios = {curve.scenario for curve in curves}
    drawn = settings[: max(1, MAX_PANELS // len(scenarios))]
    return [curve for setting in drawn for curve in curves if curve.setting == setting]


def _left_out(curves: Sequence[DoseResponse]) -> str:
    count = len({curve.setting for curve in curves}) - len({curve.setting for curve in _first_settings(curves)})
    return f"{count} more settings are in the tables only." if count > 0 else ""
