"""The look of all figures: palette, marks and lines of the series, matplotlib settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import matplotlib

PALETTE: Final = {
    "paper": "#fdfdfc",
    "ink": "#1d1f22",
    "soft": "#5c626a",
    "rule": "#d9dbde",
    "s1": "#0072b2",
    "s2": "#b84e00",
    "s3": "#008060",
    "s4": "#a8568a",
    "s5": "#6b6f00",
}
"""CSS variable -> its colour in the light theme. s1 to s5 are Okabe and Ito's colour-blind safe hues, darkened for
sufficient contrast on `paper`. All values differ, so that each colour in an SVG identifies its variable."""

_LOOK: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vllm-steer",
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 6,
    "axes.labelsize": 8,
    "axes.labelcolor": PALETTE["soft"],
    "axes.titlecolor": PALETTE["ink"],
    "axes.edgecolor": PALETTE["soft"],
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": PALETTE["rule"],
    "grid.linewidth": 0.7,
    "xtick.color": PALETTE["soft"],
    "ytick.color": PALETTE["soft"],
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "ytick.left": False,
    "text.color": PALETTE["ink"],
    "figure.facecolor": PALETTE["paper"],
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "legend.labelcolor": PALETTE["soft"],
    "lines.linewidth": 1.5,
    "lines.markersize": 4.6,
    "hatch.linewidth": 0.7,
}


@dataclass(frozen=True)
class Style:
    """Look of a series. Series never differ by colour alone."""

    colour: str
    """Key of PALETTE."""
    marker: str = "o"
    line: str = "-"
    filled: bool = True


SERIES: Final = (
    Style("s1", "o"),
    Style("s2", "s", "--", filled=False),
    Style("s3", "^", "-."),
    Style("s4", "D", ":", filled=False),
    Style("s5", "v"),
)
PUBLISHED: Final = Style("soft", "x", (":"))
"""Style of the paper's values next to the run's."""


@contextmanager
def figure_look() -> Iterator[None]:
    """Context for making figures. Create and draw them inside it: matplotlib reads its settings at both times."""
    with matplotlib.rc_context(_LOOK):
        yield
