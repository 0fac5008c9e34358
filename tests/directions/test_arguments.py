"""The arguments of ``load_directions``: of the wrong type, or against what the file says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from tests.support.shared_formats import FORMATS
from vllm_steer.directions import Direction, load_directions, save_directions
from vllm_steer.errors import BadDirectionFile, MalformedSpec

D = 8
ROWS = np.random.default_rng(9).standard_normal((4, D)).astype(np.float32)
OTHER = {"block_output": "hidden_states", "hidden_states": "block_output"}


@pytest.mark.parametrize("ending", [".pt", ".npy", ".safetensors", ".gguf"])
@pytest.mark.parametrize("argument", ["layer", "feature"])
@pytest.mark.parametrize("value", ["12", 12.0, -1, True, [12], float("nan"), {}], ids=str)
def test_a_number_of_another_type_is_one_clear_error(tmp_path: Path, ending: str, argument: str, value: Any) -> None:
    path = tmp_path / f"kind{ending}"
    save_directions(path, [Direction("kind", 12, ROWS[0])])
    with pytest.raises(MalformedSpec, match=rf"^{argument} is .*; allowed: a whole number from 0\.") as caught:
        load_directions(path, **{argument: value})
    assert "\n" not in str(caught.value)


def test_a_name_is_a_string_and_numbers_may_be_of_numpy(tmp_path: Path) -> None:
    np.save(tmp_path / "kind.npy", ROWS[0])
    with pytest.raises(MalformedSpec, match=r"^name is 3; allowed: a string"):
        load_directions(tmp_path / "kind.npy", 3, 12)  # type: ignore[arg-type]
    assert load_directions(tmp_path / "kind.npy", layer=np.int64(12))[0].key == "kind@12"  # type: ignore[arg-type]


def saved(ending: str) -> Callable[[Path], Path]:
    """What makes a file of one direction, kind@12, with `save_directions`."""

    def make(folder: Path) -> Path:
        path = folder / f"kind.{ending}"
        save_directions(path, [Direction("kind", 12, ROWS[0])])
        return path

    make.__name__ = ending
    return make


own_safetensors, own_gguf, repsteer, lm_eval = map(saved, ("safetensors", "gguf", "repsteer", "pt"))


def svec(folder: Path) -> Path:
    (folder / "kind.svec").write_text(json.dumps({"directions": {"12": ROWS[0].tolist()}}))
    return folder / "kind.svec"


def saklas(folder: Path) -> Path:
    save_file({"layer_12": ROWS[0]}, folder / "kind.safetensors")
    (folder / "kind.json").write_text('{"method": "pca"}')
    return folder / "kind.safetensors"


def steerkit(folder: Path) -> Path:
    save_file({"direction.pca": ROWS[0]}, folder / "kind.safetensors", {"hook_site": "resid_post", "layer": "12"})
    return folder / "kind.safetensors"


def persona_vectors(folder: Path) -> Path:
    torch.save(torch.from_numpy(ROWS), folder / "kind_response_avg_diff.pt")
    return folder / "kind_response_avg_diff.pt"


def refusal_direction(folder: Path) -> Path:
    torch.save(torch.from_numpy(ROWS[0]), folder / "direction.pt")
    (folder / "direction_metadata.json").write_text('{"layer": 13}')
    return folder / "direction.pt"


def rotalabs(folder: Path) -> Path:
    torch.save(torch.from_numpy(ROWS[0]), folder / "layer_12.pt")
    (folder / "layer_12.json").write_text('{"behavior": "kind", "layer_index": 12}')
    return folder / "layer_12.pt"


def wisent(folder: Path) -> Path:
    torch.save({"vectors": {"13": torch.from_numpy(ROWS[0])}}, folder / "kind.pt")
    return folder / "kind.pt"


WRITERS = {
    **dict.fromkeys([own_safetensors, own_gguf, repsteer, lm_eval, svec, saklas, steerkit, rotalabs], "block_output"),
    **dict.fromkeys([persona_vectors, refusal_direction, wisent], "hidden_states"),
}


@pytest.mark.parametrize("writer", WRITERS, ids=lambda one: one.__name__)
def test_a_file_that_says_how_it_counts_is_not_counted_otherwise(tmp_path: Path, writer: Any) -> None:
    path, counts = writer(tmp_path), WRITERS[writer]
    said = [one.key for one in load_directions(path)]
    assert [one.key for one in load_directions(path, layer_index=counts)] == said
    with pytest.raises(
        BadDirectionFile, match=f"counts layers by {counts}.*; allowed: {counts}. Leave layer_index out"
    ):
        load_directions(path, layer_index=OTHER[counts])


@pytest.mark.parametrize("writer", WRITERS, ids=lambda one: one.__name__)
def test_a_feature_of_a_file_without_features_is_refused(tmp_path: Path, writer: Any) -> None:
    with pytest.raises(BadDirectionFile, match="no feature 3 of an autoencoder"):
        load_directions(writer(tmp_path), feature=3)


def test_a_converted_feature_is_still_that_feature(tmp_path: Path) -> None:
    save_directions(tmp_path / "d.safetensors", [Direction("cat", 2, ROWS[0], {"feature": 3})])
    assert load_directions(tmp_path / "d.safetensors", feature=3)
    with pytest.raises(BadDirectionFile, match="no feature 4"):
        load_directions(tmp_path / "d.safetensors", feature=4)


@pytest.mark.skipif(not FORMATS.is_dir(), reason="the samples of real writers are not here")
@pytest.mark.parametrize("name", ["repeng.gguf", "easysteer.gguf", "brainpatch.gguf"])
def test_a_control_vector_without_a_mark_is_counted_as_it_is_said(name: str) -> None:
    """brainpatch counts one later than the others, and its files look like theirs."""
    by_output = [one.layer for one in load_directions(FORMATS / name, layer_index="block_output")]
    one_less = [layer - 1 for layer in by_output if layer]
    if 0 in by_output:
        with pytest.raises(BadDirectionFile, match="layer 0, which is no block's output"):
            load_directions(FORMATS / name, layer_index="hidden_states")
        return
    assert [one.layer for one in load_directions(FORMATS / name, layer_index="hidden_states")] == one_less
