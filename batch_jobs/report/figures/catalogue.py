"""Draw the paper's nine figures, and those of cost and controls, from one run, and write their files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from batch_jobs.files.atomic import write_atomically
from batch_jobs.report.figures.behaviour import behaviour_figure
from batch_jobs.report.figures.controls import controls_figure
from batch_jobs.report.figures.cost import cost_figure
from batch_jobs.report.figures.detection import (
    ablation_figure,
    auroc_figure,
    models_figure,
    pooling_figure,
    random_figure,
)
from batch_jobs.report.figures.dose_response import dose_responses
from batch_jobs.report.figures.paper_figure import PaperFigure
from batch_jobs.report.figures.resistance import layers_figure, resistance_figure
from batch_jobs.report.figures.steering import (
    baseline_figure,
    dose_response_figure,
    projection_figure,
    published_curves_figure,
)
from batch_jobs.report.figures.style import figure_look
from batch_jobs.report.published import read_published
from batch_jobs.report.results import RunResults
from batch_jobs.report.table_rows import cost_rows


def draw_figures(results: RunResults) -> dict[str, PaperFigure]:
    """Draw every figure: label (`1`, `1b`, ... `9`, `10`, `11`) -> figure.

    A figure without data has no drawing, and says why in `missing`. The same results give the same bytes.
    """
    concept = results.concept
    published = read_published() if concept.published else None
    validation, names = results.validation, results.setting_names
    # controls have tables of their own; among the curves they would crowd out the directions
    curves = dose_responses(results.scores.without_controls.conditions, concept.poles.positive)
    offset = results.extract_offset or 0
    with figure_look():
        figures = (
            auroc_figure(validation, offset, published),
            pooling_figure(validation),
            random_figure(validation, published),
            ablation_figure(validation, published),
            models_figure(results.models[0], validation, offset, published),
            behaviour_figure(results.behaviours, published),
            dose_response_figure(curves, names, published),
            projection_figure(curves, names),
            published_curves_figure(published),
            baseline_figure(curves, published),
            resistance_figure(curves, results.best_steering_layer, names, published, concept.focus_scenario),
            cost_figure(cost_rows(results)),
            controls_figure(results.findings.controls if results.findings else (), results.scores.success),
            layers_figure(curves, names, published, concept.focus_scenario),
        )
    return {figure.label: figure for figure in figures}


def write_figures(folder: Path, figures: Iterable[PaperFigure]) -> list[Path]:
    """Write `<stem>.svg`, `<stem>.png` and its numbers, `<stem>.csv`, of each drawn figure; return the paths.

    Creates `folder` if needed, and removes figures of an earlier report that this one lacks.
    """
    folder.mkdir(exist_ok=True)
    written = []
    for figure in figures:
        if figure.drawing is not None:
            svg, png = folder / f"{figure.stem}.svg", folder / f"{figure.stem}.png"
            numbers = folder / f"{figure.stem}.csv"
            write_atomically(svg, figure.drawing.svg)
            png.write_bytes(figure.drawing.png)
            write_atomically(numbers, figure.drawing.numbers)
            written += [svg, png, numbers]
    for stale in {path for kind in ("svg", "png", "csv") for path in folder.glob(f"figure-*.{kind}")} - set(written):
        stale.unlink()
    return written
