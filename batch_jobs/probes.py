"""Probes of a study: one direction a layer, its validation on held-out pairs, and the unit α is stated in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Console

from batch_jobs.contrastive import Split
from batch_jobs.engine import Engine
from batch_jobs.extract import (
    extract_readouts,
    mean_difference,
    mean_residual_norm,
    pair_readouts,
    pair_texts,
)
from batch_jobs.run_directory import RunDirectory
from batch_jobs.study import Study, StudyError
from batch_jobs.validate import Validation, read_validation, validate_layer, write_validation
from vllm_steer import Direction, load_directions, save_directions


@dataclass(frozen=True)
class Probes:
    """What the extraction left in the run directory."""

    directions: dict[int, Direction]
    """Layer -> unit direction that steers there."""
    validation: Validation
    mean_residual_norms: dict[int, float]
    """Layer -> mean residual norm at that block's output, in the units of the residual stream."""

    @property
    def hashes(self) -> dict[int, str]:
        """Layer -> content hash of its direction."""
        return {layer: direction.content_hash for layer, direction in self.directions.items()}


def have_probes(run: RunDirectory) -> bool:
    """Whether an earlier session finished the extraction. The validation is written last."""
    return run.directions.exists() and run.validation.exists()


def load_probes(study: Study, run: RunDirectory) -> Probes:
    """Read what `make_probes` wrote. Raises StudyError when the files do not cover the study's layers,
    SteerError when one cannot be read."""
    validation = read_validation(run.validation)
    directions = {direction.layer: direction for direction in load_directions(run.directions)}
    norms = validation.extra.get("mean_residual_norm")
    if set(directions) != set(study.extract.layers) or not isinstance(norms, Mapping):
        raise StudyError(
            f"{run.directions} and {run.validation} do not cover layers {list(study.extract.layers)}; "
            "use --overwrite to make them again."
        )
    return Probes(directions, validation, {int(layer): float(norm) for layer, norm in norms.items()})


def make_probes(engine: Engine, study: Study, split: Split, run: RunDirectory, *, console: Console) -> None:
    """Read all texts at all layers in one pass, then write each layer's direction, validation and mean norm.

    Raises StudyError when a text or a layer's readouts give no direction; SteerError when a layer is not
    hooked.
    """
    train_texts, test_texts = pair_texts(split.train), pair_texts(split.test)
    readouts = extract_readouts(
        engine,
        train_texts + test_texts,
        study.hooked_layers,
        skip_first=study.skip_first,
        max_tokens=study.extract.max_tokens,
        console=console,
    )
    directions, validations, norms = [], {}, {}
    for layer in study.extract.layers:
        source_ND = readouts.by_layer[study.extract.readout_layer(layer)]
        train = pair_readouts(source_ND[: len(train_texts)])
        test = pair_readouts(source_ND[len(train_texts) :])
        vector_D = mean_difference(train.empathic_ND, train.non_empathic_ND)
        directions.append(Direction(study.concept, layer, vector_D))
        validations[layer] = validate_layer(layer, test.empathic_ND, test.non_empathic_ND, vector_D)
        # The norm is that of the stream α is added to, the output of block `layer`, wherever the direction
        # was read.
        norms[layer] = mean_residual_norm(readouts.by_layer[layer][: len(train_texts)])
    save_directions(run.directions, directions)
    write_validation(
        run.validation,
        validations,
        {
            "mean_residual_norm": {str(layer): norm for layer, norm in norms.items()},
            "direction_hash": {str(direction.layer): direction.content_hash for direction in directions},
            "extract_offset": study.extract.extract_offset,
            "skip_first": study.skip_first,
            "max_tokens": study.extract.max_tokens,
            "train_pairs": len(split.train),
            "test_pairs": len(split.test),
            "mean_tokens_per_text": sum(readouts.num_tokens) / len(readouts.num_tokens),
        },
    )
