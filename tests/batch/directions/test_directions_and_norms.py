"""The files that a study makes of its readouts in its run directory, without an engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from batch_jobs.config.study import Study, StudyError
from batch_jobs.directions.directions_and_norms import have_probes, load_probes, write_probes
from batch_jobs.directions.readout_file import ReadoutKey, StudyReadouts, read_readouts, write_readouts
from batch_jobs.run.run_directory import RunDirectory
from tests.support.made_pairs import made_split, read_texts

PAIRS = made_split(4, 4)


def study(layers: list[int]) -> Study:
    return Study.model_validate(
        {
            "name": "s",
            "model": "m",
            "concept": {"name": "calm", "outcome": "judge"},
            "extract": {"layers": layers},
            "validation": {"bootstrap": 100, "random_directions": 5, "lexical_ablation": False},
            "steer": {"layers": layers[:1], "alphas": [0], "scenarios": ["s"]},
        }
    )


def readouts() -> StudyReadouts:
    draw = np.random.default_rng(0)
    sets = ("train_positive", "train_negative", "test_positive", "test_negative")
    return StudyReadouts(
        texts=read_texts(PAIRS),
        arrays={
            ReadoutKey(name, skip_first, block): draw.normal(float("negative" not in name), 1, (4, 6)).astype(
                np.float32
            )
            for name in sets
            for skip_first in (0, 1)
            for block in (2, 3)
        },
    )


def test_directions_and_validation_can_be_made_again_from_the_readouts_alone(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    write_readouts(run.readouts, readouts())
    assert not have_probes(run)
    write_probes(study([2, 3]), PAIRS, readouts(), run)
    assert have_probes(run)
    first = load_probes(study([2, 3]), PAIRS, run)
    assert set(first.directions) == {
        (name, layer) for name in ("calm", "calm-logistic-regression", "calm-pca") for layer in (2, 3)
    }
    assert first.mean_residual_norms == first.validation.mean_residual_norms

    run.directions.unlink()
    run.validation.unlink()
    assert not have_probes(run)
    write_probes(study([2, 3]), PAIRS, read_readouts(run.readouts), run)
    again = load_probes(study([2, 3]), PAIRS, run)
    assert again.hashes == first.hashes
    assert again.validation == first.validation


def test_probes_of_other_layers_are_refused(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    write_probes(study([2]), PAIRS, readouts(), run)
    with pytest.raises(StudyError, match=r"do not cover layers \[2, 3\]"):
        load_probes(study([2, 3]), PAIRS, run)
