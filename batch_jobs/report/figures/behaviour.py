"""Figure 5: projections of completions on the direction, by behaviour grade."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from batch_jobs.report.figures.paper_figure import PaperFigure
from batch_jobs.report.figures.sheet import Sheet
from batch_jobs.report.figures.style import PALETTE, Style
from batch_jobs.report.number_text import fixed
from batch_jobs.report.published import Published
from batch_jobs.scoring.correlation import GRADES
from batch_jobs.scoring.direction_behaviour import DirectionBehaviour

MAX_PANELS = 5
_JITTER = 0.13
_GRADED_BY = {"judge": "the judge", "keywords": "the keyword metric", "both": "judge and keyword metric"}
_STEERED, _UNSTEERED = Style("s1", "o", filled=False), Style("s2", "s")


def behaviour_figure(behaviours: Sequence[DirectionBehaviour], published: Published | None) -> PaperFigure:
    """Draw projection against grade: one panel per layer and direction, and one of the published points."""
    shown = behaviours[:MAX_PANELS]
    figure = PaperFigure(
        label="5",
        name="behaviour",
        title="Projection against behaviour",
        missing="This run did not read its completions again without steering, so there is no behaviour correlation.",
    )
    if not shown:
        return figure
    sheet = Sheet(len(shown) + bool(published), panel=(2.35, 2.1))
    several = len({row.direction for row in shown}) > 1
    for axes, row in zip(sheet.panels, shown, strict=False):
        for name, style, unsteered in (("steered", _STEERED, False), ("unsteered (α = 0)", _UNSTEERED, True)):
            points = [point for point in row.points if (point.alpha == 0.0) == unsteered]
            _scatter(sheet, axes, name, [p.grade for p in points], [p.projection for p in points], style)
        _means(sheet, axes, [point.grade for point in row.points], [point.projection for point in row.points])
        name = f", {row.direction}" if several else ""
        correlation = row.samples.correlation
        _label(sheet, axes, f"Layer {row.layer}{name}", correlation.pearson_r, correlation.spearman_rho, correlation.n)
    if published is None:
        return figure.drawn(sheet.render())
    theirs = published.correlation
    axes = sheet.panels[-1]
    grades, projections = [p.grade for p in theirs.points], [p.projection for p in theirs.points]
    _scatter(sheet, axes, "published", grades, projections, Style("soft", "D"))
    _means(sheet, axes, grades, projections)
    _label(sheet, axes, f"{theirs.model.split('-mini')[0]}, published", theirs.pearson_r, theirs.spearman_rho, theirs.n)
    return figure.drawn(sheet.render())


def _scatter(
    sheet: Sheet, axes: Axes, name: str, grades: Sequence[int], projections: Sequence[float], style: Style
) -> None:
    # seeded by the number of points, so that the same data gives the same figure
    spread = np.random.default_rng(len(grades)).uniform(-_JITTER, _JITTER, len(grades))
    xs = [grade + float(shift) for grade, shift in zip(grades, spread, strict=True)]
    sheet.points(axes, name, xs, projections, style)


def _means(sheet: Sheet, axes: Axes, grades: Sequence[int], projections: Sequence[float]) -> None:
    for grade in sorted(set(grades)):
        mean = float(np.mean([value for value, of in zip(projections, grades, strict=True) if of == grade]))
        axes.hlines(mean, grade - 0.28, grade + 0.28, color=PALETTE["ink"], linewidth=1.4, zorder=4)
        sheet.say(axes, f"mean at grade {grade}: {fixed(mean, 2)}")


def _label(sheet: Sheet, axes: Axes, title: str, r: float | None, rho: float | None, n: int) -> None:
    sheet.title(axes, title, f"r {fixed(r, 2)}, ρ {fixed(rho, 2)}, n {n}")
    axes.set_xticks(GRADES)
    axes.set_xlim(-0.5, 2.5)
    axes.set_xlabel("grade")
    axes.set_ylabel("projection")
