"""The figures the original study printed or shipped (arXiv 2511.16699), to stand beside a run's own.

They are facts, kept as `data/published.json`; each carries its source: a table or figure of the paper, a data file
of its authors. Where the two disagree both values are kept.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

REFERENCE_LAYER = 16
"""The published layer that stands in where a run's own was not published: the paper's best for steering."""

Share = Annotated[float, Field(ge=0, le=1)]


class _Fact(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PublishedLayer(_Fact):
    """Validation of one published direction. `layer` is the original's own number: it read hidden state number
    `layer`, which is the output of block `layer` - 1."""

    model: str
    layer: int
    auroc: Share
    accuracy: Share
    separation: float | None
    std_empathic: float | None
    std_non_empathic: float | None
    source: str


class PublishedBest(_Fact):
    """A row of Table 2. Two layers where the paper names both as best."""

    model: str
    layers: tuple[int, ...]
    auroc: Share
    accuracy: Share


class PublishedBests(_Fact):
    source: str
    rows: tuple[PublishedBest, ...]


class PublishedRandomBaseline(_Fact):
    """AUROC of the published direction against random unit vectors'."""

    source: str
    model: str
    layer: int
    probe_auroc: Share
    mean: float
    std: float
    percentile_95: float
    z_score: float
    aurocs: tuple[Share, ...]


class PublishedAblationSide(_Fact):
    auroc: Share
    accuracy: Share
    separation: float


class PublishedAblation(_Fact):
    """The direction on the test texts before and after the empathy words were replaced."""

    source: str
    model: str
    layer: int
    num_keywords: int
    replacements_per_text: float
    before: PublishedAblationSide
    """Its accuracy is the data file's, 0.933; Table 1 prints 1.000 for the same direction and texts."""
    after: PublishedAblationSide


class PublishedPoint(_Fact):
    projection: float
    grade: int = Field(ge=0, le=2)


class PublishedBinary(_Fact):
    """Table 3: grade 2 against grade 0."""

    n: int
    accuracy: Share
    precision: Share
    recall: Share
    f1: Share
    specificity: Share
    true_positives: int
    false_positives: int
    true_negatives: int
    false_negatives: int


class PublishedCorrelation(_Fact):
    """Projection against behaviour grade of hand-made completions."""

    source: str
    model: str
    layer: int
    n: int
    pearson_r: float
    pearson_p: float
    spearman_rho: float
    spearman_p: float
    points: tuple[PublishedPoint, ...]
    binary: PublishedBinary


class PublishedSteering(_Fact):
    """A row of Table 4."""

    model: str
    layer: int
    scenario: str
    success_rate: Share
    coherence_rate: Share
    coherence_rate_in_data: Share | None
    """What the paper's own metric gives over the nonzero α of the authors' generations, where those are public."""
    baseline_empathy_rate: Share | None
    num_alphas: int | None
    positive_alphas_only: bool
    """Dolphin's success rates count α > 0 only; its coherence counts all."""
    source: str


class PublishedCurve(_Fact):
    """Rates by α of one layer and scenario."""

    model: str
    layer: int
    scenario: str
    alphas: tuple[float, ...]
    empathy_rates: tuple[Share, ...]
    coherence_rates: tuple[Share, ...]


class PublishedCurves(_Fact):
    source: str
    samples: int
    """Samples behind each rate."""
    curves: tuple[PublishedCurve, ...]


class Published(_Fact):
    """All of `data/published.json`."""

    paper: str
    layers: tuple[PublishedLayer, ...]
    best_layers: PublishedBests
    random_baseline: PublishedRandomBaseline
    lexical_ablation: PublishedAblation
    correlation: PublishedCorrelation
    steering: tuple[PublishedSteering, ...]
    dose_response: PublishedCurves

    def models(self) -> tuple[str, ...]:
        """The models with validated layers, in the paper's order."""
        return tuple(dict.fromkeys(row.model for row in self.layers))

    def layers_of(self, model: str) -> dict[int, PublishedLayer]:
        return {row.layer: row for row in self.layers if row.model == model}


def published_model(model: str) -> str | None:
    """The paper's name of the model that a run calls `model` (a hub id or path), or None for one that the paper
    did not use. Compared by the last part of the name, case aside."""
    name = model.rstrip("/").rsplit("/", 1)[-1].lower()
    if "dolphin" in name and "llama" in name and "8b" in name:
        return "Dolphin-Llama-3.1-8B"
    return next((known for known in read_published().models() if known.lower() == name), None)


@cache
def read_published() -> Published:
    """The facts, read from the package."""
    return Published.model_validate_json((files("batch_jobs") / "data" / "published.json").read_bytes())
