"""The key numbers at the top of a report."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from batch_jobs.report.figures.dose_response import dose_responses
from batch_jobs.report.number_text import UNKNOWN, fixed, number, p_value, scenario_title
from batch_jobs.report.results import RunResults
from batch_jobs.scoring.scores_csv import Scores


@dataclass(frozen=True)
class Headline:
    """One number with its label and a note on how to read it."""

    label: str
    value: str
    note: str


def headlines(results: RunResults) -> list[Headline]:
    """Detection, steering by both rules, dose response, behaviour, coherence and sample count, as far as the run has
    them."""
    validation, scores = results.validation, results.scores
    best = validation.layers[validation.best_layer]
    interval = f"95 % {best.auroc_low:.2f} to {best.auroc_high:.2f}"
    found = [Headline("Test AUROC, best layer", f"{best.auroc:.3f}", f"layer {best.layer}, {interval}")]
    if scores.success:
        found += _success_headlines(scores)
    found.append(_dose_headline(scores, results.concept.poles.positive))
    if results.behaviours:
        first = results.behaviours[0]
        correlation = first.samples.correlation
        note = f"layer {first.layer}, n {correlation.n}, Spearman ρ {fixed(correlation.spearman_rho, 2)}"
        found.append(Headline("Projection against behaviour, r", fixed(correlation.pearson_r, 2), note))
    found.append(_coherence_headline(scores))
    generations = results.generations
    failed = f"{generations.num_failed} failed" if generations.num_failed else "none failed"
    if generations.unfinished_thoughts:
        failed += f", {generations.unfinished_thoughts} ended inside a thought"
    found.append(Headline("Samples", f"{generations.num_rows:,}", f"{len(scores.conditions)} conditions, {failed}"))
    return found


def _success_headlines(scores: Scores) -> list[Headline]:
    rows = scores.success
    flagged = sum(row.cannot_rise or row.cannot_fall for row in rows)
    corrected = [row.corrected_success_rate for row in rows if row.corrected_success_rate is not None]
    undecided = sum(row.num_alphas - row.num_decidable for row in rows)
    significant = sum(row.trend_p is not None and row.trend_p < 0.05 for row in rows)
    rising = p_value(min((row.trend_p for row in rows if row.trend_p is not None), default=None))
    return [
        Headline(
            "Steering success, paper\u2019s rule",
            f"{fmean(row.steering_success_rate for row in rows):.3f}",
            f"mean of {len(rows)}; {flagged} of them decided in part by their unsteered rate",
        ),
        Headline(
            "Steering success, corrected",
            f"{fmean(corrected):.3f}" if corrected else UNKNOWN,
            f"{undecided} α that could not have gone the other way are left out",
        ),
        Headline(
            "Rising dose response",
            f"{significant} of {len(rows)}",
            f"trend over all samples with permutation p < 0.05; smallest p {rising}",
        ),
    ]


def _dose_headline(scores: Scores, positive: str) -> Headline:
    curves = dose_responses(scores.conditions, positive)
    lowest = fmean(curve.rows[0].empathy_rate for curve in curves)
    baseline = fmean(curve.rows[0].baseline_empathy_rate for curve in curves)
    highest = fmean(curve.rows[-1].empathy_rate for curve in curves)
    return Headline(
        f"{positive.capitalize()} rate",
        " \u2192 ".join(fixed(rate, 2) for rate in (lowest, baseline, highest)),
        "lowest \u03b1 \u2192 unsteered \u2192 highest \u03b1, mean over scenarios",
    )


def _coherence_headline(scores: Scores) -> Headline:
    weakest = min(scores.conditions, key=lambda row: row.coherence_rate)
    total = sum(row.samples for row in scores.conditions)
    coherent = sum(row.coherence_rate * row.samples for row in scores.conditions) / total
    place = f"{scenario_title(weakest.scenario)}, \u03b1 {number(weakest.alpha)}"
    return Headline("Coherent samples", f"{coherent:.2f}", f"lowest {weakest.coherence_rate:.2f}: {place}")
