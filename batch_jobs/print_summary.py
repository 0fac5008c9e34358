"""Prints the summary of a finished study: validation by layer, empathetic rate by α, and the paths of all results."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from batch_jobs.pipeline import StudyResult
from batch_jobs.scoring.scores_csv import ConditionScore


def print_summary(result: StudyResult, concept: str, console: Console) -> None:
    """Print the summary to `console`. Paths are never wrapped, so that they can be copied."""
    console.print(f"\nValidation of '{concept}' on held-out pairs", highlight=False)
    console.print(_validation_table(result))
    conditions = result.scores.conditions
    for layer, direction in sorted({(row.layer, row.direction) for row in conditions}):
        # the unsteered rows are the baseline of every direction
        cells = [row for row in conditions if row.layer == layer and (row.direction == direction or row.alpha == 0)]
        console.print(
            f"\nEmpathetic rate along '{direction}' at layer {layer} by α (raw, below it in residual norms)",
            highlight=False,
        )
        console.print(_rate_table(cells))
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


def _rate_table(cells: list[ConditionScore]) -> Table:
    alphas = sorted({(row.alpha, row.alpha_residual_norm or 0.0) for row in cells})
    table = _table("scenario", *(f"{raw:+.1f}\n{norms:+.2f}" for raw, norms in alphas))
    by_cell = {(row.scenario, row.alpha): row for row in cells}
    for scenario in dict.fromkeys(row.scenario for row in cells):
        found = [by_cell.get((scenario, raw)) for raw, _ in alphas]
        table.add_row(scenario, *("–" if row is None else f"{row.empathy_rate:.1f}" for row in found))
    return table


def _table(first: str, *numeric: str) -> Table:
    table = Table()
    table.add_column(first)
    for column in numeric:
        table.add_column(column, justify="right")
    return table
