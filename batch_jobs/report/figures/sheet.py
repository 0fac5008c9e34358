"""The sheet a figure is drawn on: a grid of panels and a legend, drawn by matplotlib, saved as SVG and PNG.

The SVG uses the light palette and keeps text as text. The same data gives the same bytes.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from batch_jobs.report.figures.style import PALETTE, Style
from batch_jobs.report.number_text import number
from batch_jobs.scoring.scores_csv import csv_text

PNG_DPI = 200
PANEL_WIDTH, PANEL_HEIGHT = 2.35, 1.95
"""Size of one panel in inches; three panels span the page's text."""
AXIS_WIDTH = 0.5
"""Width of a panel's y axis in inches; the title begins right of it."""
TITLE_CHARACTER = 0.085
"""Width of one title character in inches."""
LEGEND_CHARACTER = 0.065
"""Width of one legend character in inches."""
LEGEND_HANDLE = 0.55
"""Width of a legend handle in inches."""
LEGEND_ROW = 0.2
"""Height of a legend row in inches."""


@dataclass(frozen=True)
class Drawing:
    """A drawn figure."""

    svg: str
    png: bytes
    description: str
    """Plotted series with their values, for readers who cannot see the figure."""
    width_pt: float
    """Width in points."""
    numbers: str
    """CSV of what is plotted: `panel,series,x,y,low,high`, with `low` and `high` empty where no interval is drawn."""


