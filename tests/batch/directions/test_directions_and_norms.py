"""The files that a study makes of its readouts in its run directory, without an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batch_jobs.config.study import Study, StudyError
from batch_jobs.directions.directions_and_norms import have_probes, load_probes, write_probes
from batch_jobs.directions.readout_file import ReadoutKey, StudyReadouts, read_readouts, write_readouts
from batch_jobs.run.run_directory import RunDirectory
from tests.support.made_pairs import made_split, read_texts
from vllm_steer import Direction, load_directions, save_directions

PAIRS = made_split(4, 4)


def study(extracted: list[int], **steer: Any) -> Study:
    return Study.model_validate(
        {
            "name": "s",
            "model": "m",
            "concept": {"name": "calm", "outcome": "judge"},
            "extract": {"layers": extracted},
            "validation": {"bootstrap": 100, "random_directions": 5, "lexical_ablation": False},
            "steer": {"layers": extracted[:1], "alphas": [0], "scenarios": ["s"], **steer},
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


def test_controls_have_their_own_file_and_a_server_takes_the_directions_as_they_are(tmp_path: Path) -> None:
    run, wanted = RunDirectory(tmp_path), study([2, 3], layers=[2, 3], controls={"random": 2, "seed": 5})
    write_readouts(run.readouts, readouts())
    write_probes(wanted, PAIRS, readouts(), run)
    assert {one.name for one in load_directions(run.directions)} == {"calm", "calm-logistic-regression", "calm-pca"}
    probes = load_probes(wanted, PAIRS, run)
    assert set(probes.controls) == {(f"calm.control{number}", layer) for number in (0, 1) for layer in (2, 3)}
    for (_, layer), control in probes.controls.items():
        along = probes.directions["calm", layer].vector
        assert abs(float(control.vector @ along)) < 1e-6
        assert control.norm == pytest.approx(1.0)
        assert control.metadata["control_of"] == f"calm@{layer}"
    assert set(probes.hashes) == {*probes.directions, *probes.controls}
    save_directions(run.controls, list(probes.controls.values())[:-1])
    with pytest.raises(StudyError, match="does not hold the 2 controls"):
        load_probes(wanted, PAIRS, run)


def test_the_directions_of_files_are_stored_beside_the_studys_own(tmp_path: Path) -> None:
    run, entry = RunDirectory(tmp_path), {"file": "gone.npy", "name": "mine"}
    wanted = study([2, 3], directions=["mean_difference", entry])
    mine = Direction("mine", 2, np.eye(6)[0])
    write_readouts(run.readouts, readouts())
    write_probes(wanted, PAIRS, readouts(), run, [mine])
    probes = load_probes(wanted, PAIRS, run)
    assert probes.directions["mine", 2].content_hash == mine.content_hash
    with pytest.raises(StudyError, match="direction files"):
        load_probes(study([2, 3]), PAIRS, run)


def test_a_separation_is_the_distance_of_the_train_means_at_the_steered_block(tmp_path: Path) -> None:
    run, wanted = RunDirectory(tmp_path), study([2, 3])
    write_readouts(run.readouts, readouts())
    write_probes(wanted, PAIRS, readouts(), run)
    probes = load_probes(wanted, PAIRS, run)
    arrays = readouts().arrays
    apart = arrays[ReadoutKey("train_positive", 0, 2)].mean(axis=0) - arrays[ReadoutKey("train_negative", 0, 2)].mean(0)
    # the mean difference is that vector over its length, so its projection is the length; float32 readouts
    assert probes.separations == {("calm", 2): pytest.approx(float(np.linalg.norm(apart)), rel=1e-5)}


def test_alpha_cannot_count_in_separations_along_a_direction_that_points_the_other_way(tmp_path: Path) -> None:
    run, entry = RunDirectory(tmp_path), {"file": "gone.npy", "name": "mine"}
    wanted = study([2, 3], directions=[entry], alpha_unit="separation")
    write_readouts(run.readouts, readouts())
    write_probes(study([2, 3]), PAIRS, readouts(), run)
    own = load_probes(study([2, 3]), PAIRS, run).directions["calm", 2]
    write_probes(wanted, PAIRS, readouts(), run, [Direction("mine", 2, -own.vector)])
    with pytest.raises(StudyError, match=r"along mine at layer 2 .* lie -\d"):
        load_probes(wanted, PAIRS, run)
