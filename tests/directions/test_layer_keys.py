"""Dicts and files with one vector a key: keys that name layers are layers, and nothing lands at a layer by accident."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from vllm_steer.directions import load_directions
from vllm_steer.errors import BadDirectionFile

D = 8
A, B = np.random.default_rng(7).standard_normal((2, D)).astype(np.float32)


def torch_file(folder: Path, content: dict[Any, Any], name: str = "kind.pt") -> Path:
    torch.save({key: torch.as_tensor(value) for key, value in content.items()}, folder / name)
    return folder / name


def safetensors_file(folder: Path, content: dict[str, Any]) -> Path:
    save_file({key: np.ascontiguousarray(value) for key, value in content.items()}, folder / "kind.safetensors")
    return folder / "kind.safetensors"


FORMS = ["{}", "layers.{}", "model.layers.{}", "transformer.h.{}", "blocks.{}", "layer.{}", "block_{}"]


@pytest.mark.parametrize("form", ["layer_{}", *FORMS])
def test_a_key_that_names_a_layer_is_that_layer(tmp_path: Path, form: str) -> None:
    path = torch_file(tmp_path, {form.format(13): B, form.format(12): A})
    with pytest.raises(BadDirectionFile, match="does not say how it counts layers"):
        load_directions(path)
    with pytest.raises(BadDirectionFile, match="does not say how it counts layers"):
        load_directions(path, layer=12)
    found = load_directions(path, layer_index="block_output")
    assert [one.key for one in found] == ["kind@12", "kind@13"]
    np.testing.assert_array_equal([one.vector for one in found], [A, B])
    assert [one.key for one in load_directions(path, layer_index="hidden_states")] == ["kind@11", "kind@12"]
    (one,) = load_directions(path, "warm", 13, layer_index="block_output")
    assert one.key == "warm@13"
    np.testing.assert_array_equal(one.vector, B)
    with pytest.raises(BadDirectionFile, match="no direction of layer 14"):
        load_directions(path, layer=14, layer_index="block_output")


@pytest.mark.parametrize("form", FORMS)
def test_the_same_keys_mean_the_same_in_a_safetensors_file(tmp_path: Path, form: str) -> None:
    path = safetensors_file(tmp_path, {form.format(13): B, form.format(12): A})
    with pytest.raises(BadDirectionFile, match="does not say how it counts layers"):
        load_directions(path, layer=12)
    found = load_directions(path, layer_index="hidden_states")
    assert [one.key for one in found] == ["kind@11", "kind@12"]
    np.testing.assert_array_equal([one.vector for one in found], [A, B])


@given(layer=st.integers(0, 999_999), asked=st.integers(0, 999_999), form=st.sampled_from(["layer_{}", *FORMS]))
def test_no_layer_that_is_asked_moves_a_vector_whose_key_names_another(
    tmp_path_factory: pytest.TempPathFactory, layer: int, asked: int, form: str
) -> None:
    path = torch_file(tmp_path_factory.getbasetemp(), {form.format(layer): A})
    if asked == layer:
        assert load_directions(path, layer=asked, layer_index="block_output")[0].layer == layer
        return
    with pytest.raises(BadDirectionFile, match=f"no direction of layer {asked}"):
        load_directions(path, layer=asked, layer_index="block_output")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"12": A, "mean": B}, "'mean' cannot be read as a layer"),
        ({-1: A}, "'-1' cannot be read as a layer"),
        ({12: A, -1: B}, "'-1' cannot be read as a layer"),
        ({12.0: A}, "'12.0' cannot be read as a layer"),
        ({"layers.12.mlp": A, "layers.13.mlp": B}, "'layers.12.mlp', 'layers.13.mlp' cannot be read as a layer"),
        ({"layer_12_mean": A}, "'layer_12_mean' cannot be read as a layer"),
        ({"layer_012": A}, "'layer_012' cannot be read as a layer"),
        ({"Layer 12": A}, "'Layer 12' cannot be read as a layer"),
        ({"layer_12": A, "layers.12": B}, "two name the same layer"),
        ({12: A, "12": B}, "two name the same layer"),
    ],
    ids=str,
)
@pytest.mark.parametrize("arguments", [{}, {"layer": 12}, {"layer_index": "block_output"}], ids=str)
def test_keys_that_are_not_layers_alone_are_refused_by_name(
    tmp_path: Path, content: dict[Any, Any], named: str, arguments: dict[str, Any]
) -> None:
    with pytest.raises(BadDirectionFile) as caught:
        load_directions(torch_file(tmp_path, content), **arguments)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_keys_that_are_names_give_their_names_and_need_a_layer(tmp_path: Path) -> None:
    path = torch_file(tmp_path, {"warm": A, "cold": B})
    with pytest.raises(BadDirectionFile, match="'warm', 'cold', and no key names a layer"):
        load_directions(path)
    assert [one.key for one in load_directions(path, layer=2)] == ["cold@2", "warm@2"]
    with pytest.raises(BadDirectionFile, match="holds the names 'warm', 'cold', got one name for them"):
        load_directions(path, "kind", 2)
    assert load_directions(torch_file(tmp_path, {"direction": A}), "kind", 2)[0].key == "kind@2"


@pytest.mark.parametrize("shape", [(2, 4), (4, 2), (8, 1), (1, 2, 4), (1, 1, 1, 8), (2, 2, 2)], ids=str)
def test_a_reader_of_one_vector_a_layer_refuses_all_that_is_not_one_vector(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    """Each of these would become 8 numbers if it were made flat."""
    given = torch.from_numpy(A.reshape(shape))
    row = {"steering_vector": given, "steering_coefficient": 1.0, "action": "add", "bias": None}
    files = [torch_file(tmp_path, {12: given}, "dict.pt")]
    for name, content in (("wisent.pt", {"vectors": {"12": given}}), ("lm_eval.pt", {"layers.12": row})):
        torch.save(content, tmp_path / name)
        files.append(tmp_path / name)
    files.append(safetensors_file(tmp_path, {"layer_12": A.reshape(shape)}))
    probe = tmp_path / "x.probe.safetensors"
    save_file({"direction.pca": A.reshape(shape)}, probe, {"hook_site": "resid_post", "layer": "2"})
    for path in (*files, probe):
        with pytest.raises(BadDirectionFile, match=r"shape \(.*\) .*; allowed there: one vector, \(D,\)"):
            load_directions(path, layer_index="block_output" if path.name == "dict.pt" else None)


@pytest.mark.parametrize("shape", [(D,), (1, D), (1, 1, D)], ids=str)
def test_one_vector_in_brackets_is_one_vector(tmp_path: Path, shape: tuple[int, ...]) -> None:
    (found,) = load_directions(torch_file(tmp_path, {12: A.reshape(shape)}), layer_index="block_output")
    np.testing.assert_array_equal(found.vector, A)


def test_a_layer_that_stands_beside_a_vector_is_not_replaced(tmp_path: Path) -> None:
    torch.save(torch.from_numpy(A), tmp_path / "direction.pt")
    (tmp_path / "direction_metadata.json").write_text('{"pos": -1, "layer": 14}')
    assert load_directions(tmp_path / "direction.pt", layer=14)[0].key == "direction@13"
    torch.save(torch.from_numpy(A), tmp_path / "layer_5.pt")
    (tmp_path / "layer_5.json").write_text('{"behavior": "calm", "layer_index": 5}')
    assert load_directions(tmp_path / "layer_5.pt", layer=5)[0].key == "calm@5"
    probe = tmp_path / "layer_3"
    probe.mkdir()
    np.save(probe / "weights.npy", A)
    (probe / "bias.json").write_text("{}")
    assert load_directions(probe / "weights.npy", "cat", 3)[0].key == "cat@2"
    for path in (tmp_path / "direction.pt", tmp_path / "layer_5.pt", probe / "weights.npy"):
        with pytest.raises(BadDirectionFile, match="no direction of layer 12"):
            load_directions(path, layer=12)
    (tmp_path / "mine.json").write_text("[1, 2]")  # notes of the user's own
    torch.save(torch.from_numpy(A), tmp_path / "mine.pt")
    assert load_directions(tmp_path / "mine.pt", layer=12)[0].key == "mine@12"


def test_two_vectors_for_one_name_and_layer_are_refused(tmp_path: Path) -> None:
    row = {"steering_vector": torch.from_numpy(A), "steering_coefficient": 1.0, "action": "add", "bias": None}
    torch.save({"layers.12": row, "model.layers.12": row}, tmp_path / "twice.pt")
    (tmp_path / "twice.svec").write_text(json.dumps({"directions": {"3": A.tolist(), "03": B.tolist()}}))
    for name in ("twice.pt", "twice.svec"):
        with pytest.raises(BadDirectionFile, match="several vectors for 'twice' at layer"):
            load_directions(tmp_path / name)
