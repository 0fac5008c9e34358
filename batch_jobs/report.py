"""The report of a run: one HTML file that needs nothing but itself, made from the run directory alone.

It reads `validation.json`, `scores.csv`, `provenance.json` and the Parquet files under `generations/`, and
computes nothing new: every rate is the one in `scores.csv`. The page is `templates/report.html.j2`, the
figures come from `figures`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from batch_jobs.atomic_file import write_atomically
from batch_jobs.figures import Setting, auroc_figure, scenario_title, setting_figures, settings
from batch_jobs.panel import MINUS, mark_path, number
from batch_jobs.samples import Generations, read_generations
from batch_jobs.scores import ConditionScore, Scores, read_scores
from batch_jobs.validate import Validation, read_validation
from vllm_steer.errors import SteerError

SHOWN_PER_CONDITION = 10
"""Texts shown of each condition; all of them are in the Parquet files."""
MAX_PLACES = 4


class ReportError(SteerError):
    """The run directory lacks something the report needs; the message names it and how to get it."""


@dataclass(frozen=True)
class Headline:
    """One number at the top of the page."""

    label: str
    value: str
    note: str


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` and return its path.

    The file is self-contained: styles, figures and the script of the sample filter are inline, and its
    content security policy forbids it to load anything. All text from the run is escaped. Raises ReportError
    when the directory or `provenance.json` is unusable, ValidationError or ScoreError for the other parts.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ReportError(f"{run_dir} is not a directory; give the directory that a study run wrote.")
    validation = read_validation(run_dir / "validation.json")
    scores = read_scores(run_dir / "scores.csv")
    if not scores.conditions:
        raise ReportError(f"{run_dir / 'scores.csv'} has no condition; score the generations again.")
    generations = read_generations(run_dir / "generations", per_condition=SHOWN_PER_CONDITION)
    provenance = _read_provenance(run_dir / "provenance.json")

    environment = Environment(
        loader=PackageLoader("batch_jobs"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(fixed=_fixed, num=_optional_number, title=scenario_title, text=_as_text)
    all_settings = settings(scores)
    path = run_dir / "report.html"
    page = environment.get_template("report.html.j2").render(
        name=_find(provenance, "name") or run_dir.name,
        models=sorted({row.model for row in scores.conditions}),
        headlines=_headlines(validation, scores, generations),
        validation=validation,
        residual_norms=_by_layer(validation.extra.get("mean_residual_norm")),
        auroc=auroc_figure(validation),
        figures=[setting_figures(scores, setting) for setting in all_settings],
        scenarios=sorted({row.scenario for row in scores.conditions}),
        mark_path=mark_path,
        scores=scores,
        conditions_by_setting=[list(rows) for _, rows in groupby(scores.conditions, key=_same_panel)],
        setting_index={setting: index for index, setting in enumerate(all_settings)},
        setting_of=Setting.of,
        show_direction=len({(row.direction, row.op, row.span) for row in scores.conditions}) > 1,
        show_model=len({row.model for row in scores.conditions}) > 1,
        alpha_places=_places(row.alpha for row in scores.conditions),
        norm_places=_places(row.alpha_residual_norm for row in scores.conditions),
        samples_range=_range(row.samples for row in scores.conditions),
        generations=generations,
        shown_per_condition=SHOWN_PER_CONDITION,
        extract_offset=_extract_offset(validation, provenance),
        provenance=provenance,
    )
    write_atomically(path, page)
    return path


def _same_panel(row: ConditionScore) -> tuple[Setting, str]:
    return Setting.of(row), row.scenario


def _read_provenance(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ReportError(f"There is no {path}; a study run writes it, so run the study first.") from error
    except ValueError as error:
        raise ReportError(f"{path} is not JSON ({error}); run the study again.") from error
    if not isinstance(document, dict):
        raise ReportError(f"{path} holds a {type(document).__name__}; it must be a JSON object.")
    return document


def _find(document: Any, key: str) -> Any:
    """The value of `key` nearest the top of nested mappings, or None."""
    level: list[Any] = [document]
    while level:
        mappings = [item for item in level if isinstance(item, Mapping)]
        for mapping in mappings:
            if key in mapping:
                return mapping[key]
        level = [value for mapping in mappings for value in mapping.values()]
    return None


def _extract_offset(validation: Validation, provenance: Mapping[str, Any]) -> int | None:
    for document in (validation.extra, provenance):
        offset = _find(document, "extract_offset")
        if isinstance(offset, int):
            return offset
    return None


def _by_layer(values: Any) -> dict[int, float]:
    """A layer -> number mapping of the validation file's free part; empty when it is not one."""
    if not isinstance(values, Mapping):
        return {}
    return {int(key): float(value) for key, value in values.items() if str(key).isdigit()}


