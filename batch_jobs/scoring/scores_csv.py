"""Results of scoring: one score per condition, one success rate per group of conditions, and their CSV files."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from batch_jobs.files.atomic import write_atomically
from batch_jobs.rows.generation_parts import ScoreError as ScoreError  # re-exported: reading scores raises it
from batch_jobs.scoring.count_statistics import balance, trend

GroupKey = tuple[str, int, str, str, str, str]


@dataclass(frozen=True)
class ConditionScore:
    """Scores of one condition: all samples of one (model, layer, scenario, direction, op, span, α).

    Rates are shares in 0..1.
    """

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
    """Rows scored, without failed rows (with an error) and rows that ended inside a thought."""
    failed: int
    """Rows with an error."""
    empathy_rate: float
    """Share of positive samples, whatever the concept. NaN, like every number made from it, where a judge decides and
    has not graded yet."""
    empathy_low: float
    """Lower end of the 95 % Wilson interval of `empathy_rate`. Show the interval: with 5 samples it is wide."""
    empathy_high: float
    baseline_empathy_rate: float
    """`empathy_rate` of the unsteered rows (α = 0) of the same model, layer and scenario."""
    baseline_samples: int
    """Rows that the baseline rate is computed from."""
    effect: float
    """`empathy_rate - baseline_empathy_rate`, in -1..1."""
    directional_effect: float | None
    """`effect` times the sign of α: above 0 when the effect has the expected direction. None at α = 0 and for ops other
    than `add`, where the sign of α does not determine the expected direction."""
    effect_p: float | None
    """Fisher's exact one-sided p that the directional effect is above 0; None where `directional_effect` is None."""
    success: bool | None
    """The paper's rule, (α > 0) == (effect > 0); None where `directional_effect` is None."""
    cannot_rise: bool
    """The baseline is 1.0: no effect can be above 0."""
    cannot_fall: bool
    """The baseline is 0.0: no effect can be below 0."""
    coherence_rate: float
    context_rate: float | None
    """Share of samples in context; None where the scenario has no markers."""
    empty_rate: float
    loop_rate: float
    code_like_rate: float
    mean_repetition: float
    """Mean share of repeated 4-grams, in 0..1."""
    mean_compression_ratio: float | None
    """Mean of zlib bytes over UTF-8 bytes; None when every sample is empty."""
    mean_log_likelihood: float | None
    """Mean over samples of the completion's log probability per token under the unsteered model, in nats; None where it
    was not computed."""
    mean_projection_unsteered: float | None
    """Mean over samples of the completion's projection when the unsteered model reads it; None where it was not
    computed."""
    mean_projection_generated: float | None
    """Mean over samples of the generated span's projection at the layer, after steering; None where none was read."""
    mean_completion_tokens: float | None
    """Mean number of generated tokens, thoughts included; None where the table does not count them."""
    mean_grade: float | None
    """Mean of the judge's grades, in 0..2, over the samples that have one; None without a judge."""
    unfinished_thoughts: int = 0
    """Rows without an answer, because the generation ended inside a thought."""

    @property
    def decidable(self) -> bool:
        """Whether the condition has a `success` and the baseline allows an effect in the direction of α."""
        return self.success is not None and not (self.cannot_rise if self.alpha > 0 else self.cannot_fall)


@dataclass(frozen=True)
class SuccessRate:
    """The paper's headline number for one (model, layer, scenario, direction, op, span), and its corrections."""

    model: str
    layer: int
    scenario: str
    direction: str
    op: str
    span: str
    steering_success_rate: float
    """Share of the nonzero α that succeed by the paper's rule. Interpret it together with the two flags."""
    baseline_empathy_rate: float
    num_alphas: int
    """Number of nonzero α."""
    coherence_rate: float
    """Share of coherent samples over these nonzero α."""
    cannot_rise: bool
    """Every unsteered sample is empathetic, so the paper's rate is the share of negative α, whatever the model did."""
    cannot_fall: bool
    """No unsteered sample is empathetic, so every negative α counts as a success, whatever the model did."""
    corrected_success_rate: float | None
    """Share of the decidable α whose directional effect is above 0; None when no α is decidable."""
    num_decidable: int
    """Number of nonzero α whose direction the baseline allows. The corrected rate ignores the others."""
    trend: float | None
    """Spearman correlation of α and empathetic (0/1) over all samples, baseline included, in -1..1; None when all
    samples are alike."""
    trend_p: float | None
    """One-sided permutation p that the trend is above 0."""
    asymmetry: float | None
    """(gain at +α - loss at -α) / (|gain| + |loss|), in -1..1; see `batch_jobs.scoring.count_statistics.Balance`."""


