"""One page that sets several runs side by side, as the paper's Table 2 and Figures 4, 6, 7 and 9 set its models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from batch_jobs.files.atomic import write_atomically
from batch_jobs.report.figures import several_runs as figures
from batch_jobs.report.figures.catalogue import write_figures
from batch_jobs.report.figures.dose_response import dose_responses
from batch_jobs.report.figures.style import figure_look
from batch_jobs.report.page import page_environment
from batch_jobs.report.published import read_published
from batch_jobs.report.results import ReportError, RunResults, read_run


def write_joint_report(runs: Sequence[Path], out: Path) -> Path:
    """Write the page of several runs to `out`, and its figures to the folder `<stem>-figures` beside it.

    Raises:
        ReportError: fewer than two runs, one twice, or one is unusable.
        SteerError: a part of a run is unusable; each reader raises its own subclass.
    """
    if len(runs) < 2:
        raise ReportError(f"Got {len(runs)} run; give at least two run directories, or read the run's own report.")
    if len({run.resolve() for run in runs}) < len(runs):
        raise ReportError("The same run directory is given twice; give each once.")
    results = _named([(run, read_run(run, per_condition=0, max_samples=0)) for run in runs])
    curves = {
        name: dose_responses(one.scores.without_controls.conditions, one.concept.poles.positive)
        for name, one in results.items()
    }
    published = read_published() if any(one.concept.published for one in results.values()) else None
    with figure_look():
        drawn = (
            figures.detection_figure(results, published),
            figures.dose_response_figure(curves),
            figures.unsteered_figure(curves),
            figures.layers_figure(curves),
        )
    folder = out.with_name(f"{out.stem}-figures")
    folder.mkdir(parents=True, exist_ok=True)
    write_figures(folder, drawn)
    page = (
        page_environment(folder.name)
        .get_template("several_runs.html.j2")
        .render(runs=results, figures={figure.label: figure for figure in drawn}, published=published)
    )
    write_atomically(out, page)
    return out


def _named(runs: Sequence[tuple[Path, RunResults]]) -> dict[str, RunResults]:
    """Results by the study's name; by that of the folder as well where two studies share one."""
    names = [results.name for _, results in runs]
    return {
        name if names.count(name) == 1 else f"{name} ({run.parent.name}/{run.name})": results
        for name, (run, results) in zip(names, runs, strict=True)
    }
