"""One of the paper's figures, made from a run: its drawing, or why the run has none."""

from __future__ import annotations

from dataclasses import dataclass, replace

from batch_jobs.report.figures.sheet import Drawing


@dataclass(frozen=True)
class PaperFigure:
    """A figure as the report places it and as `figures/` holds it."""

    label: str
    """Its number in the paper, with a letter where several sheets make one figure: `1`, `6a`."""
    name: str
    title: str
    """Its caption is the template's, all but `note`."""
    drawing: Drawing | None = None
    note: str = ""
    """What its caption must add because of this run's data."""
    missing: str = ""
    """One sentence for the page, where there is nothing to draw."""

    @property
    def stem(self) -> str:
        """File name without its ending, and the prefix of all ids inside the page: `figure-6a-dose-response`."""
        return f"figure-{self.label}-{self.name}"

    def drawn(self, drawing: Drawing) -> PaperFigure:
        return replace(self, drawing=drawing)
