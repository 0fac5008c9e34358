"""What scoring yields: one row a condition, one success rate a group of conditions, and their CSV form."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from batch_jobs.atomic_file import write_atomically
from vllm_steer.errors import SteerError

GROUP_COLUMNS = ("model", "layer", "scenario", "direction", "op", "span")


class ScoreError(SteerError):
    """The table cannot be scored; the message says what is missing or wrong and what to do."""


@dataclass(frozen=True)
class ConditionScore:
    """One condition: all samples of one (model, layer, scenario, direction, op, span, α). Rates are shares in
    0..1."""

    model: str
    layer: int
    scenario: str
    direction: str
    op: str
    span: str
    alpha: float
    alpha_residual_norm: float | None
    """α over the layer's mean residual norm; None where the table does not have it."""
    samples: int
    """Rows scored. Failed rows (with an error) are not among them."""
    failed: int
    empathy_rate: float
    empathy_low: float
    """95 % Wilson interval of `empathy_rate`; with 5 samples it is wide, and should be shown."""
    empathy_high: float
    baseline_empathy_rate: float
    """`empathy_rate` of the unsteered rows (α = 0) of the same model, layer and scenario."""
    effect: float
    success: bool | None
    """None at α = 0, and for any op but `add`, where the sign of α does not say which way to expect the
    effect."""
    coherence_rate: float
    context_rate: float | None
    """None where no markers are known for the scenario."""
    mean_projection_generated: float | None
    """Mean over samples of the generated span's projection at the layer, after steering; None where none was
    read."""
    mean_completion_tokens: float


@dataclass(frozen=True)
class SuccessRate:
    """The paper's headline number for one (model, layer, scenario, direction, op, span)."""

    model: str
    layer: int
    scenario: str
    direction: str
    op: str
    span: str
    steering_success_rate: float
    """Share of the nonzero α that succeed. Read it together with the two flags."""
    baseline_empathy_rate: float
    num_alphas: int
    """Nonzero α counted."""
    coherence_rate: float
    """Share of coherent samples over those nonzero α."""
    baseline_ceiling: bool
    """Every unsteered sample is empathetic: the success rate is the share of negative α, whatever the model
    did."""
    baseline_floor: bool
    """No unsteered sample is empathetic: every negative α counts as a success, whatever the model did."""


@dataclass(frozen=True)
class Scores:
    """Scores of one table, ordered by model, layer, scenario, direction, op, span, α."""

    conditions: tuple[ConditionScore, ...]
    success: tuple[SuccessRate, ...]


def success_rates(conditions: Iterable[ConditionScore]) -> tuple[SuccessRate, ...]:
    """Success rates of the groups of conditions that differ in α only. A group with nothing to judge has no
    row."""
    groups: dict[tuple[str, int, str, str, str, str], list[ConditionScore]] = {}
    for row in conditions:
        if row.success is not None:
            key = (row.model, row.layer, row.scenario, row.direction, row.op, row.span)
            groups.setdefault(key, []).append(row)
    return tuple(
        SuccessRate(
            *key,
            steering_success_rate=sum(row.success is True for row in rows) / len(rows),
            baseline_empathy_rate=rows[0].baseline_empathy_rate,
            num_alphas=len(rows),
            coherence_rate=sum(row.coherence_rate * row.samples for row in rows) / sum(row.samples for row in rows),
            baseline_ceiling=rows[0].baseline_empathy_rate == 1.0,
            baseline_floor=rows[0].baseline_empathy_rate == 0.0,
        )
        for key, rows in groups.items()
    )


def write_scores(path: Path, scores: Scores) -> Path:
    """Write the conditions to `path` as CSV and the success rates to `<stem>_success.csv` beside it; return
    the latter.

    Columns are the fields of ConditionScore and SuccessRate; `path` also repeats `steering_success_rate`, so
    that it can be read alone. None is an empty cell, a boolean `true` or `false`, a float its shortest exact
    form. Each write is atomic.
    """
    path = Path(path)
    rates = {tuple(getattr(row, name) for name in GROUP_COLUMNS): row.steering_success_rate for row in scores.success}
    conditions = [
        {
            **asdict(row),
            "steering_success_rate": rates.get(tuple(getattr(row, name) for name in GROUP_COLUMNS)),
        }
        for row in scores.conditions
    ]
    condition_names = [*(field.name for field in fields(ConditionScore)), "steering_success_rate"]
    write_atomically(path, _csv(condition_names, conditions))
    success_path = path.with_name(f"{path.stem}_success.csv")
    success_names = [field.name for field in fields(SuccessRate)]
    write_atomically(success_path, _csv(success_names, [asdict(row) for row in scores.success]))
    return success_path


def read_scores(path: Path) -> Scores:
    """Read what `write_scores` wrote; success rates are worked out again from the conditions. Raises
    ScoreError, naming the file, when it is absent, lacks a column or holds a cell of the wrong type."""
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError as error:
        raise ScoreError(f"There is no scores file {path}; score the generations first.") from error
    try:
        conditions = tuple(
            ConditionScore(
                **{field.name: _PARSERS[str(field.type)](row[field.name]) for field in fields(ConditionScore)}
            )
            for row in rows
        )
    except (KeyError, ValueError, TypeError) as error:
        raise ScoreError(
            f"{path} has a missing column or a wrong cell ({error}); score the generations again."
        ) from error
    return Scores(conditions=conditions, success=success_rates(conditions))


def _csv(names: Sequence[str], rows: Iterable[Mapping[str, object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([_cell(row[name]) for name in names] for row in rows)
    return text.getvalue()


def _cell(value: object) -> str:
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


_PARSERS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "float | None": lambda cell: float(cell) if cell else None,
    "bool | None": lambda cell: {"true": True, "false": False, "": None}[cell],
}
