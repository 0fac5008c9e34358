"""Compare two runs: their configs, their completions and their results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from batch_jobs.compare.completions import CompletionAgreement, compare_completions
from batch_jobs.compare.models import BlockReadouts, CrossModelAgreement, compare_readouts
from batch_jobs.config.difference import FieldChange, config_difference
from batch_jobs.config.study import StudyError
from batch_jobs.directions.readout_file import StudyReadouts, read_readouts
from batch_jobs.directions.stored_validation import recorded_validation
from batch_jobs.directions.validate_layer import LayerValidation
from batch_jobs.directions.validation_file import Validation
from batch_jobs.files.atomic import write_atomically
from batch_jobs.files.documents import printable
from batch_jobs.run.run_directory import RunDirectory
from batch_jobs.scoring.scores_csv import SuccessRate, read_scores
from vllm_steer import Direction, load_directions


@dataclass(frozen=True)
class RunFacts:
    """Identity of a run."""

    path: str
    study: str
    model: str
    config_hash: str
    git_commit: str | None
    versions: dict[str, str]


@dataclass(frozen=True)
class DirectionPair:
    """The directions with the same name and layer in both runs."""

    name: str
    layer: int
    same: bool
    """Whether they are bit-identical."""
    cosine: float | None
    """Cosine similarity, -1..1; None where the hidden sizes differ because one model name stands for two models."""


@dataclass(frozen=True)
class SuccessPair:
    """Success rates of one (layer, scenario, direction, op, span) in both runs; None where a run lacks it."""

    layer: int
    scenario: str
    direction: str
    op: str
    span: str
    a: SuccessRate | None
    b: SuccessRate | None


@dataclass(frozen=True)
class ValidationPair:
    """Validation of one layer's direction in both runs; None where a run lacks it."""

    layer: int
    a: LayerValidation | None
    b: LayerValidation | None


@dataclass(frozen=True)
class Comparison:
    """Run A against run B."""

    a: RunFacts
    b: RunFacts
    config_changes: tuple[FieldChange, ...]
    """Config fields that differ, with defaults filled in."""
    version_changes: tuple[FieldChange, ...]
    """Packages whose versions differ, and the commit if it differs."""
    directions: tuple[DirectionPair, ...]
    """One pair for each name and layer that both runs have. Empty for two models, whose axes are unrelated."""
    completions: CompletionAgreement
    success: tuple[SuccessPair, ...]
    validation: tuple[ValidationPair, ...]
    best_layer_a: int
    best_layer_b: int
    cross_model: tuple[CrossModelAgreement, ...]
    """The block of every layer of A against that of every layer of B; the pair of best layers comes first."""
    no_cross_model: str | None
    """Why `cross_model` is empty; None when it has entries."""


def compare_runs(a: Path, b: Path) -> Comparison:
    """Compare two run directories of finished studies.

    Raises:
        StudyError: a path is not a run directory.
        SteerError: a result is absent or cannot be read; the message names the file.
    """
    run_a, run_b = RunDirectory(a), RunDirectory(b)
    record_a, record_b = _record(run_a), _record(run_b)
    config_a, config_b = record_a["config"], record_b["config"]
    validation_a, validation_b = recorded_validation(run_a), recorded_validation(run_b)
    same_model = config_a["model"] == config_b["model"]
    cross_model: tuple[CrossModelAgreement, ...] | str = (
        f"both runs read {config_a['model']}: one model, not two"
        if same_model
        else _cross_model(run_a, run_b, config_a, config_b, validation_a, validation_b)
    )
    return Comparison(
        a=_facts(run_a, record_a),
        b=_facts(run_b, record_b),
        config_changes=tuple(config_difference(config_a, config_b)),
        version_changes=tuple(config_difference(_versions(record_a), _versions(record_b))),
        directions=_direction_pairs(run_a, run_b) if same_model else (),
        completions=compare_completions(
            run_a.generations,
            run_b.generations,
            greedy=config_a["sampling"]["temperature"] == config_b["sampling"]["temperature"] == 0,
            alpha_unit=config_a["steer"]["alpha_unit"],
        ),
        success=_success_pairs(read_scores(run_a.scores).success, read_scores(run_b.scores).success),
        validation=tuple(
            ValidationPair(layer, validation_a.layers.get(layer), validation_b.layers.get(layer))
            for layer in sorted({*validation_a.layers, *validation_b.layers})
        ),
        best_layer_a=validation_a.best_layer,
        best_layer_b=validation_b.best_layer,
        cross_model=() if isinstance(cross_model, str) else cross_model,
        no_cross_model=cross_model if isinstance(cross_model, str) else None,
    )


