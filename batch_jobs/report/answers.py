"""The paragraph at the top of a report: does the direction detect beyond words, steer beyond controls, at what cost?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from batch_jobs.config.primary import recorded_primary
from batch_jobs.config.steering import controlled_direction
from batch_jobs.report.number_text import fixed, number, p_value, scenario_title
from batch_jobs.report.results import RunResults
from batch_jobs.scoring.primary_rows import primary_rows
from batch_jobs.scoring.sign_and_layer_findings import ControlEffect
from batch_jobs.statistics.exact_tests import holm_p
from batch_jobs.statistics.rates import Estimate, mean_estimate

Verdict = Literal["yes", "no", "undecided", "not measured"]
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Answer:
    """One question with a verdict and the numbers that it rests on."""

    question: str
    verdict: Verdict | None
    """None where the answer is a number."""
    grounds: str
    """One or two sentences."""


def answers(results: RunResults) -> list[Answer]:
    """The three answers, in the order of the questions."""
    return [_detects(results), _steers(results), _costs(results)]


@dataclass(frozen=True)
class PrimaryOutcome:
    """What came of the hypothesis that was stated before generation."""

    stated_at: str
    """UTC, ISO 8601."""
    hypothesis: str
    verdict: Literal["held", "contradicted", "undecided"]
    grounds: str


def primary_outcome(results: RunResults) -> PrimaryOutcome | None:
    """Evaluate the run's primary hypothesis; None without one, or while a judge has not decided the outcome.

    Over several scenarios Δ is their mean, with the interval of `mean_estimate`.
    """
    recorded = recorded_primary(results.provenance)
    if recorded is None or not results.scores.success:
        return None
    primary, stated_at = recorded
    scenarios = results.provenance["config"]["steer"]["scenarios"]
    rows = primary_rows(primary, results.scores.success, scenarios)
    ends = [(row.delta, row.delta_low, row.delta_high) for row in rows]
    least = "" if primary.minimum is None else f" of at least {primary.minimum:g}"
    hypothesis = (
        f"a {primary.sign} Δ{least} of {primary.direction} at layer {primary.layer} "
        f"({', '.join(scenario_title(row.scenario) for row in rows)})."
    )
    if any(value is None for triple in ends for value in triple):
        return PrimaryOutcome(stated_at, hypothesis, "undecided", "A scenario has no Δ.")
    sign = 1.0 if primary.sign == "positive" else -1.0
    pooled = mean_estimate(
        [Estimate(float(delta or 0), float(low or 0), float(high or 0)) for delta, low, high in ends]
    )
    grounds = f"Δ is {fixed(pooled.value, 2)} ({fixed(pooled.low, 2)} to {fixed(pooled.high, 2)})."
    towards, against = (pooled.low, pooled.high) if sign > 0 else (-pooled.high, -pooled.low)
    verdict: Literal["held", "contradicted", "undecided"] = "undecided"
    if towards > 0 and sign * pooled.value >= (primary.minimum or 0.0):
        verdict = "held"
    elif against < 0:
        verdict = "contradicted"
    return PrimaryOutcome(stated_at, hypothesis, verdict, grounds)


def _detects(results: RunResults) -> Answer:
    question = "Does it detect beyond words?"
    validation = results.validation
    layer = validation.best_layer
    beyond = validation.beyond_words.get(layer)
    own = validation.layers[layer]
    found = (
        f"At layer {layer}, chosen on the train texts, the direction tells held-out texts apart with an AUROC of "
        f"{fixed(own.auroc, 2)} ({fixed(own.auroc_low, 2)} to {fixed(own.auroc_high, 2)})"
    )
    if beyond is None:
        return Answer(question, "not measured", f"{found}; there is no bag of words to compare it with.")
    bag = beyond.bag_of_words
    grounds = f"{found}; a bag of words reaches {fixed(bag.auroc, 2)} ({fixed(bag.low, 2)} to {fixed(bag.high, 2)})"
    if beyond.at_ceiling:
        grounds += ", the most there is, so these texts cannot show more than words"
    else:
        ends = f"{fixed(beyond.difference_low, 2)} to {fixed(beyond.difference_high, 2)}"
        grounds += f", a difference of {fixed(beyond.difference, 2)} ({ends})"
    return Answer(question, beyond.verdict, f"{grounds}.")


def _steers(results: RunResults) -> Answer:
    question = "Does it steer beyond controls?"
    effects = [one for one in (results.findings.controls if results.findings else ()) if one.scenario is None]
    if not effects:
        return Answer(question, "not measured", _without_controls(results))
    adjusted = holm_p([effect.comparison.p for effect in effects])
    effect, p = min(zip(effects, adjusted, strict=True), key=lambda pair: (pair[1] or 0.0, -pair[0].comparison.delta))
    one = effect.comparison
    among = f", the smallest of {len(effects)} by Holm" if len(effects) > 1 else ""
    grounds = (
        f"{_named(effect)} moves the rate by Δ {fixed(one.delta, 2)} from −α to +α, its {len(one.control_deltas)} "
        f"random controls of the same length by {fixed(one.control_mean, 2)} on average; the difference is "
        f"{fixed(one.difference, 2)}{_interval(one.difference_low, one.difference_high)} with p {p_value(p)}{among}. "
        f"That is about these {len(one.control_deltas)} controls. Among all random directions its rank p is "
        f"{fixed(one.rank_p, 2)}, which {len(one.control_deltas)} controls cannot bring below "
        f"{fixed(one.rank_p_floor, 2)}; 19 can bring it to 0.05."
    )
    low, high = one.difference_low, one.difference_high
    verdict: Verdict = "undecided"
    if p is not None and p < SIGNIFICANT and low is not None and low > 0:
        verdict = "yes"
    elif high is not None and high <= 0:
        verdict = "no"
    return Answer(question, verdict, grounds)


def _without_controls(results: RunResults) -> str:
    if not results.scores.success:
        return "The judge has not decided the outcome yet."
    said = "No control direction went through the grid (steer.controls), so an effect of any push cannot be told apart."
    rates = [rate for rate in results.scores.success if rate.delta is not None]
    if rates:
        best = max(rates, key=lambda rate: rate.delta or 0.0)
        ends = _interval(best.delta_low, best.delta_high)
        said += f" The largest Δ of {len(rates)} is {fixed(best.delta, 2)}{ends}, at layer {best.layer}."
    return said


def _costs(results: RunResults) -> Answer:
    question = "At what cost?"
    plain = next((point for point in results.cost if point.layer is None), None)
    steered = [
        point for point in results.cost if point.direction is not None and controlled_direction(point.direction) is None
    ]
    if plain is None or not steered:
        weakest = min(results.scores.without_controls.conditions, key=lambda row: row.coherence_rate)
        return Answer(
            question,
            "not measured",
            "Neither perplexity nor questions were measured (section cost). The least coherent condition, "
            f"α {number(weakest.alpha)} at layer {weakest.layer}, is coherent in {fixed(weakest.coherence_rate, 2)} of "
            "its samples.",
        )
    worst = max(steered, key=lambda point: point.perplexity)
    mildest = min(steered, key=lambda point: (abs(point.alpha_residual_norm or point.alpha), point.perplexity))
    parts = []
    for words, point in (("the smallest α", mildest), ("the costliest", worst)):
        parts.append(
            f"at {words}, {number(point.alpha)} at layer {point.layer}, the perplexity of neutral text is "
            f"{fixed(point.perplexity / plain.perplexity, 2)} times that of the unsteered model and "
            f"{fixed(point.choice_accuracy, 2)} of {point.choices} plain questions are answered right"
        )
    grounds = f"{parts[0][0].upper()}{parts[0][1:]}; {parts[1]} (unsteered: {fixed(plain.choice_accuracy, 2)})."
    return Answer(question, None, grounds)


def _named(effect: ControlEffect) -> str:
    return f"The direction {effect.direction} at layer {effect.layer}"


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" ({fixed(low, 2)} to {fixed(high, 2)})"
