"""Print a comparison of two runs on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from batch_jobs.compare.completions import CompletionAgreement, EqualShare
from batch_jobs.compare.models import CrossModelAgreement
from batch_jobs.compare.runs import Comparison
from batch_jobs.directions.validate_layer import LayerValidation
from batch_jobs.report.number_text import UNKNOWN, fixed, p_value
from batch_jobs.scoring.scores_csv import SuccessRate


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print the differences, then completions, success rates, validation and cross-model agreement."""
    for name, facts in (("A", comparison.a), ("B", comparison.b)):
        about = f"{facts.study}, {facts.model}, config {facts.config_hash}"
        console.print(f"{name}  {facts.path}  ({about})", markup=False, highlight=False, soft_wrap=True)
    _print_changes(comparison, console)
    _print_completions(comparison.completions, console)
    _heading(console, "Δ with its 95 % interval, A | B (the paper's success rate in brackets)")
    console.print(_success_table(comparison))
    _heading(console, "Held-out AUROC with its 95 % score interval, A | B (best: chosen on train texts)")
    console.print(_validation_table(comparison))
    if comparison.no_cross_model is not None:
        _heading(console, f"No cross-model agreement: {comparison.no_cross_model}")
        return
    _heading(console, "Cross-model agreement on the test texts")
    console.print(_cross_model_table(comparison.cross_model))
    console.print(
        "r: Pearson of A's and B's projections. Aligned: A's readouts mapped onto B's axes, the map fitted on train "
        "texts. Similarity: cosine of A's mapped readouts and B's. In-class chance: mean over maps fitted on train "
        "texts shuffled inside each class, which know only the class of a text; p: share of them with as high a "
        "similarity. A small p means that the models agree on single texts. Transfer: AUROC of A's mapped direction in "
        "B; two directions of the same classes transfer by the class alone, so it has its own chance and no p.",
        highlight=False,
    )


def _print_changes(comparison: Comparison, console: Console) -> None:
    changes = [*comparison.config_changes, *comparison.version_changes]
    _heading(console, "What differs" if changes else "Same config, versions and commit")
    if changes:
        table = _table("field", "A", "B")
        for change in changes:
            table.add_row(change.field, escape(str(change.before)), escape(str(change.after)))
        console.print(table)
    for pair in comparison.directions:
        if not pair.same:
            cosine = "other hidden size" if pair.cosine is None else f"cosine {pair.cosine:.6f}"
            console.print(f"Direction {pair.name} at layer {pair.layer} differs: {cosine}", highlight=False)


def _print_completions(agreement: CompletionAgreement, console: Console) -> None:
    counts = f"{agreement.rows_a} rows in A, {agreement.rows_b} in B, {agreement.shared} in both"
    _heading(console, f"Completions, {agreement.decoding} ({counts})")
    if not agreement.shared:
        console.print(
            "The runs have no row in common: a row is a model, layer, direction, α, op, span, scenario and sample.",
            highlight=False,
        )
    if agreement.failed:
        console.print(f"{agreement.failed} rows failed in one run or both and are not compared.", highlight=False)
    if agreement.other_seed:
        console.print(f"{agreement.other_seed} rows had different seeds and are not compared.", highlight=False)
    if agreement.overall is None:
        return
    table = _table("α", "rows", "equal", "share equal", "common prefix, characters", "of the longer one")
    for alpha, share in agreement.by_alpha.items():
        table.add_row(f"{alpha:g}", *_share_cells(share))
    table.add_section()
    table.add_row("all", *_share_cells(agreement.overall))
    console.print(table)


def _share_cells(share: EqualShare) -> tuple[str, ...]:
    return (
        str(share.rows),
        str(share.equal),
        f"{share.share:.1%}",
        f"{share.mean_common_prefix:.1f}",
        f"{share.mean_common_share:.1%}",
    )


def _success_table(comparison: Comparison) -> Table:
    table = _table("scenario", "layer", "direction", "op, span", "A", "B")
    for pair in comparison.success:
        table.add_row(
            pair.scenario,
            str(pair.layer),
            pair.direction,
            f"{pair.op}, {pair.span}",
            _success_cell(pair.a),
            _success_cell(pair.b),
        )
    return table


def _success_cell(rate: SuccessRate | None) -> str:
    if rate is None:
        return UNKNOWN
    ends = "" if rate.delta is None else f" {fixed(rate.delta_low, 2)} to {fixed(rate.delta_high, 2)}"
    return f"{fixed(rate.delta, 2)}{ends} ({fixed(rate.steering_success_rate, 2)})"


def _validation_table(comparison: Comparison) -> Table:
    table = _table("layer", "A", "B")
    for pair in comparison.validation:
        table.add_row(
            str(pair.layer),
            _auroc_cell(pair.a, comparison.best_layer_a),
            _auroc_cell(pair.b, comparison.best_layer_b),
        )
    return table


def _auroc_cell(validation: LayerValidation | None, best_layer: int) -> str:
    if validation is None:
        return UNKNOWN
    best = " best" if validation.layer == best_layer else ""
    return f"{validation.auroc:.3f} ({validation.auroc_low:.3f} to {validation.auroc_high:.3f}){best}"


def _cross_model_table(agreements: tuple[CrossModelAgreement, ...]) -> Table:
    table = _table(
        "blocks A, B",
        "r",
        "r in class",
        "r aligned",
        "aligned in class",
        "similarity",
        "in-class chance",
        "p",
        "transfer AUROC",
        "in-class chance",
    )
    for row in agreements:
        chance = row.shuffled_within_class
        table.add_row(
            f"{row.block_a}, {row.block_b}",
            fixed(row.raw.pearson_r, 2),
            fixed(row.raw_within_class.pearson_r, 2),
            fixed(row.aligned.pearson_r, 2),
            fixed(row.aligned_within_class.pearson_r, 2),
            fixed(row.similarity_test, 2),
            fixed(chance.similarity_test.mean, 2),
            p_value(chance.similarity_test.p),
            fixed(row.transfer_auroc, 3),
            fixed(chance.transfer_auroc.mean, 3),
        )
    return table


def _heading(console: Console, text: str) -> None:
    console.print(f"\n{text}", markup=False, highlight=False)


def _table(first: str, *others: str) -> Table:
    table = Table()
    table.add_column(first)
    for column in others:
        table.add_column(column, justify="right")
    return table
