"""The report of a run: one self-contained HTML file, made from the run directory alone.

Every number on the page comes from the run's files, or from the paper for comparison; nothing is recomputed. The page
is rendered from `templates/report.html.j2` and the sections it includes. `figures` draws the figures, and `tables`
makes the rows of the tables.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from batch_jobs.files.atomic import write_atomically
from batch_jobs.report.answers import answers, primary_outcome
from batch_jobs.report.claims import read_claims
from batch_jobs.report.figures.catalogue import draw_figures, write_figures
from batch_jobs.report.figures.paper_figure import PaperFigure, inline_svg
from batch_jobs.report.headlines import headlines
from batch_jobs.report.number_text import MINUS, UNKNOWN, fixed, number, p_value, scenario_title
from batch_jobs.report.published import read_published
from batch_jobs.report.results import RunResults, read_run
from batch_jobs.report.table_rows import cost_rows, examples, layer_rows, metric_rows, success_rows
from batch_jobs.scoring.agreement import Estimate
from batch_jobs.scoring.rater_agreement import estimate_text
from batch_jobs.scoring.scores_csv import ConditionScore
from batch_jobs.scoring.setting import Setting

SHOWN_PER_CONDITION = 10
"""Texts shown per condition; the Parquet files hold all."""
MAX_SHOWN_SAMPLES = 2000
"""Texts shown in total. At about 1.5 kB each, the page stays below about 5 MB."""
MAX_SHOWN_CONDITIONS = 1000
MAX_BEHAVIOUR_COLUMNS = 6
PIXELS_PER_POINT = 1.5
"""Scale of an inlined figure: 8 point text becomes 12 pixels."""
_MAX_PLACES = 4


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` and return its path. The figures also go to `run_dir/figures` as SVG and PNG.

    The page is self-contained: styles, figures and the script of the sample filter are inline, and its content security
    policy forbids loading anything. All text from the run is escaped.

    Raises:
        ReportError: the directory, `provenance.json` or the scores are unusable.
        SteerError: another part is unusable; each reader raises its own subclass.
    """
    run_dir = Path(run_dir)
    results = read_run(run_dir, per_condition=SHOWN_PER_CONDITION, max_samples=MAX_SHOWN_SAMPLES)
    figures = draw_figures(results)
    write_figures(run_dir / "figures", figures.values())
    path = run_dir / "report.html"
    write_atomically(path, report_page(results, figures))
    return path


def report_page(results: RunResults, figures: dict[str, PaperFigure]) -> str:
    """Render the page as HTML. `figures`: the result of `draw_figures`."""
    return page_environment("figures").get_template("report.html.j2").render(_context(results, figures))


def page_environment(figures_folder: str) -> Environment:
    """The templates with their filters. `figures_folder`: name of the folder with the figures' files."""
    environment = Environment(
        loader=PackageLoader("batch_jobs.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        fixed=fixed,
        num=number,
        p=p_value,
        title=scenario_title,
        text=_as_text,
        data_uri=_data_uri,
        estimate=_estimate,
    )
    environment.globals.update(svg=_inline, pixels=PIXELS_PER_POINT, figures_folder=figures_folder)
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
        "claims": read_claims(),
        "show_published": results.concept.published,
        "concept": results.concept,
        "not_judged": any(math.isnan(row.empathy_rate) for row in scores.conditions),
        "answers": answers(results),
        "primary": primary_outcome(results),
        "costs": cost_rows(results),
        "headlines": headlines(results),
        "figures": figures,
        "table_1_model": table_1_model,
        "table_1": table_1,
        "table_3": metric_rows([row.samples.detection for row in behaviours], published.correlation.binary),
        "behaviours": behaviours,
        "agreement": results.agreement,
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
    assert figure.drawing is not None  # the template inlines only figures that have a drawing
    return Markup(inline_svg(figure.drawing, figure.stem, figure.title))


def _same_panel(row: ConditionScore) -> tuple[Setting, str]:
    return Setting.of(row), row.scenario


def _range(values: Iterable[int]) -> str:
    values = set(values)
    return str(min(values)) if len(values) == 1 else f"{min(values)} to {max(values)}"


def _places(values: Iterable[float | None]) -> int:
    """Fewest decimal places (up to _MAX_PLACES) that show every value to within half a percent."""
    known = [value for value in values if value is not None]
    fits = (
        places
        for places in range(_MAX_PLACES)
        if all(abs(round(value, places) - value) <= 0.005 * abs(value) for value in known)
    )
    return next(fits, _MAX_PLACES)


def _data_uri(numbers: str) -> str:
    return f"data:text/csv;base64,{base64.b64encode(numbers.encode()).decode()}"


def _estimate(estimate: Estimate) -> str:
    return estimate_text(estimate).replace("-", MINUS)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)
