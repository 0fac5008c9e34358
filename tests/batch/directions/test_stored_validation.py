"""A run directory of an earlier version gets its validation made anew from its readouts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from batch_jobs.config.study import Study, StudyError
from batch_jobs.directions.directions_and_norms import load_probes, write_probes
from batch_jobs.directions.readout_file import write_readouts
from batch_jobs.directions.stored_validation import current_validation, recorded_validation
from batch_jobs.directions.validate_layer import ValidationError
from batch_jobs.directions.validation_file import OutdatedValidation, read_validation
from batch_jobs.run.run_directory import RunDirectory
from batch_jobs.texts.contrastive import Split
from tests.batch.directions.test_directions_and_norms import readouts, study
from tests.support.made_pairs import made_split, read_texts

PAIRS = made_split(4, 4)


def earlier_run(folder: Path, *, pairs: Path | None = None) -> tuple[RunDirectory, Study]:
    """A run whose validation file is as the version before wrote it."""
    run = RunDirectory(folder)
    config = study([2, 3]).model_copy(update={"pairs": pairs})
    write_readouts(run.readouts, readouts())
    write_probes(config, PAIRS, readouts(), run)
    run.write_provenance({"config": config.model_dump(mode="json")})
    document = json.loads(run.validation.read_text())
    for added in ("format", "layer_choice", "words", "beyond_words", "left_out_scenarios", "left_out_writers"):
        del document[added]
    document["layers"]["2"]["auroc_low"] = 1.0
    run.validation.write_text(json.dumps(document))
    return run, config


def pairs_folder(folder: Path, split: Split) -> Path:
    folder.mkdir()
    for name, pairs in (("train", split.train), ("test", split.test)):
        lines: list[dict[str, Any]] = [
            {
                "pair_id": pair.pair_id,
                "scenario_id": pair.scenario_id,
                "positive": pair.positive,
                "negative": pair.negative,
            }
            for pair in pairs
        ]
        (folder / f"{name}_pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def test_an_earlier_validation_is_made_anew_and_its_directions_stay(tmp_path: Path) -> None:
    run, config = earlier_run(tmp_path)
    before = run.directions.read_bytes()
    with pytest.raises(OutdatedValidation):
        read_validation(run.validation)
    probes = load_probes(config, PAIRS, run)
    assert read_validation(run.validation) == probes.validation
    assert probes.validation.layers[2].auroc_low < 1.0
    assert run.directions.read_bytes() == before
    written = run.validation.stat().st_mtime_ns
    assert current_validation(config, PAIRS, run) == probes.validation
    assert run.validation.stat().st_mtime_ns == written  # a current file is only read


def test_scoring_alone_makes_it_anew_from_the_recorded_config_and_its_pairs(tmp_path: Path) -> None:
    run, _ = earlier_run(tmp_path / "run", pairs=pairs_folder(tmp_path / "pairs", PAIRS))
    assert recorded_validation(run) == read_validation(run.validation)
    for file in (tmp_path / "pairs").iterdir():
        file.unlink()
    assert recorded_validation(run) == read_validation(run.validation)  # needs no texts any more


def test_what_is_missing_to_make_it_anew_is_named(tmp_path: Path) -> None:
    run, config = earlier_run(tmp_path / "run", pairs=tmp_path / "gone.jsonl")
    with pytest.raises(StudyError, match=r"gone\.jsonl"):
        recorded_validation(run)
    run.write_provenance({})
    with pytest.raises(StudyError, match=r"has format 1.* records no config"):
        recorded_validation(run)
    run.readouts.unlink()
    for read in (lambda: recorded_validation(run), lambda: current_validation(config, PAIRS, run)):
        with pytest.raises(OutdatedValidation, match="format 1"):
            read()


def test_texts_other_than_those_that_were_read_are_refused(tmp_path: Path) -> None:
    run, config = earlier_run(tmp_path)
    other = replace(PAIRS, test=(*PAIRS.test[:3], replace(PAIRS.test[3], negative="another text")))
    assert read_texts(other)["test_positive"] == read_texts(PAIRS)["test_positive"]
    with pytest.raises(ValidationError, match="test negative texts are not those of the readouts"):
        current_validation(config, other, run)
