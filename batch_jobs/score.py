"""Offline scoring of steered generations, from their table alone: the `paper` metric.

A sample is *empathetic* when it holds more distinct empathy keywords than task keywords (case ignored,
matched as substrings, so "help" is found in "helpless"). Per condition the rate is the share of empathetic
samples, and effect(α) = rate(α) - rate(0). A nonzero α *succeeds* when (α > 0) == (effect > 0).

That success rule has a flaw, kept because published numbers rest on it: no effect at all counts as a success
at negative α and as a failure at positive α. Where every unsteered sample is empathetic already
(`baseline_ceiling`), no effect can be positive, so the success rate is the share of negative α in the grid,
0.5 for a symmetric one, whatever the model did. `baseline_floor` marks the mirror case: no effect can be
negative and every negative α succeeds for free.

Needs numpy and pyarrow only. The cost is one pass over the texts plus one hash grouping.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batch_jobs.paper_metric import has_context, is_coherent, is_empathetic, wilson_interval
from batch_jobs.scores import (
    GROUP_COLUMNS,
    ConditionScore,
    ScoreError,
    Scores,
    SuccessRate,
    read_scores,
    success_rates,
    write_scores,
)

__all__ = [
    "ConditionScore",
    "ScoreError",
    "Scores",
    "SuccessRate",
    "has_context",
    "is_coherent",
    "is_empathetic",
    "read_scores",
    "score_table",
    "wilson_interval",
    "write_scores",
]

NEEDED_COLUMNS = (
    *GROUP_COLUMNS, "alpha", "alpha_residual_norm", "completion", "completion_tokens", "projection_generated",
    "error",
)  # fmt: skip
_BATCH_ROWS = 8192

_Setting = tuple[str, int, str]  # model, layer, scenario


def score_table(table: pa.Table, markers: Mapping[str, Sequence[str]] | None = None) -> Scores:
    """Score generations, one row a sample, columns as in the generations' Parquet schema.

    `markers`: scenario id -> its context markers; a scenario without any gets `context_rate` None. Rows with
    an `error` are left out of every rate and counted in `failed`; a condition of which every row failed has
    no score and is left out. Rows at α = 0 are unsteered whatever their op, so they are pooled over
    direction, op and span into the scenario's baseline.

    Raises ScoreError when a column is missing or holds a null it must not, when α is not finite, or when a
    (model, layer, scenario) has no usable row at α = 0.
    """
    table = _checked(table)
    usable = table.filter(pc.is_null(table["error"]))
    keys = [*GROUP_COLUMNS, "alpha"]
    failed_rows = table.filter(pc.is_valid(table["error"])).group_by(keys).aggregate([([], "count_all")]).to_pylist()
    failed = {tuple(row[key] for key in keys): row["count_all"] for row in failed_rows}
    groups = (
        _with_text_scores(usable, markers or {})
        .group_by(keys)
        .aggregate([
            ([], "count_all"),
            ("empathetic", "sum"),
            ("coherent", "sum"),
            ("in_context", "sum"),
            # one value a condition: min is exact where a mean would round
            ("alpha_residual_norm", "min"),
            ("projection_generated", "mean"),
            ("completion_tokens", "mean"),
        ])
        .sort_by([(key, "ascending") for key in keys])
        .to_pylist()
    )  # fmt: skip
    baselines = _baseline_rates(groups, failed)
    conditions = tuple(
        _condition(row, failed.get(tuple(row[key] for key in keys), 0), baselines[_setting(row)]) for row in groups
    )
    return Scores(conditions=conditions, success=success_rates(conditions))


def _checked(table: pa.Table) -> pa.Table:
    """The needed columns, dictionary-encoded ones decoded and -0.0 made 0.0, or a ScoreError."""
    if missing := [name for name in NEEDED_COLUMNS if name not in table.column_names]:
        raise ScoreError(f"The table lacks the columns {missing}; it must hold {', '.join(NEEDED_COLUMNS)}.")
    table = table.select(list(NEEDED_COLUMNS))
    if table.num_rows == 0:
        raise ScoreError("The table has no rows; generate samples before scoring.")
    for index, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            table = table.set_column(index, field.name, table[field.name].cast(field.type.value_type))
    for name in (*GROUP_COLUMNS, "alpha"):
        if nulls := table[name].null_count:
            raise ScoreError(f"The column {name} is null in {nulls} of {table.num_rows} rows; every row must have it.")
    for name in ("alpha", "alpha_residual_norm", "projection_generated"):
        index = table.column_names.index(name)
        # adding 0.0 turns -0.0 into 0.0, which would otherwise be a group of its own
        table = table.set_column(index, name, pc.add(table[name].cast(pa.float64()), 0.0))
    if not pc.all(pc.is_finite(table["alpha"])).as_py():
        raise ScoreError("The column alpha holds NaN or infinity; every row needs a finite α.")
    return table


def _with_text_scores(table: pa.Table, markers: Mapping[str, Sequence[str]]) -> pa.Table:
    for name in ("completion", "completion_tokens"):
        if nulls := table[name].null_count:
            raise ScoreError(f"{nulls} rows have neither {name} nor an error; store one of the two for each.")
    empathetic = np.zeros(table.num_rows, dtype=np.int64)
    coherent = np.zeros(table.num_rows, dtype=np.int64)
    in_context: list[int | None] = []
    row = 0
    # in batches: a million completions as Python strings at once would take gigabytes
    for batch in table.select(["scenario", "completion"]).to_batches(max_chunksize=_BATCH_ROWS):
        for scenario, text in zip(batch["scenario"].to_pylist(), batch["completion"].to_pylist(), strict=True):
            empathetic[row], coherent[row] = is_empathetic(text), is_coherent(text)
            known = markers.get(scenario)
            in_context.append(int(has_context(text, known)) if known else None)
            row += 1
    return (
        table.append_column("empathetic", pa.array(empathetic))
        .append_column("coherent", pa.array(coherent))
        .append_column("in_context", pa.array(in_context, type=pa.int64()))
    )


def _setting(row: Mapping[str, Any]) -> _Setting:
    return row["model"], row["layer"], row["scenario"]


def _baseline_rates(
    groups: Sequence[Mapping[str, Any]], failed: Mapping[tuple[Any, ...], int]
) -> dict[_Setting, float]:
    totals: dict[_Setting, tuple[int, int]] = {}
    for row in groups:
        if row["alpha"] == 0.0:
            empathetic, samples = totals.get(_setting(row), (0, 0))
            totals[_setting(row)] = (empathetic + row["empathetic_sum"], samples + row["count_all"])
    wanted = {_setting(row) for row in groups} | {key[:3] for key in failed}
    if absent := sorted(wanted - set(totals)):
        model, layer, scenario = absent[0]
        raise ScoreError(
            f"Scenario {scenario} of {model} at layer {layer} has no usable row at α = 0 ({len(absent)} such "
            "in all); effects are measured against the unsteered rate, so add 0 to the study's alphas or run "
            "its failed rows again."
        )
    return {setting: empathetic / samples for setting, (empathetic, samples) in totals.items()}


def _condition(row: Mapping[str, Any], failed: int, baseline: float) -> ConditionScore:
    samples, empathetic, alpha = row["count_all"], row["empathetic_sum"], row["alpha"]
    rate = empathetic / samples
    low, high = wilson_interval(empathetic, samples)
    effect = rate - baseline
    judged = alpha != 0.0 and row["op"] == "add"
    in_context = row["in_context_sum"]
    return ConditionScore(
        **{name: row[name] for name in GROUP_COLUMNS},
        alpha=alpha,
        alpha_residual_norm=row["alpha_residual_norm_min"],
        samples=samples,
        failed=failed,
        empathy_rate=rate,
        empathy_low=low,
        empathy_high=high,
        baseline_empathy_rate=baseline,
        effect=effect,
        success=(alpha > 0) == (effect > 0) if judged else None,
        coherence_rate=row["coherent_sum"] / samples,
        context_rate=None if in_context is None else in_context / samples,
        mean_projection_generated=row["projection_generated_mean"],
        mean_completion_tokens=row["completion_tokens_mean"],
    )
