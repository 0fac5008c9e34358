"""Output of `pairs check`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from batch_jobs.pairs.check import PairReport


def print_pair_report(report: PairReport, console: Console) -> None:
    """Print the figures as a table, then problems and warnings, one line each."""
    length, leakage = report.length, report.leakage
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    scenarios = ", ".join(f"{scenario} {count}" for scenario, count in report.pairs_by_scenario.items())
    for figure, value in (
        ("pairs", str(sum(report.pairs_by_scenario.values()))),
        ("by scenario", scenarios),
        ("words, positive / other", f"{length.mean_positive:.0f} / {length.mean_negative:.0f}"),
        ("length ratio", f"{length.ratio:.2f} (Wilcoxon p = {length.p_value:.2g})"),
        ("AUROC of length alone", f"{length.auroc:.2f}"),
        *((f"AUROC of {words} keywords alone", f"{auroc:.2f}") for words, auroc in leakage.keyword_aurocs.items()),
        ("AUROC of a bag of words (held-out pairs)", f"{leakage.lexical_baseline_auroc:.2f}"),
        ("most telling, positive", " ".join(leakage.positive_words)),
        ("most telling, other", " ".join(leakage.negative_words)),
    ):
        table.add_row(figure, value)
    console.print(table)
    for problem in report.problems:
        console.print(f"problem  {problem}", style="red", markup=False, soft_wrap=True)
    for warning in report.warnings:
        console.print(f"warning  {warning}", style="yellow", markup=False, soft_wrap=True)
    if not report.problems:
        console.print("No problems found." if not report.warnings else "No problems found; see the warnings.")