def write_comparison(path: Path, comparison: Comparison) -> None:
    """Write the comparison as one JSON object with the same fields, atomically."""
    write_atomically(path, json.dumps(asdict(comparison), indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def _record(run: RunDirectory) -> dict[str, Any]:
    record = run.read_provenance()
    if not isinstance(record.get("config"), Mapping):
        raise StudyError(f"{run.path} is not a run directory: {run.provenance} is absent or has no config.")
    return record


def _facts(run: RunDirectory, record: Mapping[str, Any]) -> RunFacts:
    return RunFacts(
        path=printable(str(run.path)),
        study=record["study"],
        model=record["config"]["model"],
        config_hash=record["config_hash"],
        git_commit=record["git_commit"],
        versions=record["versions"],
    )


def _versions(record: Mapping[str, Any]) -> dict[str, Any]:
    return {**record["versions"], "git_commit": record["git_commit"]}


def _direction_pairs(run_a: RunDirectory, run_b: RunDirectory) -> tuple[DirectionPair, ...]:
    theirs = {direction.key: direction for direction in load_directions(run_b.directions)}
    pairs = [(one, theirs[one.key]) for one in load_directions(run_a.directions) if one.key in theirs]
    return tuple(
        DirectionPair(one.name, one.layer, one.content_hash == other.content_hash, _cosine(one, other))
        for one, other in pairs
    )


def _cosine(one: Direction, other: Direction) -> float | None:
    if one.vector.shape != other.vector.shape:
        return None
    return float(np.dot(one.vector.astype(np.float64), other.vector) / (one.norm * other.norm))


def _success_pairs(ours: tuple[SuccessRate, ...], theirs: tuple[SuccessRate, ...]) -> tuple[SuccessPair, ...]:
    def by_key(rates: tuple[SuccessRate, ...]) -> dict[tuple[int, str, str, str, str], SuccessRate]:
        # without the model, so that the rates of two models are paired
        return {(rate.layer, rate.scenario, rate.direction, rate.op, rate.span): rate for rate in rates}

    rates_a, rates_b = by_key(ours), by_key(theirs)
    return tuple(SuccessPair(*key, rates_a.get(key), rates_b.get(key)) for key in sorted({*rates_a, *rates_b}))


def _cross_model(
    run_a: RunDirectory,
    run_b: RunDirectory,
    config_a: Mapping[str, Any],
    config_b: Mapping[str, Any],
    validation_a: Validation,
    validation_b: Validation,
) -> tuple[CrossModelAgreement, ...] | str:
    readouts_a, readouts_b = read_readouts(run_a.readouts), read_readouts(run_b.readouts)
    if _text_digests(readouts_a) != _text_digests(readouts_b):
        return "the two runs did not read the same train and test texts in the same order"
    ours = _labelled_blocks(readouts_a, config_a, validation_a)
    theirs = _labelled_blocks(readouts_b, config_b, validation_b)
    return tuple(compare_readouts(one, other) for one, other in product(ours, theirs))


def _text_digests(readouts: StudyReadouts) -> list[list[str]]:
    return [
        [text.sha256 for text in readouts.texts[text_set]]
        for text_set in ("train_positive", "train_negative", "test_positive", "test_negative")
    ]


def _labelled_blocks(readouts: StudyReadouts, config: Mapping[str, Any], validation: Validation) -> list[BlockReadouts]:
    """Readouts at the blocks of the run's directions, best layer first, under the run's own pooling."""
    offset, skip_first = config["extract"]["extract_offset"], validation.skip_first
    layers = sorted(validation.layers, key=lambda layer: (layer != validation.best_layer, layer))
    return [
        BlockReadouts(block, readouts.train(skip_first, block), readouts.test(skip_first, block))
        for block in (layer + offset for layer in layers)
    ]
