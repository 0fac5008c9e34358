"""Tasks of an evaluation that are YAML files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from batch_jobs.errors import StudyError
from batch_jobs.harnesses.local_task import read_task


def write(folder: Path, **fields: Any) -> str:
    (folder / "docs.json").write_text(json.dumps({"text": "a"}))
    document = {"task": "mine", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "docs.json"}}}
    (folder / "t.yaml").write_text(yaml.safe_dump({**document, **fields}))
    return str(folder / "t.yaml")


def test_data_files_lie_beside_the_yaml(tmp_path: Path) -> None:
    data = str(tmp_path / "docs.json")
    for files, resolved in (
        ({"test": "docs.json"}, {"test": data}),
        (["docs.json"], [data]),
        ("docs.json", data),
        (data, data),
        ("https://somewhere/docs.json", "https://somewhere/docs.json"),
    ):
        spec = read_task(write(tmp_path, dataset_kwargs={"data_files": files})).spec
        assert isinstance(spec, dict)
        assert spec["dataset_kwargs"] == {"data_files": resolved}


def test_each_evaluation_gets_a_copy_of_its_own(tmp_path: Path) -> None:
    task = read_task(write(tmp_path, generation_kwargs={"until": []}))
    first = task.spec
    assert isinstance(first, dict)
    first["generation_kwargs"]["until"].append("changed")
    assert task.spec["generation_kwargs"] == {"until": []}  # type: ignore[index]


def test_the_digest_is_that_of_yaml_and_data(tmp_path: Path) -> None:
    before = read_task(write(tmp_path)).digest
    assert read_task(write(tmp_path)).digest == before
    assert read_task(write(tmp_path, num_fewshot=1)).digest != before
    path = write(tmp_path)
    (tmp_path / "docs.json").write_text(json.dumps({"text": "b"}))
    assert read_task(path).digest != before


def test_a_name_is_lm_evals() -> None:
    task = read_task("arc_easy")
    assert (task.name, task.spec) == ("arc_easy", "arc_easy")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "has no field task"),
        ("task: 5", "has no field task"),
        ("task: a\ninclude: b.yaml", "put its folder into include_path"),
        ("task: !function f.g", "not valid YAML"),
        ("task: a\ndataset_kwargs: {data_files: none.json}", r"none\.json: cannot be read"),
    ],
)
def test_what_is_no_task_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(StudyError, match=message):
        read_task(str(tmp_path / "t.yaml"))
    with pytest.raises(StudyError, match="cannot be read"):
        read_task(str(tmp_path / "none.yaml"))
