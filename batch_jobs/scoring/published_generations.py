"""Convert the original study's raw files of steered generations into a table for scoring, and into a CSV of rates.

Structure of a file: `layer_results` -> `experiments` (one per scenario) -> `conditions` (one per α) -> `samples`. Files
with several models have this object one level deeper, under `models`: as a list, or as a mapping from the model's key.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
from pydantic import BaseModel, FiniteFloat, TypeAdapter, ValidationError

from batch_jobs.files.atomic import write_atomically
from batch_jobs.files.documents import read_json
from batch_jobs.rows.generation_parts import COLUMN_TYPES, GROUP_COLUMNS, ScoreError
from batch_jobs.scoring.compute_scores import score_table
from batch_jobs.scoring.scores_csv import Scores, SuccessRate, csv_text, group_key

# not in the files, but known from the method: one direction, added to every token
DIRECTION: Final = "empathy"
OP: Final = "add"
SPAN: Final = "all"

PUBLISHED_COLUMNS: Final = (
    "model",
    "layer",
    "scenario",
    "steering_success_rate",
    "baseline_empathy_rate",
    "num_alphas",
)
"""The columns of the original success CSV. The additional columns follow them."""
_OWN_RATES = tuple(
    field.name for field in fields(SuccessRate) if field.name not in {*PUBLISHED_COLUMNS, *GROUP_COLUMNS}
)
_FAILURES = ("empty_rate", "loop_rate", "code_like_rate")


class _Condition(BaseModel):
    alpha: FiniteFloat
    samples: list[str | None] | None = None


class _Experiment(BaseModel):
    scenario: str
    conditions: list[_Condition]


class _LayerResult(BaseModel):
    layer: int
    experiments: list[_Experiment]


class _ModelResult(BaseModel):
    model_key: str
    layer_results: list[_LayerResult]


def read_published_generations(raw: Path) -> pa.Table:
    """Read the samples of a raw file as rows for `score_table`, in the file's order.

    `model` is the file's `model_key`. A null sample is an empty completion, as in the original's counts. A condition
    without samples has no row. Columns that the file does not hold (seeds, token counts, projections, norms) are null.

    Raises:
        ScoreError: the file is absent, not JSON, of another structure, holds text without a UTF-8 form, or has no
            samples. The message is one line and names the file and the place in it.
    """
    rows = [
        {
            "model": model.model_key,
            "layer": result.layer,
            "scenario": experiment.scenario,
            "direction": DIRECTION,
            "op": OP,
            "span": SPAN,
            "alpha": condition.alpha,
            "sample": number,
            "completion": sample or "",
        }
        for model in _models(raw)
        for result in model.layer_results
        for experiment in result.experiments
        for condition in experiment.conditions
        for number, sample in enumerate(condition.samples or ())
    ]
    if not rows:
        raise ScoreError(f"{raw} holds no samples; give a raw file of steered generations.")
    return pa.Table.from_pylist(rows, schema=pa.schema(list(COLUMN_TYPES.items())))


def score_raw(raw: Path, out: Path) -> Path:
    """Score a raw file and write one row per (model, layer, scenario) to `out`, in the file's order; return `out`.

    Columns: the original CSV's `model, layer, scenario, steering_success_rate, baseline_empathy_rate, num_alphas`, then
    the other fields of SuccessRate, then the shares of empty, looping and code-like samples over the nonzero α. Cells
    have the format of `write_scores`.

    Raises:
        ScoreError: as for `read_published_generations` and `score_table`.
    """
    table = read_published_generations(raw)
    try:
        scores = score_table(table)
    except ScoreError as error:
        raise ScoreError(f"{raw}: {error}") from error
    places = dict.fromkeys(zip(*(table[name].to_pylist() for name in ("model", "layer", "scenario")), strict=True))
    order = {place: index for index, place in enumerate(places)}
    rates = sorted(scores.success, key=lambda rate: order[rate.model, rate.layer, rate.scenario])
    return write_rates(Path(out), scores, rates)


def write_rates(out: Path, scores: Scores, rates: Sequence[SuccessRate], last: Sequence[str] = ()) -> Path:
    """Write success rates as a CSV with the columns of `score_raw`, and behind them the fields named by `last`."""
    rows = [{**asdict(rate), **_failure_rates(scores, rate)} for rate in rates]
    write_atomically(out, csv_text((*PUBLISHED_COLUMNS, *_OWN_RATES, *_FAILURES, *last), rows))
    return out


def _failure_rates(scores: Scores, rate: SuccessRate) -> dict[str, float]:
    steered = [row for row in scores.conditions if group_key(row) == group_key(rate) and row.success is not None]
    samples = sum(row.samples for row in steered)
    return {name: sum(getattr(row, name) * row.samples for row in steered) / samples for name in _FAILURES}


def _models(raw: Path) -> list[_ModelResult]:
    document = read_json(Path(raw), advice="give a raw file of steered generations", error=ScoreError)
    try:
        return TypeAdapter(list[_ModelResult]).validate_python(list(_model_objects(document)))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        index, *place = first["loc"]
        raise ScoreError(
            f"{raw}: model {index}, {'.'.join(map(str, place)) or 'the whole object'}: {first['msg']}; expected "
            "layer_results -> experiments -> conditions -> samples, at the top or under models."
        ) from error


def _model_objects(document: Any) -> Iterator[Any]:
    """Yield the per-model objects, each with a `model_key`: its own, else its mapping key, else its full name."""
    nested = isinstance(document, dict) and "models" in document
    models = document["models"] if nested else document
    if nested and isinstance(models, dict) and "layer_results" not in models:
        keyed: list[tuple[str | None, Any]] = list(models.items())
    else:
        keyed = [(None, model) for model in (models if isinstance(models, list) else [models])]
    for key, model in keyed:
        yield {"model_key": key or model.get("model"), **model} if isinstance(model, dict) else model
