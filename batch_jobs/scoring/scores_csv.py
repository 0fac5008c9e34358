"""Results of scoring: one score per condition, one success rate per group of conditions, and their CSV files."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from batch_jobs.config.steering import controlled_direction
from batch_jobs.files.atomic import write_atomically
from batch_jobs.rows.generation_parts import ScoreError as ScoreError  # re-exported: reading scores raises it
from batch_jobs.statistics.alpha_auc import alpha_auc
from batch_jobs.statistics.exact_tests import holm_p
from batch_jobs.statistics.rates import Cell
from batch_jobs.statistics.signs_of_alpha import delta, sign_effects
from batch_jobs.statistics.trend import trend

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
    """Boschloo's exact one-sided p that the directional effect is above 0; None where `directional_effect` is None."""
    success: bool | None
    """The paper's rule, (α > 0) == (effect > 0); None where `directional_effect` is None."""
    cannot_rise: bool
    """The baseline is 1.0: no effect can be above 0. By the paper's rule every negative α succeeds and every positive α
    fails, whatever the model does."""
    cannot_fall: bool
    """The baseline is 0.0: no effect can be below 0. That decides nothing by the paper's rule: a negative α fails where
    the rate rises and succeeds only where it stays at 0."""
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
    effect_q: float | None = None
    """`effect_p` adjusted by Benjamini and Hochberg for the number of conditions that have one. Conditions of control
    directions are adjusted among themselves."""
    sound_rate: float | None = None
    """Share of samples that are empathetic, coherent and, where the scenario has markers, in context: a rate that
    broken text cannot raise."""
    refusal_rate: float | None = None
    """Share of samples that begin by declining ("I can't assist with that")."""
    short_rate: float | None = None
    """Share of samples of fewer than ten words, without empty ones."""
    soft_loop_rate: float | None = None
    """Share of samples of which 35 % or more of the 4-grams repeat, without those of `loop_rate`."""
    log_likelihood_distance: float | None = None
    """|`mean_log_likelihood` - median of the unsteered texts of the same model, layer and scenario|, in nats per token.
    Text that the model would not write has a low log-likelihood, and a loop a high one; both lie far from the
    median."""
    empathy_rate_word_start: float | None = None
    """`empathy_rate` with keywords counted at word starts only, where "win" is not found in "following"."""
    word_start_changes: float | None = None
    """Share of samples whose verdict changes by that."""

    @property
    def decided(self) -> bool:
        """Whether the baseline alone decides `success`."""
        return self.success is not None and self.cannot_rise

    @property
    def decidable(self) -> bool:
        """Whether the corrected rate counts the condition: the baseline allows an effect in the direction of α, or the
        effect is against it. Only a rate that cannot move in the direction of α and did not move is left out."""
        room = not (self.cannot_rise if self.alpha > 0 else self.cannot_fall)
        return self.success is not None and (room or self.effect != 0.0)

    @property
    def cell(self) -> Cell:
        """Empathetic samples and samples."""
        return round(self.empathy_rate * self.samples), self.samples  # exact: k / n times n is within an ulp of k


@dataclass(frozen=True)
class SuccessRate:
    """The paper's number and ours for one (model, layer, scenario, direction, op, span).

    `delta` is the headline: it needs no baseline. Intervals are 95 %; `docs/reference/statistics.md` has the formulas.
    """

    model: str
    layer: int
    scenario: str
    direction: str
    op: str
    span: str
    steering_success_rate: float
    """Share of the nonzero α that succeed by the paper's rule, ties included. Read it with `num_decided`."""
    baseline_empathy_rate: float
    num_alphas: int
    """Number of nonzero α."""
    delta: float | None
    """Mean empathetic rate at +α minus that at -α over the |α| run with both signs, in -1..1; None where there is
    none."""
    delta_low: float | None
    delta_high: float | None
    coherence_rate: float
    """Share of coherent samples over these nonzero α."""
    cannot_rise: bool
    """Every unsteered sample is empathetic, so the paper's rate is the share of negative α, whatever the model did."""
    cannot_fall: bool
    """No unsteered sample is empathetic, so a negative α succeeds where the rate stays at 0 and fails where it
    rises."""
    num_decided: int
    """Number of nonzero α whose success by the paper's rule the baseline alone decides: all of them where
    `cannot_rise`, else none."""
    corrected_success_rate: float | None
    """Share of the decidable α whose directional effect is above 0; None when no α is decidable. Superseded by `delta`:
    ties fail, so without any effect it averages below one half."""
    num_decidable: int
    """Number of nonzero α that the corrected rate counts: the baseline allows an effect in the direction of α, or the
    effect is against it."""
    trend: float | None
    """Spearman correlation of α and empathetic (0/1) over all samples, baseline included, in -1..1; None when all
    samples are alike."""
    trend_p: float | None
    """One-sided permutation p that the trend is above 0."""
    trend_p_holm: float | None
    """`trend_p` adjusted by Holm for the number of trends. Those of control directions are adjusted among
    themselves."""
    alpha_auc: float | None
    """P(α of an empathetic sample > α of another), ties one half, over all samples, baseline included; 0.5 without a
    trend, 1 for a perfect step. None when all samples are alike."""
    alpha_auc_low: float | None
    alpha_auc_high: float | None
    gain: float | None
    """Mean rise of the empathetic rate at +α against the baseline, over the |α| run with both signs, in -1..1."""
    loss: float | None
    """Mean fall at -α. `gain + loss` is `delta`."""
    gain_minus_loss: float | None
    """In -2..2; its interval includes the uncertainty of the baseline."""
    gain_minus_loss_low: float | None
    gain_minus_loss_high: float | None
    delta_word_start: float | None
    """`delta` with keywords counted at word starts only."""
    word_start_changes: float | None
    """Share of the samples at these nonzero α whose verdict changes by that."""


