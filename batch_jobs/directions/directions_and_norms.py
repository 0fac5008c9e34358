"""Probes of a study: its directions per layer, their validation on held-out pairs, and the norms that scale α."""

from __future__ import annotations

from dataclasses import dataclass

from batch_jobs.config.study import Study, StudyError
from batch_jobs.directions.extract import read_study_texts
from batch_jobs.directions.methods import METHODS, make_directions
from batch_jobs.directions.readout_file import StudyReadouts, write_readouts
from batch_jobs.directions.stored_validation import current_validation
from batch_jobs.directions.validate_directions import validate_study
from batch_jobs.directions.validation_file import Validation, write_validation
from batch_jobs.engine.progress import Progress
from batch_jobs.engine.start_engine import Engine
from batch_jobs.run.run_directory import RunDirectory
from batch_jobs.texts.contrastive import Split
from vllm_steer import Direction, load_directions, save_directions


@dataclass(frozen=True)
class Probes:
    """Results of the extraction, read from the run directory."""

    directions: dict[tuple[str, int], Direction]
    """(name, layer) -> unit direction, for every method, including those the study does not steer with."""
    validation: Validation

    @property
    def hashes(self) -> dict[tuple[str, int], str]:
        """(name, layer) -> content hash of the direction."""
        return {key: direction.content_hash for key, direction in self.directions.items()}

    @property
    def mean_residual_norms(self) -> dict[int, float]:
        """Layer -> mean residual norm at that block's output, in units of the residual stream."""
        return self.validation.mean_residual_norms


def have_probes(run: RunDirectory) -> bool:
    """Whether an earlier call finished the extraction. The validation file is written last."""
    return run.readouts.exists() and run.directions.exists() and run.validation.exists()


def load_probes(study: Study, split: Split, run: RunDirectory) -> Probes:
    """Read the files that `make_probes` writes. A validation file of another version is made anew.

    Raises:
        StudyError: the files do not cover the study's layers.
        SteerError: a file cannot be read.
    """
    validation = current_validation(study, split, run)
    directions = {(direction.name, direction.layer): direction for direction in load_directions(run.directions)}
    layers = set(study.extract.layers)
    if set(validation.layers) != layers or set(directions) != {
        (study.direction_name(method), layer) for method in METHODS for layer in layers
    }:
        raise StudyError(
            f"{run.directions} and {run.validation} do not cover layers {list(study.extract.layers)}; "
            "use --overwrite to make them again."
        )
    return Probes(directions, validation)


def make_probes(
    engine: Engine, study: Study, split: Split, run: RunDirectory, *, num_layers: int, progress: Progress
) -> None:
    """Read all texts in one batch and write readouts, directions and validation to the run directory.

    `num_layers`: decoder blocks of the engine's model.

    Raises:
        StudyError: the model lacks a layer, a text cannot be read, or a layer's readouts give no direction.
        SteerError: a layer is not hooked.
    """
    readouts = read_study_texts(engine, study, split, num_layers=num_layers, progress=progress)
    write_readouts(run.readouts, readouts)
    write_probes(study, split, readouts, run)


def write_probes(study: Study, split: Split, readouts: StudyReadouts, run: RunDirectory) -> None:
    """Write the directions and their validation.

    Needs no engine: stored readouts, `read_readouts(run.readouts)`, are enough. Raises as `make_directions` and
    `validate_study`.
    """
    save_directions(run.directions, list(make_directions(study, readouts).values()))
    write_validation(run.validation, validate_study(study, readouts, split))
