"""The section of a study that has the cost of steering measured."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict


class CostOptions(BaseModel):
    """Perplexity of neutral texts and accuracy on plain questions, under every steering of the grid.

    Of each direction's controls the first is measured too.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    texts: Path | None = None
    """JSON list of neutral texts; None: the bundled ones."""
    choices: Path | None = None
    """JSON list of questions, each with `start`, `options` and `right`; None: the bundled ones."""
