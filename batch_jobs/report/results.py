"""Read a run directory for its report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from batch_jobs.config.concept import Concept, concept_of_run
from batch_jobs.cost.cost_curve import CostPoint, read_cost
from batch_jobs.directions.validation_file import Validation, read_validation
from batch_jobs.files.documents import read_json
from batch_jobs.report.samples import Generations, read_generations
from batch_jobs.run.run_directory import RunDirectory
from batch_jobs.scoring.direction_behaviour import DirectionBehaviour, read_behaviour
from batch_jobs.scoring.judgements import grades_in, outcome_rater
from batch_jobs.scoring.outcome import Outcome
from batch_jobs.scoring.rater_agreement import Agreement, read_agreement
from batch_jobs.scoring.scores_csv import Scores, read_scores
from batch_jobs.scoring.setting import Setting, SettingNames
from batch_jobs.scoring.sign_and_layer_findings import Findings, read_findings
from vllm_steer.errors import SteerError


class ReportError(SteerError):
    """The run directory lacks something that the report needs; the message says what, and how to get it."""


@dataclass(frozen=True)
class RunResults:
    """The parts of a run directory."""

    name: str
    validation: Validation
    scores: Scores
    findings: Findings | None
    """None where the run directory has no `findings.json`."""
    behaviours: tuple[DirectionBehaviour, ...]
    """Entries with completions that were read again; empty where there is no `behaviour.json`."""
    generations: Generations
    concept: Concept
    provenance: dict[str, Any]
    cost: tuple[CostPoint, ...] = ()
    """Empty where the run did not measure it."""
    agreement: Agreement | None = None
    """None where the run has neither judge nor labels."""

    @cached_property
    def settings(self) -> tuple[Setting, ...]:
        """The distinct settings, in the order of the scores."""
        return tuple(dict.fromkeys(Setting.of(row) for row in self.scores.conditions))

    @cached_property
    def setting_names(self) -> SettingNames:
        """Short names for `settings`."""
        return SettingNames.for_settings(self.settings)

    @cached_property
    def models(self) -> tuple[str, ...]:
        """Names of the models in the scores, sorted."""
        return tuple(sorted({row.model for row in self.scores.conditions}))

    @cached_property
    def extract_offset(self) -> int | None:
        """Block at which a direction was read minus its layer; None where the run does not record it."""
        for document in (self.validation.extra, self.provenance):
            offset = _find(document, "extract_offset")
            if isinstance(offset, int):
                return offset
        return None

    @cached_property
    def best_steering_layer(self) -> int | None:
        """The best steering layer of the first comparison, which is that of the first model and direction."""
        comparisons = self.findings.layers if self.findings is not None else ()
        return comparisons[0].best_steering_layer if comparisons else None


def read_run(run_dir: Path, *, per_condition: int, max_samples: int) -> RunResults:
    """Read a run directory, with at most `per_condition` texts per condition and `max_samples` in total.

    `findings.json`, `behaviour.json` and `agreement.json` may be absent.

    Raises:
        ReportError: the directory, `provenance.json` or the scores are unusable.
        SteerError: another part is unusable; each reader raises its own subclass.
    """
    if not run_dir.is_dir():
        raise ReportError(f"{run_dir} is not a directory; give the directory that a study run wrote.")
    validation = read_validation(run_dir / "validation.json")
    scores = read_scores(run_dir / "scores.csv")
    if not scores.conditions:
        raise ReportError(f"{run_dir / 'scores.csv'} has no condition; score the generations again.")
    findings, behaviour = run_dir / "findings.json", run_dir / "behaviour.json"
    agreement, cost = run_dir / "agreement.json", run_dir / "cost.json"
    provenance = _read_provenance(run_dir / "provenance.json")
    concept = concept_of_run(provenance)
    rater = outcome_rater(RunDirectory(run_dir)) if concept.outcome == "judge" else None
    grades = grades_in(rater.path) if rater else {}
    return RunResults(
        name=str(_find(provenance, "name") or run_dir.name),
        validation=validation,
        scores=scores,
        findings=read_findings(findings) if findings.exists() else None,
        behaviours=tuple(row for row in read_behaviour(behaviour) if row.points) if behaviour.exists() else (),
        generations=read_generations(
            run_dir / "generations",
            per_condition=per_condition,
            max_samples=max_samples,
            outcome=Outcome.of(concept),
            grades=grades,
        ),
        concept=concept,
        provenance=provenance,
        cost=read_cost(cost).points if cost.exists() else (),
        agreement=read_agreement(agreement) if agreement.exists() else None,
    )


def _read_provenance(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ReportError(f"There is no {path}; a study run writes it, so run the study first.")
    document = read_json(path, advice="run the study again", error=ReportError)
    if not isinstance(document, dict):
        raise ReportError(f"{path} holds a {type(document).__name__}; it must be a JSON object.")
    return document


def _find(document: Any, key: str) -> Any:
    """The value of `key` at the shallowest level of nested mappings that has it, or None."""
    level: list[Any] = [document]
    while level:
        mappings = [item for item in level if isinstance(item, Mapping)]
        for mapping in mappings:
            if key in mapping:
                return mapping[key]
        level = [value for mapping in mappings for value in mapping.values()]
    return None
