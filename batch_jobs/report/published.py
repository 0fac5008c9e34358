"""Numbers that the original study published (arXiv 2511.16699), for comparison with a run's own.

They are stored in `data/published.json`, each with its source: a table or figure of the paper, or a data file of its
authors. Where the two disagree, both values are kept.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

REFERENCE_LAYER = 16
"""The published layer shown where a run's own layer was not published: the paper's best layer for steering."""

Share = Annotated[float, Field(ge=0, le=1)]


class _Fact(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PublishedLayer(_Fact):
    """Validation of one published direction.

    `layer` is the original's number: it read hidden state number `layer`, the output of block `layer` - 1.
    """

    model: str
    layer: int
    auroc: Share
    accuracy: Share
    separation: float | None
    std_empathic: float | None
    std_non_empathic: float | None
    source: str


class PublishedBest(_Fact):
    """A row of Table 2. It has two layers where the paper names both as best."""

    model: str
    layers: tuple[int, ...]
    auroc: Share
    accuracy: Share


class PublishedBests(_Fact):
    """Table 2: best layers by model."""

    source: str
    rows: tuple[PublishedBest, ...]


class PublishedRandomBaseline(_Fact):
    """AUROC of the published direction and of random unit vectors."""

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
    """The direction on one version of the test texts."""

    auroc: Share
    accuracy: Share
    separation: float


class PublishedAblation(_Fact):
    """The direction on the test texts before and after the replacement of empathy words."""

    source: str
    model: str
    layer: int
    num_keywords: int
    replacements_per_text: float
    before: PublishedAblationSide
    """The accuracy is from the data file, 0.933; Table 1 prints 1.000 for the same direction and texts."""
    after: PublishedAblationSide


class PublishedPoint(_Fact):
    """Projection and behaviour grade of one completion."""

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
    """Result of the paper's own metric over the nonzero α of the authors' generations, where those are public."""
    baseline_empathy_rate: Share | None
    num_alphas: int | None
    positive_alphas_only: bool
    """Whether the success rate counts α > 0 only, as for Dolphin. Its coherence rate counts all α."""
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
    """Dose-response curves of one source."""

    source: str
    samples: int
    """Samples per rate."""
    curves: tuple[PublishedCurve, ...]


class Published(_Fact):
    """Content of `data/published.json`."""

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
        """Layer -> validation of the model's published direction; empty for an unknown model."""
        return {row.layer: row for row in self.layers if row.model == model}


def published_model(model: str) -> str | None:
    """The paper's name for a run's `model` (a hub id or path); None for a model that the paper did not use.

    Compares the last part of the name, ignoring case.
    """
    name = model.rstrip("/").rsplit("/", 1)[-1].lower()
    if "dolphin" in name and "llama" in name and "8b" in name:
        return "Dolphin-Llama-3.1-8B"
    return next((known for known in read_published().models() if known.lower() == name), None)


@cache
def read_published() -> Published:
    """Read the published numbers from the package."""
    return Published.model_validate_json((files("batch_jobs") / "data" / "published.json").read_bytes())
