"""Figure of the cost of steering against its effect."""

from __future__ import annotations

from collections.abc import Sequence

from batch_jobs.config.steering import controlled_direction
from batch_jobs.report.figures.axes import share_axis
from batch_jobs.report.figures.paper_figure import PaperFigure
from batch_jobs.report.figures.sheet import Sheet
from batch_jobs.report.figures.style import SERIES, Style
from batch_jobs.report.table_rows import CostRow

_PANEL = (3.3, 2.4)


def cost_figure(rows: Sequence[CostRow]) -> PaperFigure:
    """Draw figure 10: perplexity and questions answered right against Δ."""
    figure = PaperFigure(
        label="10",
        name="cost",
        title="Cost against effect",
        missing="The cost of steering was not measured, or no strength was run with both signs.",
    )
    shown = [row for row in rows if row.delta is not None and row.point.direction is not None]
    if not shown:
        return figure
    sheet = Sheet(2, columns=2, panel=_PANEL)
    left, right = sheet.panels
    names = list(dict.fromkeys(row.name for row in shown if controlled_direction(row.point.direction or "") is None))
    for name in dict.fromkeys(row.name for row in shown):
        of_name = [row for row in shown if row.name == name]
        base = controlled_direction(of_name[0].point.direction or "")
        style = SERIES[names.index(name) % len(SERIES)] if base is None else Style("soft", "D", "", filled=False)
        label = name if base is None else "controls"
        deltas = [row.delta or 0.0 for row in of_name]
        sheet.points(left, label, deltas, [row.ratio for row in of_name], style)
        sheet.points(right, label, deltas, [row.point.choice_accuracy for row in of_name], style)
    left.axhline(1.0, linewidth=0.8, linestyle="--", color="0.6")
    left.set_ylabel("perplexity, ratio")
    share_axis(right, "questions right")
    for axes in sheet.panels:
        axes.set_xlabel("Δ")
        axes.axvline(0.0, linewidth=0.8, linestyle="--", color="0.6")
    sheet.title(left, "Neutral text")
    sheet.title(right, "Plain questions")
    return figure.drawn(sheet.render())
