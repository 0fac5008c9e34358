"""The config of `vllm-steer evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from batch_jobs.config.evaluation import Evaluation, load_evaluation
from batch_jobs.config.shipped import shipped_configs
from batch_jobs.errors import StudyError

FIELDS: dict[str, Any] = {
    "model": "demo-model",
    "directions": ["dirs.safetensors"],
    "steer": [{"direction": "kind", "layer": 3}],
    "alphas": [-2, 0, 2.5],
    "tasks": ["choice.yaml", "arc_easy"],
}


def load(folder: Path, **changes: Any) -> Evaluation:
    fields = {name: value for name, value in {**FIELDS, **changes}.items() if value is not None}
    (folder / "e.yaml").write_text(yaml.safe_dump(fields))
    return load_evaluation(folder / "e.yaml")


def test_paths_are_relative_to_the_file_and_names_of_tasks_are_no_paths(tmp_path: Path) -> None:
    own = load(tmp_path, include_path="more", directions="a.safetensors")
    assert own.directions == (str(tmp_path / "a.safetensors"),)
    assert own.tasks == (str(tmp_path / "choice.yaml"), "arc_easy")
    assert own.include_path == tmp_path / "more"


def test_alpha_zero_is_the_unsteered_model(tmp_path: Path) -> None:
    assert load(tmp_path).steered_alphas == (-2.0, 2.5)
    with pytest.raises(StudyError, match="alphas has only 0, the unsteered model"):
        load(tmp_path, alphas=[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alfas": [1]}, r"field alfas: unknown; allowed here: model, dtype"),
        ({"tasks": []}, r"field tasks: got \[\]"),
        ({"tasks": None}, "field tasks: missing"),
        ({"alphas": [1, 1]}, "1.0 is given more than once"),
        ({"alphas": [float("nan")]}, "field alphas.0"),
        ({"steer": [{"direction": ""}]}, "field steer.0.direction"),
        ({"span": "answer"}, "span is 'answer'; allowed"),
        ({"op": "clamp"}, "field op"),
        ({"op": "ablate"}, "op 'ablate' came with alpha -2.0"),
        ({"op": "scale", "relative": True}, "op 'scale' came with relative"),
        ({"controls": -1}, "field controls"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message) as refused:
        load(tmp_path, **changes)
    assert str(refused.value).startswith(f"{tmp_path}/e.yaml: ")
    assert "\n" not in str(refused.value)


def test_working_fields_and_places_of_files_change_no_hash(tmp_path: Path) -> None:
    own = load(tmp_path)
    for changes in ({"engine": {"enforce_eager": True}}, {"directions": ["b.gguf"]}, {"tasks": ["x"]}):
        assert load(tmp_path, **changes).config_hash == own.config_hash
    for changes in ({"alphas": [1]}, {"span": "response"}, {"controls": 2}, {"model": "other"}, {"limit": 3}):
        assert load(tmp_path, **changes).config_hash != own.config_hash


def test_the_shipped_evaluation_is_one() -> None:
    own = load_evaluation(shipped_configs() / "evaluations" / "demo.yaml")
    assert own.model == "demo-model"
    assert len(own.tasks) == 2
    assert all(Path(task).is_file() for task in own.tasks)
