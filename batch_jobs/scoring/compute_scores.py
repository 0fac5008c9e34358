"""Offline scoring of steered generations from their Parquet files: the `paper` metric, and effects with intervals.

A sample is *empathetic* when it holds more distinct empathy keywords than task keywords. Keywords match as substrings
in any case, so "help" is found in "helpless". A study of another concept has words of its own, or a judge, in their
place (`batch_jobs.scoring.outcome`); the names of columns stay. A condition's rate is its share of empathetic samples,
and effect(α) = rate(α) - rate(0). A nonzero α *succeeds* when (α > 0) == (effect > 0).

That success rule has a flaw, kept because the published numbers depend on it: an effect of 0 counts as a success at
negative α and as a failure at positive α. Where every unsteered sample is already empathetic (`cannot_rise`), no effect
can be positive, so the success rate is the share of negative α in the grid (0.5 for a symmetric grid), whatever the
model did: all verdicts are decided. Where none is (`cannot_fall`), no effect can be negative, and no verdict is
decided: a negative α fails where the rate rises.

The headline is therefore Δ, the mean rate at +α minus that at -α, with its interval: it uses no baseline. The corrected
success rate is kept beside the paper's. It counts a success only for a directional effect above 0, at both signs, and
leaves out the α that could not move in their direction and did not move; those that moved against it are failures. Each
effect has an exact p, and one adjusted for the number of conditions.

Needs numpy, scipy and pyarrow only. The cost is one pass over the texts (`batch_jobs.scoring.measures`) plus one hash
grouping of numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batch_jobs.rows.generation_parts import GROUP_COLUMNS, ScoreError
from batch_jobs.scoring.measures import Markers, measure_generations, measure_table
from batch_jobs.scoring.outcome import PAPER_OUTCOME, POSITIVE_GRADE, Outcome
from batch_jobs.scoring.paper_metric import has_context, is_coherent, is_empathetic
from batch_jobs.scoring.scores_csv import (
    ConditionScore,
    Scores,
    SuccessRate,
    among_alike,
    read_scores,
    success_rates,
    write_scores,
)
from batch_jobs.statistics.exact_tests import directional_p, false_discovery_q
from batch_jobs.statistics.rates import wilson_interval

__all__ = [
    "ConditionScore",
    "ScoreError",
    "Scores",
    "SuccessRate",
    "decide",
    "has_context",
    "is_coherent",
    "is_empathetic",
    "read_scores",
    "score_decided",
    "score_generations",
    "score_table",
    "wilson_interval",
    "write_scores",
]

_KEYS = (*GROUP_COLUMNS, "alpha")
_SUMS = (
    "empathetic",
    "empathetic_word_start",
    "word_start_change",
    "coherent",
    "in_context",
    "sound",
    "empty",
    "loop",
    "code_like",
    "soft_loop",
    "refusal",
    "short",
)
_MEANS = (
    "repetition",
    "compression_ratio",
    "log_likelihood",
    "projection_unsteered",
    "projection_generated",
    "completion_tokens",
    "grade",
)

_Key = tuple[Any, ...]  # the values of _KEYS
_Setting = tuple[str, int, str]  # model, layer, scenario
_Counts = tuple[int, int]  # empathetic samples, samples


def score_generations(
    folder: Path,
    markers: Markers | None = None,
    grades: Mapping[str, int] | None = None,
    processes: int | None = None,
    outcome: Outcome = PAPER_OUTCOME,
) -> Scores:
    """Score all parts under a folder of generations as `score_table` does, without holding their texts in memory.

    `processes`: see `batch_jobs.scoring.measures.measure_generations`.

    Raises:
        ScoreError: as for `score_table`; the message names the faulty part, where there is one.
    """
    measures = measure_generations(Path(folder), markers or {}, processes, outcome)
    return score_decided(decide(measures, grades, outcome))


def score_table(
    table: pa.Table,
    markers: Markers | None = None,
    grades: Mapping[str, int] | None = None,
    outcome: Outcome = PAPER_OUTCOME,
) -> Scores:
    """Score a table of generations.

    Rates and means leave out rows with an `error`, counted in `failed`, and rows that ended inside a thought (no
    `error`, no `completion`, but a `thought`), counted in `unfinished_thoughts`. A condition without other rows has no
    score. Rows at α = 0 are unsteered regardless of their op, so they are pooled over direction, op and span into the
    scenario's baseline.

    Args:
        table: one row per sample, with the columns of the generations' Parquet schema.
        markers: scenario id -> its context markers. A scenario without markers gets `context_rate` None.
        grades: row id -> a judge's 0, 1 or 2. Other rows have no grade.
        outcome: decides which samples are positive. Where that is the judge, only graded rows are scored; until every
            (model, layer, scenario) has a graded row at α = 0, all rows are scored, their rates are NaN and there are
            no success rates.

    Raises:
        ScoreError: the table has no rows, lacks a column or holds a null where none may be; α is not finite; a grade is
            not 0, 1 or 2; or a (model, layer, scenario) has no usable row at α = 0.
    """
    measures = measure_table(table, markers or {}, outcome)
    if measures.num_rows == 0:
        raise ScoreError("The table has no rows; generate samples before scoring.")
    return score_decided(decide(measures, grades, outcome))


def decide(measures: pa.Table, grades: Mapping[str, int] | None = None, outcome: Outcome = PAPER_OUTCOME) -> pa.Table:
    """The rows of `measure_table` or `measure_generations` with what the outcome makes of them.

    Returns:
        The table with `grade` (null without one), `empathetic` as the outcome decides it, `sound` (empathetic, coherent
        and, where there are markers, in context) and `word_start_change` (the verdict is another with keywords at word
        starts only). Where the judge decides, rows with an answer and no grade are left out; until every (model, layer,
        scenario) has a graded row at α = 0, none are, and `empathetic` is null in all rows.

    Raises:
        ScoreError: a grade is not 0, 1 or 2, or there are grades and no row ids.
    """
    measures = measures.append_column("grade", _grade_column(measures["row_id"], grades or {}))
    if outcome.judged and _baselines_are_graded(measures):
        measures = _decided_by_grade(measures)
    sound = pc.and_(pc.and_(measures["empathetic"], measures["coherent"]), pc.fill_null(measures["in_context"], True))
    changed = pc.xor(measures["empathetic"], measures["empathetic_word_start"])
    return measures.append_column("sound", sound).append_column("word_start_change", changed)


def score_decided(measures: pa.Table) -> Scores:
    """Score the rows of `decide`, as `score_table` does.

    Raises:
        ScoreError: as for `score_table`.
    """
    answers = pc.invert(pc.or_(measures["failed"], measures["in_thought"]))
    rated = measures["empathetic"].null_count < len(measures) or not pc.any(answers).as_py()
    failed, unfinished = _counts(measures, "failed"), _counts(measures, "in_thought")
    measures = measures.select([*_KEYS, *_SUMS, *_MEANS, "alpha_residual_norm"])  # the others would be copied
    groups = (
        # one thread: float sums depend on the order, and the same rows must give bit-identical scores
        measures.filter(answers)
        .group_by(list(_KEYS), use_threads=False)
        .aggregate(
            [
                ([], "count_all"),
                # all rows of a condition have the same value; min is exact, a mean would round
                ("alpha_residual_norm", "min"),
                *((name, "sum") for name in _SUMS),
                *((name, "mean") for name in _MEANS),
            ]
        )
        .sort_by([(key, "ascending") for key in _KEYS])
        .to_pylist()
    )
    if not rated:
        unrated = (_unrated(row, failed.get(_key(row), 0), unfinished.get(_key(row), 0)) for row in groups)
        return Scores(conditions=tuple(unrated), success=())
    baselines = _baselines(groups, failed, unfinished)
    p_values = _directional_p_values(groups, baselines)
    q_values = among_alike([row["direction"] for row in groups], p_values, false_discovery_q)
    usual = _unsteered_log_likelihoods(measures)
    conditions = tuple(
        _condition(
            row,
            failed.get(_key(row), 0),
            unfinished.get(_key(row), 0),
            baselines[_setting(row)],
            (p, q),
            usual.get(_setting(row)),
        )
        for row, p, q in zip(groups, p_values, q_values, strict=True)
    )
    return Scores(conditions=conditions, success=success_rates(conditions))


def _baselines_are_graded(measures: pa.Table) -> bool:
    """Whether every (model, layer, scenario) has a row at α = 0 that the judge graded."""
    places = ("model", "layer", "scenario")
    graded = measures.filter(pc.and_(pc.equal(measures["alpha"], 0.0), pc.is_valid(measures["grade"])))
    return bool(graded.group_by(places).aggregate([]).num_rows == measures.group_by(places).aggregate([]).num_rows)


def _decided_by_grade(measures: pa.Table) -> pa.Table:
    """The rows with a grade, which says whether they are positive, and those without an answer."""
    decided = pc.equal(measures["grade"], POSITIVE_GRADE)
    measures = measures.set_column(measures.schema.get_field_index("empathetic"), "empathetic", decided)
    unanswered = pc.or_(measures["failed"], measures["in_thought"])
    return measures.filter(pc.or_(unanswered, pc.is_valid(measures["grade"])))


def _counts(measures: pa.Table, flag: str) -> dict[_Key, int]:
    """Condition -> number of its rows with the flag; conditions without such rows are absent."""
    rows = measures.filter(measures[flag]).group_by(list(_KEYS)).aggregate([([], "count_all")]).to_pylist()
    return {_key(row): row["count_all"] for row in rows}


def _grade_column(row_ids: pa.ChunkedArray, grades: Mapping[str, int]) -> pa.Array:
    if stray := {grade for grade in grades.values() if grade not in (0, 1, 2)}:
        raise ScoreError(f"The judge's grades hold {sorted(stray)[:5]}; a grade is 0, 1 or 2.")
    if not grades:
        return pa.nulls(len(row_ids), pa.int8())
    if row_ids.null_count:
        raise ScoreError("The table has no row_id to find the judge's grades by; score it without them.")
    return pa.array([grades.get(row_id) for row_id in row_ids.to_pylist()], type=pa.int8())


def _key(row: Mapping[str, Any]) -> _Key:
    return tuple(row[key] for key in _KEYS)


def _setting(row: Mapping[str, Any]) -> _Setting:
    return row["model"], row["layer"], row["scenario"]


def _baselines(
    groups: Sequence[Mapping[str, Any]], failed: Mapping[_Key, int], unfinished: Mapping[_Key, int]
) -> dict[_Setting, _Counts]:
    totals: dict[_Setting, _Counts] = {}
    for row in groups:
        if row["alpha"] == 0.0:
            empathetic, samples = totals.get(_setting(row), (0, 0))
            totals[_setting(row)] = (empathetic + row["empathetic_sum"], samples + row["count_all"])
    wanted = {_setting(row) for row in groups} | {key[:3] for key in (*failed, *unfinished)}
    if absent := sorted(wanted - set(totals)):
        model, layer, scenario = absent[0]
        cut = sum(count for key, count in unfinished.items() if key[:3] == absent[0] and key[-1] == 0.0)
        advice = (
            f"{cut} of them ended inside a thought, so raise sampling.max_tokens or switch thinking off with "
            "chat_template_kwargs"
            if cut
            else "add 0 to the study's alphas or run its failed rows again"
        )
        raise ScoreError(
            f"Scenario {scenario} of {model} at layer {layer} has no usable row at α = 0 ({len(absent)} such "
            f"in all); effects are measured against the unsteered rate; {advice}."
        )
    return totals


def _judged(row: Mapping[str, Any]) -> bool:
    return bool(row["alpha"] != 0.0 and row["op"] == "add")


def _directional_p_values(
    groups: Sequence[Mapping[str, Any]], baselines: Mapping[_Setting, _Counts]
) -> list[float | None]:
    judged = [row for row in groups if _judged(row)]
    cells = [
        (1 if row["alpha"] > 0 else -1, row["empathetic_sum"], row["count_all"], *baselines[_setting(row)])
        for row in judged
    ]
    columns = np.array(cells, dtype=np.int64).reshape(-1, 5).T
    found = iter(directional_p(*columns).tolist())
    return [next(found) if _judged(row) else None for row in groups]


def _unsteered_log_likelihoods(measures: pa.Table) -> dict[_Setting, float]:
    """Median log-likelihood of the unsteered texts of each setting that has one."""
    rows = measures.filter(pc.and_(pc.equal(measures["alpha"], 0.0), pc.is_valid(measures["log_likelihood"])))
    groups = rows.group_by(["model", "layer", "scenario"]).aggregate([("log_likelihood", "list")]).to_pylist()
    return {_setting(group): float(np.median(group["log_likelihood_list"])) for group in groups}


def _unrated(row: Mapping[str, Any], failed: int, unfinished: int) -> ConditionScore:
    """The scores of a condition whose samples no one has yet told to be positive or not."""
    scored = _condition(
        {**row, "empathetic_sum": 0}, failed, unfinished, (0, row["count_all"]), (None, None), usual_log_likelihood=None
    )
    return replace(
        scored,
        empathy_rate=math.nan,
        empathy_low=math.nan,
        empathy_high=math.nan,
        baseline_empathy_rate=math.nan,
        effect=math.nan,
        directional_effect=None,
        success=None,
        cannot_rise=False,
        cannot_fall=False,
    )


def _condition(
    row: Mapping[str, Any],
    failed: int,
    unfinished: int,
    baseline: _Counts,
    p_and_q: tuple[float | None, float | None],
    usual_log_likelihood: float | None,
) -> ConditionScore:
    samples, empathetic, alpha = row["count_all"], row["empathetic_sum"], row["alpha"]
    rate, baseline_rate = empathetic / samples, baseline[0] / baseline[1]
    low, high = wilson_interval(empathetic, samples)
    effect = rate - baseline_rate
    judged = _judged(row)
    likelihood = row["log_likelihood_mean"]

    def share(name: str) -> float | None:
        found = row[f"{name}_sum"]
        return None if found is None else found / samples

    apart = None if likelihood is None or usual_log_likelihood is None else abs(likelihood - usual_log_likelihood)
    return ConditionScore(
        **{name: row[name] for name in GROUP_COLUMNS},
        alpha=alpha,
        alpha_residual_norm=row["alpha_residual_norm_min"],
        samples=samples,
        failed=failed,
        empathy_rate=rate,
        empathy_low=low,
        empathy_high=high,
        baseline_empathy_rate=baseline_rate,
        baseline_samples=baseline[1],
        effect=effect,
        directional_effect=(effect if alpha > 0 else -effect) if judged else None,
        effect_p=p_and_q[0],
        success=(alpha > 0) == (effect > 0) if judged else None,
        cannot_rise=baseline[0] == baseline[1],
        cannot_fall=baseline[0] == 0,
        coherence_rate=row["coherent_sum"] / samples,
        context_rate=share("in_context"),
        empty_rate=row["empty_sum"] / samples,
        loop_rate=row["loop_sum"] / samples,
        code_like_rate=row["code_like_sum"] / samples,
        mean_repetition=row["repetition_mean"],
        mean_compression_ratio=row["compression_ratio_mean"],
        mean_log_likelihood=likelihood,
        mean_projection_unsteered=row["projection_unsteered_mean"],
        mean_projection_generated=row["projection_generated_mean"],
        mean_completion_tokens=row["completion_tokens_mean"],
        mean_grade=row["grade_mean"],
        unfinished_thoughts=unfinished,
        effect_q=p_and_q[1],
        sound_rate=share("sound"),
        refusal_rate=row["refusal_sum"] / samples,
        short_rate=row["short_sum"] / samples,
        soft_loop_rate=row["soft_loop_sum"] / samples,
        log_likelihood_distance=apart,
        empathy_rate_word_start=share("empathetic_word_start"),
        word_start_changes=share("word_start_change"),
    )
