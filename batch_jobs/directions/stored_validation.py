"""A run's validation. Where an earlier version wrote the file, it is made anew from the stored readouts."""

from __future__ import annotations

import pydantic

from batch_jobs.config.study import Study, StudyError
from batch_jobs.directions.readout_file import read_readouts
from batch_jobs.directions.validate_directions import validate_study
from batch_jobs.directions.validation_file import OutdatedValidation, Validation, read_validation, write_validation
from batch_jobs.run.run_directory import RunDirectory
from batch_jobs.texts.contrastive import Split, load_split


def current_validation(study: Study, split: Split, run: RunDirectory) -> Validation:
    """Read `validation.json`; one of another version is first written anew.

    Args:
        study: the run's study.
        split: its pairs.
        run: the run directory.

    Raises:
        OutdatedValidation: the file is of another version, and the run has no readouts.
        SteerError: a file cannot be read, or the readouts are not those of the study's texts.
    """
    try:
        return read_validation(run.validation)
    except OutdatedValidation:
        if not run.readouts.exists():
            raise
    validation = validate_study(study, read_readouts(run.readouts), split)
    write_validation(run.validation, validation)
    return validation


def recorded_validation(run: RunDirectory) -> Validation:
    """As `current_validation`, for the study that the run's provenance records. The texts are read only where the
    file has to be written anew.

    Raises:
        OutdatedValidation: the file is of another version, and the run has no readouts.
        StudyError: the file is of another version, and the recorded config or its pairs cannot be read.
        SteerError: as for `current_validation`.
    """
    try:
        return read_validation(run.validation)
    except OutdatedValidation as outdated:
        if not run.readouts.exists():
            raise
        try:
            study = Study.model_validate(run.read_provenance().get("config"))
        except pydantic.ValidationError as error:
            raise StudyError(
                f"{outdated} {run.provenance} records no config that this version reads, so run the study itself again."
            ) from error
    return current_validation(study, load_split(study.pairs, study.split), run)
