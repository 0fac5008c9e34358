"""One of the paper's figures, made from a run: its drawing, or the reason why the run has none; its form in a page."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from markupsafe import escape

from batch_jobs.report.figures.sheet import Drawing
from batch_jobs.report.figures.style import PALETTE


@dataclass(frozen=True)
class PaperFigure:
    """A figure of the report, also written to `figures/`."""

    label: str
    """Its number in the paper, with a letter where several sheets make one figure: `1`, `6a`."""
    name: str
    title: str
    """Heading. The template has the caption, except `note`."""
    drawing: Drawing | None = None
    note: str = ""
    """Addition to the caption that depends on this run's data."""
    missing: str = ""
    """One sentence that the page shows when there is nothing to draw."""

    @property
    def stem(self) -> str:
        """File name without suffix, and prefix of the figure's ids in the page: `figure-6a-dose-response`."""
        return f"figure-{self.label}-{self.name}"

    def drawn(self, drawing: Drawing) -> PaperFigure:
        """A copy with this drawing."""
        return replace(self, drawing=drawing)


def inline_svg(drawing: Drawing, name: str, title: str) -> str:
    """The drawing's `<svg>` element: themed by CSS variables, ids prefixed with `name`, labelled for screen readers.

    Matplotlib has escaped the text in the drawing; `title` and the description are escaped here.
    """
    svg = drawing.svg[drawing.svg.index("<svg") :]
    # matplotlib's style element would apply to the whole page; the page's style sheet has the same rules for figures
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'\bhref="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    for variable, colour in PALETTE.items():
        svg = svg.replace(colour, f"var(--{variable})")
    svg = svg.replace("'DejaVu Sans'", "var(--sans)")
    box = re.search(r'viewBox="[^"]+"', svg)
    assert box is not None  # matplotlib always writes it
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {box.group()} role="img" '
        f'aria-labelledby="{name}-title {name}-desc"><title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-desc">{escape(drawing.description)}</desc>'
    )
    return head + svg[svg.index(">") + 1 :].rstrip()
