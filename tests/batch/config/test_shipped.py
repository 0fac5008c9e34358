"""The configs that come with the package, and the one that `study init` writes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from batch_jobs.config.shipped import copy_configs, shipped_configs, write_study_config
from batch_jobs.config.study import Study, StudyError, load_study


def test_the_written_config_runs_as_it_is(tmp_path: Path) -> None:
    study = load_study(write_study_config("mine", tmp_path))
    assert (study.name, study.model) == ("mine", "demo-model")
    assert 0 in study.steer.alphas


@pytest.mark.parametrize("name", ["2026", "1e5", "true", "null"])
def test_a_name_that_yaml_would_read_as_something_else_stays_a_name(tmp_path: Path, name: str) -> None:
    assert load_study(write_study_config(name, tmp_path)).name == name


def _fields(model: type[BaseModel]) -> set[str]:
    """The names of all fields, those of sections included."""
    names: set[str] = set()
    for name, field in model.model_fields.items():
        names.add(name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names |= _fields(field.annotation)
    return names


def test_the_written_config_shows_every_field_with_its_default(tmp_path: Path) -> None:
    text = write_study_config("mine", tmp_path).read_text(encoding="utf-8")
    shown = set(re.findall(r"^(?: *# )? *([a-z_]+):", text, re.M)) | set(re.findall(r"[{,] ?([a-z_]+):", text))
    assert _fields(Study) <= shown
    # With the comment signs taken away it is the same study with its defaults spelt out.
    spelt_out = re.sub(r"^( *)# (?=[a-z_]+: )(?!pairs|scenarios)", r"\1", text, flags=re.M)
    assert spelt_out != text
    (tmp_path / "spelt.yaml").write_text(spelt_out, encoding="utf-8")
    assert load_study(tmp_path / "spelt.yaml") == load_study(tmp_path / "mine.yaml")


@pytest.mark.parametrize("name", ["", "../up", "a b", ".hidden"])
def test_a_name_that_is_no_file_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(StudyError, match="allowed: letters"):
        write_study_config(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_nothing_is_replaced(tmp_path: Path) -> None:
    first = write_study_config("mine", tmp_path).read_bytes()
    with pytest.raises(StudyError, match="is there already"):
        write_study_config("mine", tmp_path)
    assert (tmp_path / "mine.yaml").read_bytes() == first

    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "demo.yaml").write_text("mine")
    with pytest.raises(StudyError, match=r"demo\.yaml is there already"):
        copy_configs(tmp_path)
    assert not (tmp_path / "servers").exists()


def test_the_copies_are_the_configs(tmp_path: Path) -> None:
    written = copy_configs(tmp_path / "configs")
    assert len(written) == sum(file.is_file() for file in shipped_configs().rglob("*"))
    assert load_study(tmp_path / "configs/studies/listener-conflict.yaml").name == "listener-conflict"
