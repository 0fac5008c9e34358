"""The report of a run: one HTML file that needs nothing but itself, made from the run directory alone.

Every number on it is one of the run's files', or of the paper's for comparison; nothing is computed anew. The page is
`templates/report.html.j2` and the sections it includes; the figures are `figures`', the tables' rows `report_tables`'.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from batch_jobs.files.atomic import write_atomically
from batch_jobs.report.figures.catalogue import draw_figures, write_figures
from batch_jobs.report.figures.inline_svg import inline_svg
from batch_jobs.report.figures.paper_figure import PaperFigure
from batch_jobs.report.headlines import headlines
from batch_jobs.report.number_text import UNKNOWN, fixed, number, p_value, scenario_title
from batch_jobs.report.published import read_published
from batch_jobs.report.results import RunResults, read_run
from batch_jobs.report.tables import examples, layer_rows, metric_rows, success_rows
from batch_jobs.scoring.scores import ConditionScore
from batch_jobs.scoring.setting import Setting

SHOWN_PER_CONDITION = 10
"""Texts shown of each condition; all of them are in the Parquet files."""
MAX_SHOWN_SAMPLES = 2000
"""Texts shown in all: at some 1.5 kB each the page stays below about 5 MB."""
MAX_SHOWN_CONDITIONS = 1000
MAX_BEHAVIOUR_COLUMNS = 6
PIXELS_PER_POINT = 1.5
"""Size of an inlined figure: its 8 point text reads as 12 pixels."""
_MAX_PLACES = 4


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` and return its path; the figures also go to `run_dir/figures` as SVG and PNG.

    The page is self-contained: styles, figures and the script of the sample filter are inline, and its
    content security policy forbids it to load anything. All text from the run is escaped. Raises ReportError
    when the directory, `provenance.json` or the scores are unusable, and the readers' own errors for the other parts.
    """
    run_dir = Path(run_dir)
    results = read_run(run_dir, per_condition=SHOWN_PER_CONDITION, max_samples=MAX_SHOWN_SAMPLES)
    figures = draw_figures(results)
    write_figures(run_dir / "figures", figures.values())
    path = run_dir / "report.html"
    write_atomically(path, report_page(results, figures))
    return path


def report_page(results: RunResults, figures: dict[str, PaperFigure]) -> str:
    """The page's HTML. `figures`: what `draw_figures` made of the results."""
    return _environment().get_template("report.html.j2").render(_context(results, figures))


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("batch_jobs.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(fixed=fixed, num=number, p=p_value, title=scenario_title, text=_as_text)
    return environment


def _context(results: RunResults, figures: dict[str, PaperFigure]) -> dict[str, Any]:
    published, scores = read_published(), results.scores
    shown = scores.conditions[:MAX_SHOWN_CONDITIONS]
    table_1_model, table_1 = layer_rows(results, published)
    behaviours = results.behaviours[:MAX_BEHAVIOUR_COLUMNS]
    return {
        "results": results,
        "validation": results.validation,
        "scores": scores,
        "findings": results.findings,
        "generations": results.generations,
        "published": published,
        "headlines": headlines(results),
        "figures": figures,
        "svg": _inline,
        "pixels": PIXELS_PER_POINT,
        "table_1_model": table_1_model,
        "table_1": table_1,
        "table_3": metric_rows([row.samples.detection for row in behaviours], published.correlation.binary),
        "behaviours": behaviours,
        "table_4": success_rows(results, published),
        "examples": examples(results),
        "setting_name": results.setting_names,
        "setting_of": Setting.of,
        "setting_index": {setting: index for index, setting in enumerate(results.settings)},
        "scenarios": sorted({row.scenario for row in scores.conditions}),
        "num_conditions": len(scores.conditions),
        "conditions_by_panel": [list(rows) for _, rows in groupby(shown, key=_same_panel)],
        "alpha_places": _places(row.alpha for row in shown),
        "norm_places": _places(row.alpha_residual_norm for row in shown),
        "samples_range": _range(row.samples for row in scores.conditions),
        "fewest_samples": min(row.samples for row in scores.conditions),
        "shown_per_condition": SHOWN_PER_CONDITION,
        "unknown": UNKNOWN,
    }


def _inline(figure: PaperFigure) -> Markup:
    assert figure.drawing is not None  # the template asks only for figures that are drawn
    return Markup(inline_svg(figure.drawing, figure.stem, figure.title))


def _same_panel(row: ConditionScore) -> tuple[Setting, str]:
    return Setting.of(row), row.scenario


def _range(values: Iterable[int]) -> str:
    values = set(values)
    return str(min(values)) if len(values) == 1 else f"{min(values)} to {max(values)}"


def _places(values: Iterable[float | None]) -> int:
    """Fewest decimal places that show every value to within half a percent, so that a column lines up."""
    known = [value for value in values if value is not None]
    fits = (
        places
        for places in range(_MAX_PLACES)
        if all(abs(round(value, places) - value) <= 0.005 * abs(value) for value in known)
    )
    return next(fits, _MAX_PLACES)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)
