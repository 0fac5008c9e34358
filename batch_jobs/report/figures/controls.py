"""Figure of a direction's Δ beside those of its random controls."""

from __future__ import annotations

from collections.abc import Sequence

from batch_jobs.report.figures.paper_figure import PaperFigure
from batch_jobs.report.figures.sheet import Sheet
from batch_jobs.report.figures.style import SERIES, Style
from batch_jobs.report.number_text import scenario_title
from batch_jobs.scoring.scores_csv import SuccessRate
from batch_jobs.scoring.sign_and_layer_findings import ControlEffect

MAX_PANELS = 6
_PANEL = (3.3, 2.4)


def controls_figure(effects: Sequence[ControlEffect], rates: Sequence[SuccessRate]) -> PaperFigure:
    """Draw figure 11: Δ by scenario of each direction, with its interval, and of its controls; a panel a layer.

    Args:
        effects: the comparisons; those of all scenarios together come first in each panel.
        rates: the success rates, for the interval of each Δ.
    """
    figure = PaperFigure(
        label="11",
        name="controls",
        title="Δ beside controls",
        missing="No control direction went through this run's grid (steer.controls).",
    )
    panels = list(dict.fromkeys((one.layer, one.direction, one.span) for one in effects))
    if not panels:
        return figure
    left_out = len(panels) - MAX_PANELS
    panels = panels[:MAX_PANELS]
    sheet = Sheet(len(panels), columns=2, panel=_PANEL)
    for axes, (layer, direction, span) in zip(sheet.panels, panels, strict=True):
        of_panel = [one for one in effects if (one.layer, one.direction, one.span) == (layer, direction, span)]
        ends = {
            rate.scenario: (rate.delta_low, rate.delta_high)
            for rate in rates
            if (rate.layer, rate.direction, rate.span) == (layer, direction, span)
        }
        places = list(range(len(of_panel)))
        controls = [(place, delta) for place, one in enumerate(of_panel) for delta in one.comparison.control_deltas]
        style = Style("soft", "D", "", filled=False)
        sheet.points(axes, "controls", [place for place, _ in controls], [delta for _, delta in controls], style)
        known = [(place, one) for place, one in enumerate(of_panel) if one.scenario in ends]
        lows = [ends[one.scenario or ""][0] for _, one in known]
        highs = [ends[one.scenario or ""][1] for _, one in known]
        mark = Style(SERIES[0].colour, SERIES[0].marker, "")
        sheet.line(
            axes,
            "the direction",
            [place for place, _ in known],
            [one.comparison.delta for _, one in known],
            mark,
            low=[-1.0 if low is None else low for low in lows],
            high=[1.0 if high is None else high for high in highs],
        )
        pooled = [(place, one) for place, one in enumerate(of_panel) if one.scenario is None]
        sheet.points(
            axes, "the direction", [place for place, _ in pooled], [one.comparison.delta for _, one in pooled], mark
        )
        axes.axhline(0.0, linewidth=0.8, linestyle="--", color="0.6")
        names = ["all" if one.scenario is None else scenario_title(one.scenario) for one in of_panel]
        axes.set_xticks(places, names, rotation=20, ha="right")
        axes.set_xlim(-0.5, len(places) - 0.5)
        axes.set_ylim(-1.05, 1.05)
        axes.set_ylabel("Δ")
        sheet.title(axes, f"layer {layer}, {direction}")
    drawn = figure.drawn(sheet.render())
    return (
        drawn
        if left_out <= 0
        else PaperFigure(
            drawn.label, drawn.name, drawn.title, drawn.drawing, f"{left_out} more settings are in the table only."
        )
    )