class Sheet:
    """A grid of panels and one legend below them."""

    def __init__(
        self, num_panels: int, *, columns: int = 3, panel: tuple[float, float] = (PANEL_WIDTH, PANEL_HEIGHT)
    ) -> None:
        """`columns`: at most this many panels side by side. `panel`: width and height of one in inches."""
        columns = min(columns, num_panels)
        rows = math.ceil(num_panels / columns)
        self._width, self._height = panel[0] * columns, panel[1] * rows
        self.figure = Figure(figsize=(self._width, self._height), layout="constrained")
        grid = self.figure.subplots(rows, columns, squeeze=False)
        self.panels: list[Axes] = list(grid.flat)[:num_panels]
        for spare in list(grid.flat)[num_panels:]:
            spare.remove()
        self._title_characters = int((panel[0] - AXIS_WIDTH) / TITLE_CHARACTER)
        self._said: dict[Axes, list[str]] = {axes: [] for axes in self.panels}
        self._numbers: list[tuple[Axes, str, float, float, float | None, float | None]] = []

    def title(self, axes: Axes, *lines: str) -> None:
        """Set a panel's title. Lines wider than the panel are wrapped."""
        fitting = [part for line in lines for part in textwrap.wrap(line, self._title_characters)]
        axes.set_title("\n".join(fitting))

    def line(
        self,
        axes: Axes,
        name: str,
        xs: Sequence[float],
        ys: Sequence[float],
        style: Style,
        *,
        low: Sequence[float] | None = None,
        high: Sequence[float] | None = None,
        band: bool = False,
    ) -> None:
        """Draw a series of points joined by a line.

        `low` and `high`: ends of its intervals, drawn as error bars or, with `band`, as a band. An empty series is not
        drawn: without clipping, matplotlib would give it an infinite extent in the layout.
        """
        if not xs:
            return
        self.record(axes, name, xs, ys, low, high)
        colour = PALETTE[style.colour]
        if low is not None and high is not None:
            if band:
                axes.fill_between(xs, low, high, color=colour, alpha=0.16, linewidth=0)
            else:
                axes.vlines(xs, low, high, color=colour, linewidth=1.0, alpha=0.6)
        axes.plot(
            xs,
            ys,
            color=colour,
            linestyle=style.line,
            marker=style.marker,
            markerfacecolor=colour if style.filled else PALETTE["paper"],
            markeredgecolor=colour,
            # larger, so that an open mark stays visible under a filled one
            markersize=matplotlib.rcParams["lines.markersize"] + (0.0 if style.filled else 0.9),
            label=name,
            clip_on=False,
            zorder=3,
        )
        self._say(axes, name, xs, ys)

    def bars(
        self,
        axes: Axes,
        name: str,
        xs: Sequence[float],
        ys: Sequence[float],
        style: Style,
        *,
        width: float,
        low: Sequence[float] | None = None,
        high: Sequence[float] | None = None,
    ) -> None:
        """Draw bars from 0; those of an unfilled style are hatched. `low` and `high`: ends of the intervals."""
        self.record(axes, name, xs, ys, low, high)
        colour = PALETTE[style.colour]
        axes.bar(
            xs,
            ys,
            width,
            label=name,
            facecolor=colour if style.filled else "none",
            edgecolor=colour,
            hatch=None if style.filled else "////",
            linewidth=0.8,
            zorder=2,
        )
        if low is not None and high is not None:
            axes.vlines(xs, low, high, color=PALETTE["ink"], linewidth=1.0, zorder=3)
        # a bar of height 0 is a result too, but invisible; mark it
        if zeros := [x for x, y in zip(xs, ys, strict=True) if y == 0]:
            axes.plot(
                zeros, [0.0] * len(zeros), linestyle="none", marker="_", markersize=9, color=colour, clip_on=False
            )
        self._say(axes, name, xs, ys)

    def points(self, axes: Axes, name: str, xs: Sequence[float], ys: Sequence[float], style: Style) -> None:
        """Draw a scatter of points. The description gives their number and range. An empty series is not drawn."""
        if not xs:
            return
        self.record(axes, name, xs, ys)
        colour = PALETTE[style.colour]
        axes.plot(
            xs,
            ys,
            linestyle="none",
            marker=style.marker,
            color=colour,
            markerfacecolor=colour if style.filled else "none",
            markersize=3.6,
            alpha=0.75,
            label=name,
            clip_on=False,
        )
        self.say(axes, f"{name}: {len(xs)} points, {number(min(ys))} to {number(max(ys))}")

    def record(
        self,
        axes: Axes,
        name: str,
        xs: Sequence[float],
        ys: Sequence[float],
        low: Sequence[float] | None = None,
        high: Sequence[float] | None = None,
    ) -> None:
        """Add a series to the drawing's numbers; `line`, `bars` and `points` do so themselves."""
        missing = [None] * len(xs)
        for x, y, bottom, top in zip(xs, ys, low or missing, high or missing, strict=True):
            self._numbers.append((axes, name, x, y, bottom, top))

    def say(self, axes: Axes, words: str) -> None:
        """Add `words` to the description of a panel."""
        self._said[axes].append(words)

    def render(self, *, legend: bool = True) -> Drawing:
        """Draw the sheet. The legend shows each name of any panel once."""
        if legend:
            self._add_legend()
        # the steps of Figure.savefig one by one, because it would lay out and draw each figure five times
        layout = self.figure.get_layout_engine()
        if layout is not None:
            layout.execute(self.figure)
        self.figure.set_layout_engine("none")
        svg, png = io.StringIO(), io.BytesIO()
        # no date and no creator, so that the same data gives the same bytes
        about = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        FigureCanvasSVG(self.figure).print_svg(svg, metadata=about)  # type: ignore[no-untyped-call]  # not annotated
        self.figure.set_dpi(PNG_DPI)
        FigureCanvasAgg(self.figure).print_png(png, metadata={"Software": None})  # type: ignore[no-untyped-call]  # as above
        description = " ".join(
            f"{axes.get_title(loc='left')}: {axes.get_ylabel()} against {axes.get_xlabel()}. {'; '.join(said)}."
            for axes, said in self._said.items()
        )
        rows = [(" ".join(axes.get_title(loc="left").split()), *row) for axes, *row in self._numbers]
        columns = ("panel", "series", "x", "y", "low", "high")
        numbers = csv_text(columns, [dict(zip(columns, row, strict=True)) for row in rows])
        return Drawing(svg.getvalue(), png.getvalue(), description, self.figure.get_figwidth() * 72, numbers)

    def _say(self, axes: Axes, name: str, xs: Sequence[float], ys: Sequence[float]) -> None:
        self.say(axes, f"{name}: " + ", ".join(f"{number(y)} at {number(x)}" for x, y in zip(xs, ys, strict=True)))

    def _add_legend(self) -> None:
        entries = {
            label: handle
            for axes in self.panels
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        if not entries:
            return
        widest = max(map(len, entries)) * LEGEND_CHARACTER + LEGEND_HANDLE
        columns = max(1, min(len(entries), int(self._width / widest)))
        rows = math.ceil(len(entries) / columns)
        self.figure.set_size_inches(self._width, self._height + LEGEND_ROW * rows)
        self.figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns)