@dataclass(frozen=True)
class Scores:
    """Scores of one table, ordered by model, layer, scenario, direction, op, span, α."""

    conditions: tuple[ConditionScore, ...]
    success: tuple[SuccessRate, ...]

    @property
    def without_controls(self) -> Scores:
        """The scores of the directions themselves, and of the unsteered model."""
        return Scores(
            conditions=tuple(row for row in self.conditions if controlled_direction(row.direction) is None),
            success=tuple(rate for rate in self.success if controlled_direction(rate.direction) is None),
        )


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
    rates = [_success_rate(key, rows) for key, rows in groups.items()]
    adjusted = among_alike([rate.direction for rate in rates], [rate.trend_p for rate in rates], holm_p)
    return tuple(replace(rate, trend_p_holm=p) for rate, p in zip(rates, adjusted, strict=True))


def among_alike(
    directions: Sequence[str],
    p_values: Sequence[float | None],
    adjust: Callable[[Sequence[float | None]], list[float | None]],
) -> list[float | None]:
    """Adjust the p values of control directions and those of all other directions apart.

    `directions`: the direction that each p value is of.
    """
    control = [controlled_direction(name) is not None for name in directions]
    # of each family the other's places are None, which `adjust` leaves alone
    families = [
        adjust([p if own == family else None for p, own in zip(p_values, control, strict=True)])
        for family in (False, True)
    ]
    return [families[own][index] for index, own in enumerate(control)]


def _success_rate(key: GroupKey, rows: Sequence[ConditionScore]) -> SuccessRate:
    first = rows[0]
    baseline = first.baseline_empathy_rate
    decidable = [row for row in rows if row.decidable]
    cells = {row.alpha: row.cell for row in rows}
    # the baseline is pooled over directions, so no condition of the group holds it
    unsteered = (round(baseline * first.baseline_samples), first.baseline_samples)
    with_baseline = {0.0: unsteered, **cells}
    dose_response = trend(list(with_baseline), *([cell[part] for cell in with_baseline.values()] for part in (0, 1)))
    auc = alpha_auc(with_baseline)
    signs = sign_effects(cells, unsteered)
    at_word_starts = _word_start_cells(rows)
    shifted = delta(at_word_starts) if at_word_starts else None
    samples = sum(row.samples for row in rows)
    return SuccessRate(
        *key,
        steering_success_rate=sum(row.success is True for row in rows) / len(rows),
        baseline_empathy_rate=baseline,
        num_alphas=len(rows),
        delta=signs.delta.value if signs else None,
        delta_low=signs.delta.low if signs else None,
        delta_high=signs.delta.high if signs else None,
        coherence_rate=sum(row.coherence_rate * row.samples for row in rows) / samples,
        cannot_rise=first.cannot_rise,
        cannot_fall=first.cannot_fall,
        num_decided=sum(row.decided for row in rows),
        corrected_success_rate=(
            sum((row.directional_effect or 0.0) > 0 for row in decidable) / len(decidable) if decidable else None
        ),
        num_decidable=len(decidable),
        trend=dose_response.rho if dose_response else None,
        trend_p=dose_response.p if dose_response else None,
        trend_p_holm=None,  # needs the other groups
        alpha_auc=auc.value if auc else None,
        alpha_auc_low=auc.low if auc else None,
        alpha_auc_high=auc.high if auc else None,
        gain=signs.gain if signs else None,
        loss=signs.loss if signs else None,
        gain_minus_loss=signs.gain_minus_loss.value if signs else None,
        gain_minus_loss_low=signs.gain_minus_loss.low if signs else None,
        gain_minus_loss_high=signs.gain_minus_loss.high if signs else None,
        delta_word_start=shifted.value if shifted else None,
        word_start_changes=(
            sum(round((row.word_start_changes or 0.0) * row.samples) for row in rows) / samples
            if at_word_starts
            else None
        ),
    )


def _word_start_cells(rows: Sequence[ConditionScore]) -> dict[float, Cell] | None:
    """As the conditions' `cell`, with keywords at word starts; None for scores of earlier versions, without them."""
    cells = {}
    for row in rows:
        if row.empathy_rate_word_start is None:
            return None
        cells[row.alpha] = round(row.empathy_rate_word_start * row.samples), row.samples
    return cells


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
