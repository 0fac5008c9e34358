"""Directions that a study takes from files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batch_jobs.config.study import Study, StudyError
from batch_jobs.directions.direction_files import read_direction_files
from vllm_steer import Direction, save_directions

SIZE = 8


def study(entry: dict[str, Any], layers: tuple[int, ...] = (12, 16)) -> Study:
    grid = {"layers": layers, "alphas": [-2, 0, 2], "scenarios": ["s"], "directions": [entry]}
    return Study.model_validate({"name": "x", "model": "m", "extract": {"layers": [12, 16]}, "steer": grid})


def vector(seed: int, length: float = 3.0) -> np.ndarray[Any, Any]:
    drawn = np.random.default_rng(seed).standard_normal(SIZE)
    return (drawn * length / np.linalg.norm(drawn)).astype(np.float32)


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "kind.safetensors"
    save_directions(path, [Direction("kind", layer, vector(layer)) for layer in (8, 12, 16)])
    return path


def test_a_direction_is_taken_at_the_steered_layers_as_a_unit_vector_under_its_new_name(stored: Path) -> None:
    found = read_direction_files(study({"file": str(stored), "name": "mine"}), hidden_size=SIZE)
    assert [(one.name, one.layer) for one in found] == [("mine", 12), ("mine", 16)]
    for one in found:
        np.testing.assert_allclose(one.vector, vector(one.layer) / 3.0, rtol=1e-6)  # float32
        assert one.metadata["stored_name"] == "kind"
        assert one.metadata["stored_norm"] == pytest.approx(3.0)


def test_a_unit_vector_keeps_its_content_hash(tmp_path: Path) -> None:
    unit = Direction("kind", 16, vector(1)).normalised()
    save_directions(tmp_path / "u.safetensors", [unit])
    (found,) = read_direction_files(study({"file": str(tmp_path / "u.safetensors"), "name": "u"}, layers=(16,)))
    assert found.content_hash == unit.content_hash


def test_a_format_without_name_and_layer_takes_those_of_the_entry(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", vector(1))
    entry = {"file": str(tmp_path / "v.npy"), "name": "v", "layer": 16}
    (found,) = read_direction_files(study(entry, layers=(16,)))
    assert (found.name, found.layer) == ("v", 16)
    with pytest.raises(StudyError, match=r"entry 'v'.*layer"):
        read_direction_files(study({"file": str(tmp_path / "v.npy"), "name": "v"}))


def test_a_stack_that_counts_hidden_states_gives_the_block_below(tmp_path: Path) -> None:
    stack = np.stack([vector(index) for index in range(20)])
    np.save(tmp_path / "stack.npy", stack)
    entry = {"file": str(tmp_path / "stack.npy"), "name": "v", "layer_index": "hidden_states"}
    found = read_direction_files(study(entry))
    assert [one.layer for one in found] == [12, 16]
    for one in found:
        # hidden_states[0] is the embeddings, so the output of block L stands at L + 1
        np.testing.assert_allclose(one.vector, stack[one.layer + 1] / 3.0, rtol=1e-6)
    (single,) = read_direction_files(study(entry | {"layer": 16}, layers=(16,)))
    assert single.content_hash == found[1].content_hash


def test_one_of_several_directions_must_be_named(tmp_path: Path) -> None:
    path = tmp_path / "two.safetensors"
    save_directions(path, [Direction(name, layer, vector(layer)) for name in ("a", "b") for layer in (12, 16)])
    with pytest.raises(StudyError, match="holds 2 directions; say which by `direction`: a, b"):
        read_direction_files(study({"file": str(path), "name": "mine"}))
    with pytest.raises(StudyError, match="holds no direction 'c'; allowed: a, b"):
        read_direction_files(study({"file": str(path), "name": "mine", "direction": "c"}))
    assert len(read_direction_files(study({"file": str(path), "name": "mine", "direction": "b"}))) == 2


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"file": "{missing}"}, "no direction file"),
        ({"file": "{stored}"}, r"block \[20\], only of \[8, 12, 16\]"),
    ],
)
def test_a_file_that_lacks_what_is_steered_is_refused(stored: Path, entry: dict[str, str], said: str) -> None:
    file = entry["file"].format(stored=stored, missing=stored.with_name("none.npy"))
    grid = {"layers": [20], "alphas": [-2, 0, 2], "scenarios": ["s"], "directions": [{"file": file, "name": "mine"}]}
    steered = Study.model_validate({"name": "x", "model": "m", "extract": {"layers": [20]}, "steer": grid})
    with pytest.raises(StudyError, match=said):
        read_direction_files(steered)


def test_another_models_direction_is_refused(stored: Path) -> None:
    with pytest.raises(StudyError, match="8 numbers wide and the model's residual stream 576"):
        read_direction_files(study({"file": str(stored), "name": "mine"}), hidden_size=576)
