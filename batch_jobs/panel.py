"""One panel of a figure as geometry: axes, series and reference lines in pixel coordinates of a viewBox.

The template draws them as inline SVG whose colours come from the page's style sheet, so that one figure
serves light and dark and is sharp at any size. Coordinates: x to the right, y down, origin at the top left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

WIDTH = 340.0
LEFT, RIGHT, BOTTOM = 46.0, 14.0, 44.0
TOP_PLAIN, TOP_WITH_AXIS = 14.0, 44.0
PLOT_HEIGHT = 176.0
LABEL_CHARACTER = 5.6
"""Width of one character of a tick label, for leaving out labels that would touch."""
LABEL_GAP = 5.0
MARK_RADIUS = 3.4

STYLE_NAMES = ("s1", "s2", "s3", "s4", "s5")
"""CSS classes of the series, each with a colour and a mark of its own."""
_CORNERS = {
    "s2": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    "s3": ((0.0, -1.2), (1.15, 0.9), (-1.15, 0.9)),
    "s4": ((0.0, -1.3), (1.3, 0.0), (0.0, 1.3), (-1.3, 0.0)),
    "s5": ((0.0, 1.2), (1.15, -0.9), (-1.15, -0.9)),
}
"""Corners of the marks that are no circle, in units of the radius: square, two triangles, diamond."""

MINUS = "\u2212"


@dataclass(frozen=True)
class Value:
    """One data point; `low`..`high` is drawn as an error bar."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Line:
    """One data series. `style` is the CSS class; the mark's shape goes with it, so that colour is never the
    only cue."""

    name: str
    style: str
    values: tuple[Value, ...]


@dataclass(frozen=True)
class Tick:
    """A tick; an empty label leaves the stroke alone."""

    at: float
    label: str


@dataclass(frozen=True)
class Mark:
    """One drawn point: the path of its shape, its error bar and its tooltip."""

    path: str
    x: float
    bar: tuple[float, float] | None
    tip: str


@dataclass(frozen=True)
class Series:
    name: str
    style: str
    path: str
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class Figure:
    """All that the template needs to draw one panel."""

    title: str
    description: str
    """Read out by screen readers: what is plotted and its values."""
    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    x_ticks: tuple[Tick, ...]
    top_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    x_label: str
    top_label: str
    y_label: str
    series: tuple[Series, ...]
    references: tuple[str, ...]
    """Paths of dashed reference lines."""