@dataclass(frozen=True)
class Scores:
    """Scores of one table, ordered by model, layer, scenario, direction, op, span, α."""

    conditions: tuple[ConditionScore, ...]
    success: tuple[SuccessRate, ...]


def group_key(row: ConditionScore | SuccessRate) -> GroupKey:
    """The (model, layer, scenario, direction, op, span) of a row."""
    return row.model, row.layer, row.scenario, row.direction, row.op, row.span


def success_rates(conditions: Iterable[ConditionScore]) -> tuple[SuccessRate, ...]:
    """Success rates, one per group of conditions that differ only in α. A group without a nonzero α of op `add` has no
    rate."""
    groups: dict[GroupKey, list[ConditionScore]] = {}
    for row in conditions:
        if row.success is not None:
            groups.setdefault(group_key(row), []).append(row)
    return tuple(_success_rate(key, rows) for key, rows in groups.items())


def _success_rate(key: GroupKey, rows: Sequence[ConditionScore]) -> SuccessRate:
    first = rows[0]
    baseline = first.baseline_empathy_rate
    decidable = [row for row in rows if row.decidable]
    # rounding recovers the counts exactly: k / n times n is within an ulp of k
    dose_response = trend(
        [0.0, *(row.alpha for row in rows)],
        [round(baseline * first.baseline_samples), *(round(row.empathy_rate * row.samples) for row in rows)],
        [first.baseline_samples, *(row.samples for row in rows)],
    )
    signs = balance({row.alpha: row.empathy_rate for row in rows}, baseline)
    return SuccessRate(
        *key,
        steering_success_rate=sum(row.success is True for row in rows) / len(rows),
        baseline_empathy_rate=baseline,
        num_alphas=len(rows),
        coherence_rate=sum(row.coherence_rate * row.samples for row in rows) / sum(row.samples for row in rows),
        cannot_rise=first.cannot_rise,
        cannot_fall=first.cannot_fall,
        corrected_success_rate=(
            sum((row.directional_effect or 0.0) > 0 for row in decidable) / len(decidable) if decidable else None
        ),
        num_decidable=len(decidable),
        trend=dose_response.rho if dose_response else None,
        trend_p=dose_response.p if dose_response else None,
        asymmetry=signs.index if signs else None,
    )


def write_scores(path: Path, scores: Scores) -> Path:
    """Write the conditions to `path` as CSV and the success rates to `<stem>_success.csv` next to it.

    Columns are the fields of ConditionScore and SuccessRate. `path` also has a column `steering_success_rate`, so that
    it can be used alone. Cells: empty for None, `true` or `false`, and the shortest exact form of a float. Each write
    is atomic.

    Returns:
        The path of the success rates.
    """
    path = Path(path)
    rates = {group_key(row): row.steering_success_rate for row in scores.success}
    conditions = [
        {
            **asdict(row),
            "steering_success_rate": rates.get(group_key(row)),
        }
        for row in scores.conditions
    ]
    condition_names = [*(field.name for field in fields(ConditionScore)), "steering_success_rate"]
    write_atomically(path, csv_text(condition_names, conditions))
    success_path = path.with_name(f"{path.stem}_success.csv")
    success_names = [field.name for field in fields(SuccessRate)]
    write_atomically(success_path, csv_text(success_names, [asdict(row) for row in scores.success]))
    return success_path


def read_scores(path: Path) -> Scores:
    """Read a file of `write_scores`. Success rates are recomputed from the conditions.

    Columns that files of earlier versions lack get their defaults.

    Raises:
        ScoreError: the file is absent, lacks another column or holds a cell of the wrong type; the message names it.
    """
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError as error:
        raise ScoreError(f"There is no scores file {path}; score the generations first.") from error
    try:
        conditions = tuple(
            ConditionScore(
                **{
                    field.name: _PARSERS[str(field.type)](row[field.name])
                    for field in fields(ConditionScore)
                    if field.name in row or field.default is MISSING
                }
            )
            for row in rows
        )
    except (KeyError, ValueError, TypeError) as error:
        raise ScoreError(
            f"{path} has a missing column or a wrong cell ({error}); score the generations again."
        ) from error
    return Scores(conditions=conditions, success=success_rates(conditions))


def csv_text(names: Sequence[str], rows: Iterable[Mapping[str, object]]) -> str:
    """CSV with a header of `names` and these fields of each row, with cells as in `write_scores`."""
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
    "bool": lambda cell: {"true": True, "false": False}[cell],
    "bool | None": lambda cell: {"true": True, "false": False, "": None}[cell],
}
