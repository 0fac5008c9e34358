"""Probes of a study: its directions at each layer, their validation on held-out pairs, and the unit α is stated in."""

from __future__ import annotations

from dataclasses import dataclass

from batch_jobs.config.study import Study, StudyError
from batch_jobs.directions.extract import read_study_texts
from batch_jobs.directions.methods import METHODS, make_directions
from batch_jobs.directions.readout_file import StudyReadouts, write_readouts
from batch_jobs.directions.validate import validate_study
from batch_jobs.directions.validation import Validation, read_validation, write_validation
from batch_jobs.engine.engine import Engine
from batch_jobs.engine.progress import Progress
from batch_jobs.run.directory import RunDirectory
from batch_jobs.texts.contrastive import Split
from vllm_steer import Direction, load_directions, save_directions


@dataclass(frozen=True)
class Probes:
    """What the extraction left in the run directory."""

    directions: dict[tuple[str, int], Direction]
    """(name, layer) -> unit direction. Every method's are there, whichever of them the study steers with."""
    validation: Validation

    @property
    def hashes(self) -> dict[tuple[str, int], str]:
        """(name, layer) -> content hash of the direction."""
        return {key: direction.content_hash for key, direction in self.directions.items()}

    @property
    def mean_residual_norms(self) -> dict[int, float]:
        """Layer -> mean residual norm at that block's output, in the units of the residual stream."""
        return self.validation.mean_residual_norms


def have_probes(run: RunDirectory) -> bool:
    """Whether an earlier session finished the extraction. The validation is written last."""
    return run.readouts.exists() and run.directions.exists() and run.validation.exists()


def load_probes(study: Study, run: RunDirectory) -> Probes:
    """Read what `make_probes` wrote. Raises StudyError when the files do not cover the study's layers,
    SteerError when one cannot be read."""
    validation = read_validation(run.validation)
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
    """Read all texts in one batch, keep the readouts in the run directory, and write what follows from them.

    `num_layers`: decoder blocks of the engine's model. Raises StudyError when the model lacks a layer, or a text or a
    layer's readouts give no direction; SteerError when a layer is not hooked.
    """
    readouts = read_study_texts(engine, study, split, num_layers=num_layers, progress=progress)
    write_readouts(run.readouts, readouts)
    write_probes(study, readouts, run)


def write_probes(study: Study, readouts: StudyReadouts, run: RunDirectory) -> None:
    """Write the directions and their validation. Needs no engine: `read_readouts(run.readouts)` is enough to make
    them again."""
    save_directions(run.directions, list(make_directions(study, readouts).values()))
    write_validation(run.validation, validate_study(study, readouts))
