"""Prints the summary of a finished study: validation by layer, rate of the outcome by α, paths of all results."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from batch_jobs.config.concept import Concept
from batch_jobs.config.steering import controlled_direction
from batch_jobs.directions.validation_file import Validation
from batch_jobs.pipeline import StudyResult, not_judged_yet
from batch_jobs.report.number_text import fixed
from batch_jobs.scoring.scores_csv import ConditionScore


def print_summary(result: StudyResult, concept: Concept, console: Console) -> None:
    """Print the summary to `console`. Paths are never wrapped, so that they can be copied."""
    console.print(f"\nValidation of '{concept.name}' on held-out pairs", highlight=False)
    console.print(_validation_table(result))
    console.print(_words_line(result.validation), highlight=False)
    conditions = result.scores.conditions
    steered = {(row.layer, row.direction) for row in conditions}
    for layer, direction in sorted(key for key in steered if controlled_direction(key[1]) is None):
        # the unsteered rows are the baseline of every direction
        cells = [row for row in conditions if row.layer == layer and (row.direction == direction or row.alpha == 0)]
        console.print(
            f"\n{concept.poles.positive.capitalize()} rate along '{direction}' at layer {layer} by α (raw, below it in "
            "residual norms)",
            highlight=False,
        )
        controls = [
            row for row in conditions if row.layer == layer and controlled_direction(row.direction) == direction
        ]
        console.print(_rate_table(cells, controls))
    if note := not_judged_yet(result.run, concept, result.scores):
        console.print(f"\n{note}", highlight=False, markup=False, soft_wrap=True)
    rows = f"{result.generated} rows generated, {result.reused} there before, {result.failed} failed"
    if result.unfinished_thoughts:
        rows += f", {result.unfinished_thoughts} ended inside a thought"
    console.print(f"\nResults ({rows})", highlight=False)
    if result.unfinished_thoughts:
        console.print(
            "  Rows that ended inside a thought have no answer and enter no rate; raise sampling.max_tokens, or switch "
            "thinking off with chat_template_kwargs.",
            highlight=False,
        )
    run = result.run
    for what, path in (
        ("directions", run.directions),
        *([("controls", run.controls)] if run.controls.exists() else []),
        ("validation", run.validation),
        ("generations", run.generations),
        ("scores", run.scores),
        ("findings", run.findings),
        ("behaviour", run.behaviour),
        ("provenance", run.provenance),
        ("figures", run.figures),
        ("report", run.report),
    ):
        console.print(f"  {what:<12} {run.shown(path)}", markup=False, highlight=False, soft_wrap=True)


def _validation_table(result: StudyResult) -> Table:
    table = _table("layer", "AUROC", "95 % interval", "accuracy", "at train threshold", "separation", "in stds")
    for layer, validation in sorted(result.validation.layers.items()):
        table.add_row(
            f"{layer} (best)" if layer == result.validation.best_layer else str(layer),
            f"{validation.auroc:.3f}",
            f"{validation.auroc_low:.3f} to {validation.auroc_high:.3f}",
            f"{validation.accuracy:.3f}",
            f"{validation.accuracy_train_threshold:.3f}",
            f"{validation.separation:.2f}",
            f"{validation.separation_in_stds:.1f}",
        )
    return table


def _words_line(validation: Validation) -> str:
    bag = validation.words.bag_of_words
    line = f"A bag of words alone has AUROC {bag.auroc:.3f} ({bag.low:.3f} to {bag.high:.3f})."
    if (beyond := validation.beyond_words.get(validation.best_layer)) is None:
        return line
    ends = f"{beyond.difference_low:+.3f} to {beyond.difference_high:+.3f}"
    return (
        f"{line} Does layer {validation.best_layer}, chosen on train texts, detect beyond words? {beyond.verdict} "
        f"(difference {beyond.difference:+.3f}, {ends})"
    )


def _rate_table(cells: list[ConditionScore], controls: list[ConditionScore]) -> Table:
    """Rates by scenario and α, and below them the mean over all scenarios of the direction and of its controls."""
    alphas = sorted({(row.alpha, row.alpha_residual_norm or 0.0) for row in cells})
    table = _table("scenario", *(f"{raw:+.1f}\n{norms:+.2f}" for raw, norms in alphas))
    by_cell = {(row.scenario, row.alpha): row for row in cells}
    for scenario in dict.fromkeys(row.scenario for row in cells):
        found = [by_cell.get((scenario, raw)) for raw, _ in alphas]
        table.add_row(scenario, *(fixed(row.empathy_rate if row else None, 1) for row in found))
    if controls:
        number = len({row.direction for row in controls})
        table.add_section()
        table.add_row("mean", *(_mean_rate(cells, raw) for raw, _ in alphas))
        table.add_row(f"mean of {number} random controls", *(_mean_rate(controls, raw) for raw, _ in alphas))
    return table


def _mean_rate(cells: list[ConditionScore], alpha: float) -> str:
    rates = [row.empathy_rate for row in cells if row.alpha == alpha]
    return f"{sum(rates) / len(rates):.2f}" if rates else "–"


def _table(first: str, *numeric: str) -> Table:
    table = Table()
    table.add_column(first)
    for column in numeric:
        table.add_column(column, justify="right")
    return table