@dataclass(frozen=True)
class Axis:
    """A linear scale from `low`..`high` in data to `start`..`end` in pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)


@dataclass(frozen=True)
class Panel:
    """What a figure shows, in data units; `draw` turns it into geometry."""

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    x_ticks: tuple[float, ...]
    y_range: tuple[float, float] | None = None
    """None: taken from the data."""
    top_label: str = ""
    top_ticks: tuple[tuple[float, float], ...] = ()
    """(x in units of the lower axis, number to print)."""
    references: tuple[tuple[tuple[float, float], tuple[float, float]], ...] = ()
    """Dashed straight lines from one (x, y) to another."""
    x_text: Callable[[float], str] = field(default=lambda value: number(value))


def number(value: float, digits: int = 3) -> str:
    """A number for people: `digits` significant ones, a true minus sign, no exponent below a million."""
    if abs(value) >= 1000:
        text = f"{value:,.0f}" if abs(value) < 1e6 else f"{value:.2e}"
    else:
        text = f"{value:.{digits}g}"
        if "e" in text:
            text = "0" if abs(value) < 1e-12 else f"{value:.1e}"
    return text.replace("-", MINUS)


def round_ticks(low: float, high: float, count: int = 6) -> tuple[float, ...]:
    """About `count` multiples of 1, 2 or 5 times a power of ten within low..high."""
    raw = (high - low) / count
    scale = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * scale for factor in (1, 2, 5, 10) if factor * scale >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(round(index * step, 12) for index in range(first, last + 1))


def draw(panel: Panel) -> Figure:
    """Lay a panel out. It must have a line with at least one value; α axes get padding so that marks stay
    inside."""
    top = TOP_WITH_AXIS if panel.top_ticks else TOP_PLAIN
    bottom = top + PLOT_HEIGHT
    values = [value for line in panel.lines for value in line.values]
    x_low, x_high = _padded([value.x for value in values] + list(panel.x_ticks), 0.05)
    ends = [end for value in values for end in (value.y, value.low, value.high) if end is not None]
    ends += [y for line in panel.references for _, y in line]
    y_low, y_high = panel.y_range or _padded(ends, 0.08)
    x = Axis(x_low, x_high, LEFT, WIDTH - RIGHT)
    y = Axis(y_low, y_high, bottom, top)
    y_values = round_ticks(y_low, y_high)
    step = y_values[1] - y_values[0]
    # all labels of an axis with as many places as its step needs
    places = max(0, -math.floor(math.log10(step) + 1e-9))
    y_ticks = tuple(Tick(y(value), f"{value:,.{places}f}".replace("-", MINUS)) for value in y_values)
    series = tuple(_series(line, x, y, panel) for line in panel.lines)
    return Figure(
        title=panel.title,
        description=_description(panel),
        width=WIDTH,
        height=bottom + BOTTOM,
        left=LEFT,
        right=WIDTH - RIGHT,
        top=top,
        bottom=bottom,
        x_ticks=_thinned((x(value), value, panel.x_text(value)) for value in panel.x_ticks),
        top_ticks=_thinned((x(at), value, number(value)) for at, value in panel.top_ticks),
        y_ticks=y_ticks,
        x_label=panel.x_label,
        top_label=panel.top_label if panel.top_ticks else "",
        y_label=panel.y_label,
        series=series,
        references=tuple(f"M{x(a[0])} {y(a[1])}L{x(b[0])} {y(b[1])}" for a, b in panel.references),
    )


def _padded(values: Sequence[float], share: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    # a single value still needs an axis of some length
    pad = (high - low) * share or max(abs(low), 1.0) * 0.5
    return low - pad, high + pad


def _thinned(ticks: Iterable[tuple[float, float, str]]) -> tuple[Tick, ...]:
    """All ticks, but only labels that do not touch: zero first, then the outermost, then inwards."""
    ticks = list(ticks)
    taken: list[tuple[float, float]] = []
    labelled = set()
    for at, _, label in sorted(ticks, key=lambda tick: (tick[1] != 0, -abs(tick[1]))):
        half = (len(label) * LABEL_CHARACTER + LABEL_GAP) / 2
        if all(at + half <= start or at - half >= end for start, end in taken):
            taken.append((at - half, at + half))
            labelled.add(at)
    return tuple(Tick(at, label if at in labelled else "") for at, _, label in ticks)


def _series(line: Line, x: Axis, y: Axis, panel: Panel) -> Series:
    points = [(x(value.x), y(value.y)) for value in line.values]
    marks = tuple(
        Mark(
            path=mark_path(line.style, *point),
            x=point[0],
            bar=None if value.low is None or value.high is None else (y(value.low), y(value.high)),
            tip=f"{line.name}: {number(value.y)} at {panel.x_text(value.x)}",
        )
        for value, point in zip(line.values, points, strict=True)
    )
    return Series(line.name, line.style, "M" + "L".join(f"{px} {py}" for px, py in points), marks)


def mark_path(style: str, x: float, y: float) -> str:
    """The outline of the style's mark around (x, y), as an SVG path. `style` is one of s1 to s5."""
    if style == "s1":
        r = MARK_RADIUS
        return f"M{x - r:.2f} {y:.2f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0Z"
    corners = (f"{x + dx * MARK_RADIUS:.2f} {y + dy * MARK_RADIUS:.2f}" for dx, dy in _CORNERS[style])
    return f"M{'L'.join(corners)}Z"


def _description(panel: Panel) -> str:
    parts = [
        f"{line.name}: " + ", ".join(f"{number(value.y)} at {panel.x_text(value.x)}" for value in line.values)
        for line in panel.lines
    ]
    return f"{panel.y_label} against {panel.x_label}. " + ". ".join(parts) + "."
