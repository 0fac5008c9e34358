"""The key numbers at the top of a report."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from batch_jobs.directions.word_baselines import BeyondWords
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
    """Detection, also beyond words, steering by the paper's rule and by Δ, dose response, behaviour, coherence and the
    number of samples, as far as the run has them."""
    validation, scores = results.validation, results.scores.without_controls
    best = validation.layers[validation.best_layer]
    interval = f"95 % {best.auroc_low:.2f} to {best.auroc_high:.2f}"
    note = (
        f"layer {best.layer}, chosen on train texts, {interval}; bag of words {validation.words.bag_of_words.auroc:.3f}"
    )
    found = [Headline("Test AUROC, best layer", f"{best.auroc:.3f}", note)]
    if (beyond := validation.beyond_words.get(best.layer)) is not None:
        found.append(_beyond_words_headline(beyond))
    if scores.success:
        found += _success_headlines(scores)
    found.append(_dose_headline(scores, results.concept.poles.positive))
    if results.behaviours:
        first = results.behaviours[0]
        within = first.within_conditions
        interval = f"95 % {fixed(within.low, 2)} to {fixed(within.high, 2)}, p {p_value(within.p)}"
        note = f"given α and scenario; layer {first.layer}, n {within.n}, {interval}"
        found.append(Headline("Projection against behaviour, r", fixed(within.r, 2), note))
    found.append(_coherence_headline(scores))
    generations = results.generations
    failed = f"{generations.num_failed} failed" if generations.num_failed else "none failed"
    if generations.unfinished_thoughts:
        failed += f", {generations.unfinished_thoughts} ended inside a thought"
    found.append(
        Headline("Samples", f"{generations.num_rows:,}", f"{len(results.scores.conditions)} conditions, {failed}")
    )
    return found


def _beyond_words_headline(beyond: BeyondWords) -> Headline:
    ends = f"{fixed(beyond.difference_low, 2)} to {fixed(beyond.difference_high, 2)}"
    note = f"AUROC minus that of a bag of words {fixed(beyond.difference, 2)}, 95 % {ends}"
    if beyond.at_ceiling:
        note += "; words alone separate all test texts, so only harder pairs can tell"
    return Headline("Detection beyond words", beyond.verdict, note)


def _success_headlines(scores: Scores) -> list[Headline]:
    rows = scores.success
    flagged = sum(row.num_decided > 0 for row in rows)
    deltas = [row.delta for row in rows if row.delta is not None]
    above = sum(row.delta_low is not None and row.delta_low > 0 for row in rows)
    raw = sum(row.trend_p is not None and row.trend_p < 0.05 for row in rows)
    significant = sum(row.trend_p_holm is not None and row.trend_p_holm < 0.05 for row in rows)
    return [
        Headline(
            "Steering success, paper\u2019s rule",
            f"{fmean(row.steering_success_rate for row in rows):.3f}",
            f"mean of {len(rows)}; {flagged} of them decided by their unsteered rate",
        ),
        Headline(
            "Δ, rate at +α minus rate at −α",
            f"{fmean(deltas):.2f}" if deltas else UNKNOWN,
            f"mean of {len(deltas)}; {above} of them with a 95 % interval above 0",
        ),
        Headline(
            "Rising dose response",
            f"{significant} of {len(rows)}",
            f"trend with p < 0.05 corrected for their number (Holm); {raw} without the correction",
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
    rows = scores.conditions
    weakest = min(rows, key=lambda row: row.coherence_rate)
    coherent = sum(row.coherence_rate * row.samples for row in rows) / sum(row.samples for row in rows)
    place = f"{scenario_title(weakest.scenario)}, \u03b1 {number(weakest.alpha)}"
    return Headline("Coherent samples", f"{coherent:.2f}", f"lowest {weakest.coherence_rate:.2f}: {place}")
