"""One of the paper's figures, made from a run: its drawing, or the reason why the run has none."""

from __future__ import annotations

from dataclasses import dataclass, replace

from batch_jobs.report.figures.sheet import Drawing


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
