"""The generated texts that a report shows: a bounded number per condition, each scored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from batch_jobs.scoring.degeneration import degeneration
from batch_jobs.scoring.outcome import PAPER_OUTCOME, POSITIVE_GRADE, Outcome
from batch_jobs.scoring.paper_metric import is_coherent
from batch_jobs.scoring.scores_csv import ScoreError
from batch_jobs.scoring.setting import Setting

Signature = Literal["empty", "loop", "code-like"]

_CONDITION = ("model", "layer", "direction", "op", "span", "scenario", "alpha")
_COLUMNS = (
    *_CONDITION,
    "alpha_residual_norm",
    "sample",
    "seed",
    "prompt",
    "completion",
    "finish_reason",
    "completion_tokens",
    "projection_generated",
    "error",
)
_OPTIONAL_COLUMNS = ("row_id", "projection_unsteered", "log_likelihood", "thought")


@dataclass(frozen=True)
class Sample:
    """One generated text and its scores."""

    sample: int
    seed: int
    text: str
    """The answer, without its thought."""
    positive: bool | None
    """By the outcome of the run's concept; None where a judge decides and gave no grade."""
    coherent: bool
    signatures: tuple[Signature, ...]
    """Ways in which the text fails as text; empty for most."""
    completion_tokens: int
    finish_reason: str
    projection_generated: float | None
    projection_unsteered: float | None
    log_likelihood: float | None
    thought: str | None
    """None where the model wrote no thought."""


@dataclass(frozen=True)
class SampleGroup:
    """The texts kept from one condition, in order of `sample`."""

    model: str
    layer: int
    scenario: str
    direction: str
    op: str
    span: str
    alpha: float
    alpha_residual_norm: float | None
    samples: tuple[Sample, ...]

    @property
    def setting(self) -> Setting:
        """The setting of the condition."""
        return Setting.of(self)


@dataclass(frozen=True)
class Generations:
    """Content of a run's Parquet files that the report uses."""

    num_rows: int
    """All rows, including failed ones."""
    errors: dict[str, int]
    """Error message -> number of failed rows, most frequent first."""
    unfinished_thoughts: int
    """Rows without an answer, because the generation ended inside a thought."""
    groups: tuple[SampleGroup, ...]
    """Ordered by model, layer, direction, op, span, scenario, α."""
    prompts: dict[str, str]
    """Scenario -> its steering prompt."""

    @property
    def num_failed(self) -> int:
        """Number of failed rows."""
        return sum(self.errors.values())

    @property
    def num_shown(self) -> int:
        """Number of texts kept."""
        return sum(len(group.samples) for group in self.groups)


def read_generations(
    folder: Path,
    *,
    per_condition: int,
    max_samples: int,
    outcome: Outcome = PAPER_OUTCOME,
    grades: Mapping[str, int] | None = None,
) -> Generations:
    """Read every `*.parquet` under `folder`, and keep the texts whose sample number is below `per_condition`.

    Fewer are kept where that would exceed `max_samples` in total. The other rows are only counted, so memory depends on
    the kept texts, not on the size of the grid. `outcome` says which are positive, by the judge's `grades` (row id ->
    0, 1 or 2) where it needs them. Folder names are not used: the files hold every column. The columns
    `row_id`, `projection_unsteered`, `log_likelihood` and `thought` may be missing.

    Raises:
        ScoreError: the folder has no Parquet files, or they lack another column; the message names the folder.
    """
    # a file name with a leading dot is a part that is still being written
    files = sorted(str(path) for path in Path(folder).glob("**/*.parquet") if not path.name.startswith("."))
    if not files:
        raise ScoreError(f"There are no Parquet files under {folder}; generate samples first.")
    dataset = ds.dataset(files, format="parquet")
    if missing := [name for name in _COLUMNS if name not in dataset.schema.names]:
        raise ScoreError(
            f"The Parquet files under {folder} lack the columns {missing}; they must hold {', '.join(_COLUMNS)}."
        )
    failed = dataset.to_table(columns=["error"], filter=pc.is_valid(pc.field("error")))["error"].to_pylist()
    kept = _kept_rows(dataset, per_condition, max_samples)
    positive = partial(_is_positive, outcome=outcome, grades=grades or {})
    return Generations(
        num_rows=dataset.count_rows(),
        errors=dict(Counter(failed).most_common()),
        unfinished_thoughts=dataset.count_rows(
            filter=pc.is_null(pc.field("error")) & pc.is_null(pc.field("completion"))
        ),
        groups=tuple(
            _group(list(rows), positive)
            for _, rows in groupby(kept, key=lambda row: [row[name] for name in _CONDITION])
        ),
        prompts={row["scenario"]: row["prompt"] for row in kept},
    )


def _kept_rows(dataset: ds.Dataset, per_condition: int, max_samples: int) -> list[dict[str, Any]]:
    usable = pc.is_null(pc.field("error")) & pc.is_valid(pc.field("completion"))
    # the narrow column of sample numbers gives the largest bound that fits before any text is read
    numbers = dataset.to_table(columns=["sample"], filter=usable & (pc.field("sample") < per_condition))["sample"]
    counts = Counter(numbers.to_pylist())
    bound, total = 0, 0
    while bound < per_condition and (bound == 0 or total + counts[bound] <= max_samples):
        total += counts[bound]
        bound += 1
    names = [*_COLUMNS, *(name for name in _OPTIONAL_COLUMNS if name in dataset.schema.names)]
    table: pa.Table = dataset.to_table(columns=names, filter=usable & (pc.field("sample") < bound))
    order = [(name, "ascending") for name in (*_CONDITION, "sample")]
    rows: list[dict[str, Any]] = table.sort_by(order).slice(0, max_samples).to_pylist()
    return rows


def _is_positive(row: dict[str, Any], outcome: Outcome, grades: Mapping[str, int]) -> bool | None:
    if not outcome.judged:
        return outcome.grade(row["completion"]) == POSITIVE_GRADE
    grade = grades.get(row.get("row_id", ""))
    return None if grade is None else grade == POSITIVE_GRADE


def _group(rows: list[dict[str, Any]], positive: Callable[[dict[str, Any]], bool | None]) -> SampleGroup:
    first = rows[0]
    return SampleGroup(
        **{name: first[name] for name in _CONDITION},
        alpha_residual_norm=first["alpha_residual_norm"],
        samples=tuple(_sample(row, positive(row)) for row in rows),
    )


def _sample(row: dict[str, Any], positive: bool | None) -> Sample:
    text = row["completion"]
    broken = degeneration(text)
    found: tuple[tuple[Signature, bool], ...] = (
        ("empty", broken.empty),
        ("loop", broken.loop),
        ("code-like", broken.code_like),
    )
    return Sample(
        sample=row["sample"],
        seed=row["seed"],
        text=text,
        positive=positive,
        coherent=is_coherent(text),
        signatures=tuple(name for name, is_found in found if is_found),
        completion_tokens=row["completion_tokens"],
        finish_reason=row["finish_reason"],
        projection_generated=row["projection_generated"],
        projection_unsteered=row.get("projection_unsteered"),
        log_likelihood=row.get("log_likelihood"),
        thought=row.get("thought"),
    )
