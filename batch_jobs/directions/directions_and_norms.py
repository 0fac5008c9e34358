"""Probes of a study: its directions per layer, their controls, their validation on held-out pairs, and the norms and
separations that scale α."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from batch_jobs.config.steering import control_name
from batch_jobs.config.study import Study, StudyError
from batch_jobs.directions.control import control_direction
from batch_jobs.directions.extract import read_study_texts
from batch_jobs.directions.methods import METHODS, make_directions
from batch_jobs.directions.readout_file import StudyReadouts, read_readouts, write_readouts
from batch_jobs.directions.stored_validation import current_validation
from batch_jobs.directions.validate_directions import validate_study
from batch_jobs.directions.validation_file import Validation, write_validation
from batch_jobs.engine.progress import Progress
from batch_jobs.engine.start_engine import Engine
from batch_jobs.run.run_directory import RunDirectory
from batch_jobs.texts.contrastive import Split
from vllm_steer import Direction, load_directions, save_directions

DirectionKey = tuple[str, int]
"""Name and layer of a direction."""


@dataclass(frozen=True)
class Probes:
    """Results of the extraction, read from the run directory."""

    directions: dict[DirectionKey, Direction]
    """(name, layer) -> unit direction, for every method, including those the study does not steer with, and for every
    direction file."""
    validation: Validation
    controls: dict[DirectionKey, Direction] = field(default_factory=dict)
    """(name, layer) -> control direction; empty for a study without controls."""
    separations: dict[DirectionKey, float] = field(default_factory=dict)
    """(name, layer) of each of `directions` that steers -> what separates the means of the two sides of the train texts
    along it, at the output of that block, in units of the residual stream."""

    @property
    def hashes(self) -> dict[DirectionKey, str]:
        """(name, layer) -> content hash of the direction or control."""
        return {key: direction.content_hash for key, direction in (self.directions | self.controls).items()}

    @property
    def mean_residual_norms(self) -> dict[int, float]:
        """Layer -> mean residual norm at that block's output, in units of the residual stream."""
        return self.validation.mean_residual_norms


def have_probes(run: RunDirectory) -> bool:
    """Whether an earlier call finished the extraction. The validation file is written last."""
    return run.readouts.exists() and run.directions.exists() and run.validation.exists()


def load_probes(study: Study, split: Split, run: RunDirectory) -> Probes:
    """Read the files that `write_probes` writes. A validation file of another version is made anew.

    Raises:
        StudyError: the files do not cover the study's layers, directions and controls, or a direction separates the
            train texts the wrong way where α counts in separations.
        SteerError: a file cannot be read.
    """
    validation = current_validation(study, split, run)
    directions = _by_key(load_directions(run.directions))
    layers = set(study.extract.layers)
    made = {(study.direction_name(method), layer) for method in METHODS for layer in layers}
    if set(validation.layers) != layers or set(directions) != made | set(_file_keys(study)):
        raise StudyError(
            f"{run.directions} and {run.validation} do not cover layers {list(study.extract.layers)} and the direction "
            "files of the study; use --overwrite to make them again."
        )
    controls = {}
    if study.steer.controls is not None:
        controls = _by_key(load_directions(run.controls))
        if set(controls) != set(_control_keys(study)):
            raise StudyError(
                f"{run.controls} does not hold the {study.steer.controls.random} controls of each steered direction; "
                "use --overwrite to make them again."
            )
    steering = {key: directions[key] for key in steering_keys(study)}
    separations = class_separations(study, read_readouts(run.readouts), steering)
    if study.steer.alpha_unit == "separation":
        _refuse_reversed(separations)
    return Probes(directions, validation, controls, separations)


def read_texts(
    engine: Engine, study: Study, split: Split, run: RunDirectory, *, num_layers: int, progress: Progress
) -> None:
    """Read all texts in one batch and write their readouts to the run directory.

    `num_layers`: decoder blocks of the engine's model.

    Raises:
        StudyError: the model lacks a layer, or a text cannot be read.
        SteerError: a layer is not hooked.
    """
    write_readouts(run.readouts, read_study_texts(engine, study, split, num_layers=num_layers, progress=progress))


def write_probes(
    study: Study, split: Split, readouts: StudyReadouts, run: RunDirectory, files: Sequence[Direction] = ()
) -> None:
    """Write the directions, their controls and their validation.

    Needs no engine: stored readouts, `read_readouts(run.readouts)`, are enough. `files`: the directions of
    `read_direction_files`. Raises as `make_directions` and `validate_study`.
    """
    directions = [*make_directions(study, readouts).values(), *files]
    save_directions(run.directions, directions)
    if controls := make_controls(study, _by_key(directions)):
        save_directions(run.controls, controls)
    write_validation(run.validation, validate_study(study, readouts, split))


def make_controls(study: Study, directions: Mapping[DirectionKey, Direction]) -> list[Direction]:
    """The random controls of the directions that steer, at the layers where they do; none if the study has none."""
    wanted = study.steer.controls
    if wanted is None:
        return []
    return [
        control_direction(directions[key], seed=wanted.seed, number=number, orthogonal=wanted.orthogonal)
        for key in steering_keys(study)
        for number in range(wanted.random)
    ]


def steering_keys(study: Study) -> list[DirectionKey]:
    """(name, layer) of every direction that steers, controls aside, in the order of the grid."""
    return [
        (study.direction_name(entry), layer)
        for layer in study.steer.layers
        for entry in study.steer.directions_at(layer)
    ]


def class_separations(
    study: Study, readouts: StudyReadouts, directions: Mapping[DirectionKey, Direction]
) -> dict[DirectionKey, float]:
    """(name, layer) -> mean projection of the positive train texts minus that of the negative ones, under the study's
    pooling.

    The texts are read at the output of the block that is steered, also where the direction was read at another one.
    """
    separations = {}
    for (name, layer), direction in directions.items():
        train = readouts.train(study.skip_first, layer)
        along_D = direction.vector.astype(float)
        separations[name, layer] = float((train.positive_ND @ along_D).mean() - (train.negative_ND @ along_D).mean())
    return separations


def _refuse_reversed(separations: Mapping[DirectionKey, float]) -> None:
    if reversed_ones := {key: value for key, value in separations.items() if value <= 0.0}:
        (name, layer), value = next(iter(reversed_ones.items()))
        raise StudyError(
            f"steer.alpha_unit separation: along {name} at layer {layer} the positive train texts lie {value:.4g} from "
            "the others, which is no unit for α; give the negative of that direction, or α raw or in residual norms."
        )


def _file_keys(study: Study) -> list[DirectionKey]:
    return [(entry.name, layer) for entry in study.steer.direction_files for layer in entry.layers(study.steer.layers)]


def _control_keys(study: Study) -> list[DirectionKey]:
    number = study.steer.controls.random if study.steer.controls else 0
    return [(control_name(name, index), layer) for name, layer in steering_keys(study) for index in range(number)]


def _by_key(directions: Iterable[Direction]) -> dict[DirectionKey, Direction]:
    return {(direction.name, direction.layer): direction for direction in directions}
