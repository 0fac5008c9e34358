"""Controls, direction files and the primary hypothesis in a study's config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from batch_jobs.config.primary import Primary, recorded_primary
from batch_jobs.config.steering import DirectionFile
from batch_jobs.config.study import Study, StudyError, load_study

PRIMARY = {"direction": "empathy", "layer": 16}


def document(steer: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    grid = {"layers": [12, 16], "alphas": [-2, 0, 2], "scenarios": ["s", "t"]}
    return {"name": "x", "model": "m", "extract": {"layers": [12, 16]}, "steer": grid | (steer or {}), **changes}


def load(folder: Path, steer: dict[str, Any] | None = None, **changes: Any) -> Study:
    path = folder / "x.yaml"
    path.write_text(yaml.safe_dump(document(steer, **changes)), encoding="utf-8")
    return load_study(path)


def test_a_config_without_the_sections_dumps_none_of_them(tmp_path: Path) -> None:
    dumped = load(tmp_path).model_dump(mode="json")
    assert "controls" not in dumped["steer"]
    assert "primary" not in dumped
    with_both = load(tmp_path, {"controls": {"random": 2}}, primary=PRIMARY)
    assert Study.model_validate(with_both.model_dump(mode="json")) == with_both
    assert with_both.config_hash != load(tmp_path).config_hash


def test_controls_multiply_the_directions_of_an_engine(tmp_path: Path) -> None:
    assert load(tmp_path).num_steering_directions == 2
    assert (
        load(tmp_path, {"controls": {"random": 3}, "directions": ["mean_difference", "pca"]}).num_steering_directions
        == 16
    )


def test_a_direction_file_lies_beside_the_config_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    entries = [{"file": "mine.npy", "name": "mine"}, {"file": "hf://owner/repository/v.npy", "name": "hub"}, "pca"]
    load(tmp_path / "below", {"directions": entries})
    upper = tmp_path / "upper.yaml"
    upper.write_text("base: below/x.yaml\nname: upper\n", encoding="utf-8")
    mine, hub, method = load_study(upper).steer.directions
    assert isinstance(mine, DirectionFile)
    assert isinstance(hub, DirectionFile)
    assert Path(mine.file) == tmp_path / "below" / "mine.npy"
    assert hub.file == "hf://owner/repository/v.npy"
    assert method == "pca"


def test_the_place_of_a_direction_file_is_no_part_of_a_runs_identity(tmp_path: Path) -> None:
    one, other = (load(tmp_path, {"directions": [{"file": name, "name": "mine"}]}) for name in ("a.npy", "b.npy"))
    assert one.identity == other.identity
    renamed = load(tmp_path, {"directions": [{"file": "a.npy", "name": "yours"}]})
    assert renamed.identity != one.identity


@pytest.mark.parametrize(
    ("steer", "changes", "said"),
    [
        ({"controls": {}}, {}, ["steer.controls.random", "missing"]),
        ({"controls": {"random": 0}}, {}, ["steer.controls.random", "greater than or equal to 1"]),
        ({"controls": {"random": 1, "number": 2}}, {}, ["steer.controls.number", "unknown", "random, orthogonal"]),
        ({"directions": ["median"]}, {}, ["steer.directions.0", "'median'", "'mean_difference'"]),
        ({"directions": [{"file": "a.npy"}]}, {}, ["name", "missing"]),
        ({"directions": [{"file": "a.npy", "name": "a", "nmae": 1}]}, {}, ["nmae", "unknown", "layer_index"]),
        ({"directions": [{"file": "a.npy", "name": "e.control1"}]}, {}, ["'e.control1'", "name of a control"]),
        ({"directions": [{"file": "a.npy", "name": "empathy-pca"}]}, {}, ["'empathy-pca', which is taken"]),
        ({"directions": [{"file": f, "name": "a"} for f in ("a.npy", "b.npy")]}, {}, ["'a', which is taken"]),
        ({"directions": ["pca", {"file": "a.npy", "name": "a", "layer": 20}]}, {}, ["layer 20", "[12, 16]"]),
        ({"directions": [{"file": "a.npy", "name": "a", "layer": 16}]}, {}, ["layers [12] have no direction"]),
        ({}, {"primary": {"direction": "empathy"}}, ["primary.layer", "missing"]),
        ({}, {"primary": PRIMARY | {"layer": 8}}, ["primary.layer is 8", "[12, 16]"]),
        ({}, {"primary": PRIMARY | {"direction": "empathy-pca"}}, ["primary.direction", "['empathy']"]),
        ({}, {"primary": PRIMARY | {"scenarios": ["u"]}}, ["primary.scenarios ['u']", "['s', 't']"]),
        ({}, {"primary": PRIMARY | {"scenarios": ["s", "s"]}}, ["'s' is given more than once"]),
        ({}, {"primary": PRIMARY | {"minimum": 2}}, ["primary.minimum", "less than or equal to 1"]),
        ({"alphas": [0, 2]}, {"primary": PRIMARY}, ["delta compares +α with -α"]),
        ({"op": "set"}, {"primary": PRIMARY}, ["delta compares +α with -α"]),
    ],
)
def test_what_cannot_be_is_refused_by_its_name(
    tmp_path: Path, steer: dict[str, Any], changes: dict[str, Any], said: list[str]
) -> None:
    with pytest.raises(StudyError) as caught:
        load(tmp_path, steer, **changes)
    for part in said:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recorded_hypothesis_is_read_with_its_time_and_a_broken_one_refused() -> None:
    record = {**PRIMARY, "stated_at": "2026-01-01T00:00:00+00:00"}
    assert recorded_primary({"primary": record}) == (Primary(direction="empathy", layer=16), record["stated_at"])
    assert recorded_primary({}) is None
    for broken in (PRIMARY, "empathy", {**record, "layer": "x"}):
        with pytest.raises(StudyError, match="cannot be read"):
            recorded_primary({"primary": broken})