def _headlines(validation: Validation, scores: Scores, generations: Generations) -> list[Headline]:
    best = validation.layers[validation.best_layer]
    headlines = [
        Headline("Test AUROC, best layer", f"{best.auroc:.3f}", f"layer {best.layer}, accuracy {best.accuracy:.2f}")
    ]
    if steered := sorted({row.layer for row in scores.conditions} & set(validation.layers)):
        worst = min(validation.layers[layer].auroc for layer in steered)
        layers = ", ".join(str(layer) for layer in steered)
        label = "Test AUROC, steered layer" if len(steered) == 1 else "Test AUROC, lowest steered layer"
        headlines.append(
            Headline(label, f"{worst:.3f}", f"layer {layers}" if len(steered) == 1 else f"layers {layers}")
        )
    if scores.success:
        mean = fmean(row.steering_success_rate for row in scores.success)
        flagged = sum(row.baseline_ceiling or row.baseline_floor for row in scores.success)
        headlines.append(
            Headline(
                "Steering success, paper\u2019s rule",
                f"{mean:.3f}",
                f"mean of {len(scores.success)}; {flagged} of them with a degenerate baseline",
            )
        )
    groups: dict[tuple[Setting, str], list[ConditionScore]] = {}
    for row in scores.conditions:
        groups.setdefault(_same_panel(row), []).append(row)
    lowest = fmean(min(rows, key=lambda row: row.alpha).empathy_rate for rows in groups.values())
    highest = fmean(max(rows, key=lambda row: row.alpha).empathy_rate for rows in groups.values())
    baseline = fmean(rows[0].baseline_empathy_rate for rows in groups.values())
    headlines.append(
        Headline(
            "Empathetic rate",
            f"{lowest:.2f} \u2192 {baseline:.2f} \u2192 {highest:.2f}",
            "lowest \u03b1 \u2192 unsteered \u2192 highest \u03b1, mean over scenarios",
        )
    )
    weakest = min(scores.conditions, key=lambda row: row.coherence_rate)
    total = sum(row.samples for row in scores.conditions)
    coherent = sum(row.coherence_rate * row.samples for row in scores.conditions) / total
    headlines.append(
        Headline(
            "Coherent samples",
            f"{coherent:.2f}",
            f"lowest {weakest.coherence_rate:.2f}: {scenario_title(weakest.scenario)}, \u03b1 {number(weakest.alpha)}",
        )
    )
    failed = f"{generations.num_failed} failed" if generations.num_failed else "none failed"
    headlines.append(Headline("Samples", f"{generations.num_rows:,}", f"{len(scores.conditions)} conditions, {failed}"))
    return headlines


def _range(values: Iterable[int]) -> str:
    values = set(values)
    return str(min(values)) if len(values) == 1 else f"{min(values)} to {max(values)}"


def _places(values: Iterable[float | None]) -> int:
    """Fewest decimal places that show every value to within half a percent, so that a column lines up."""
    known = [value for value in values if value is not None]
    fits = (
        places
        for places in range(MAX_PLACES)
        if all(abs(round(value, places) - value) <= 0.005 * abs(value) for value in known)
    )
    return next(fits, MAX_PLACES)


def _fixed(value: float | None, places: int) -> str:
    return "\u2013" if value is None else f"{value:.{places}f}".replace("-", MINUS)


def _optional_number(value: float | None) -> str:
    return "\u2013" if value is None else number(value)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)
