"""A direction that follows the advice of its refusal is not refused again."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from batch_jobs.cli.main import app
from tests.support.broken_directions import described, safetensors
from vllm_steer.directions import Direction, load_directions, save_directions
from vllm_steer.errors import BadDirectionFile, BadVector, SteerError

VALUES = np.random.default_rng(0).standard_normal((2, 32)).astype(np.float32)


def refused(call: Callable[[], Any], advice: str) -> str:
    """The message of a refusal; it must contain ``advice`` and fit one line."""
    with pytest.raises(SteerError, match=re.escape(advice)) as refusal:
        call()
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_float8_converted_in_torch_is_taken(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = tmp_path / "d.safetensors"
    save_file({"kind@1": torch.from_numpy(VALUES[0]).to(torch.float8_e4m3fn)}, str(path))
    refused(
        lambda: load_directions(path), "tensor.float() in PyTorch), make a Direction of it and write it with save_d"
    )
    save_directions(path, [Direction("kind", 1, load_file(str(path))["kind@1"].float())])
    assert load_directions(path)


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8"])
def test_each_dtype_that_is_called_allowed_is_read(tmp_path: Path, dtype: str) -> None:
    bad, good = tmp_path / "bad.safetensors", tmp_path / "good.safetensors"
    bad.write_bytes(safetensors({"kind@1": described(0, 16, "F8_E4M3")}, bytes(16)))
    allowed = refused(lambda: load_directions(bad), "allowed: ").partition("allowed: ")[2].partition(".")[0]
    assert dtype in allowed.split(", ")
    size = 16 * int(re.sub(r"\D", "", dtype)) // 8
    good.write_bytes(safetensors({"kind@1": described(0, size, dtype)}, b"\x3f" * size))
    assert load_directions(good)


def test_a_quantised_control_vector_is_taken_dequantised(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(str(tmp_path / "d.gguf"), "controlvector")
    packed = gguf.quants.quantize(VALUES[:1], gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("direction.1", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(lambda: load_directions(tmp_path / "d.gguf"), "gguf.quants.dequantize")
    (tensor,) = gguf.GGUFReader(tmp_path / "d.gguf").tensors
    vector = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    # The vector has GGUF's shape, in rows; the next refusal advises on that.
    refused(lambda: Direction("kind", 1, vector), "Flatten it with reshape(-1)")
    save_directions(tmp_path / "d.safetensors", [Direction("kind", 1, vector.reshape(-1))])
    assert load_directions(tmp_path / "d.safetensors")


@pytest.mark.parametrize("kind", ["F64", "F32", "F16", "BF16"])
def test_each_gguf_type_that_is_called_allowed_is_read(tmp_path: Path, kind: str) -> None:
    from tests.support.broken_directions import gguf, tensor

    path = tmp_path / "d.gguf"
    path.write_bytes(gguf(tensors=[tensor("direction.1", kind=8)], data=bytes(64)))
    assert f" {kind}" in refused(lambda: load_directions(path), "Export it again as one of these")
    number = {"F64": 28, "F32": 0, "F16": 1, "BF16": 30}[kind]
    path.write_bytes(gguf(tensors=[tensor("direction.1", kind=number)], data=b"\x3f" * 128))
    assert load_directions(path)


@pytest.mark.parametrize(
    "array",
    [
        np.array([1.5, None], object),
        np.array([True, False]),
        np.array([1 + 1j, 2]),
        np.array([b"\x80\x3f", b"\x00\x40"], "V2"),
    ],
    ids=["objects", "booleans", "complex", "bfloat16 without its name"],
)
def test_an_array_saved_as_the_message_says_is_read(tmp_path: Path, array: np.ndarray) -> None:
    path = tmp_path / "d.npy"
    np.save(path, array)
    advice = "numpy.save(path, numpy.asarray(vector, 'float32'))"
    refused(lambda: load_directions(path, "kind", 1), advice)
    exec(f"import numpy; {advice}", {"path": path, "vector": [1.0, 2.0]})
    assert load_directions(path, "kind", 1)[0].vector.tolist() == [1.0, 2.0]


def test_one_vector_is_read_with_its_layer_or_converted(tmp_path: Path) -> None:
    path = tmp_path / "kind.npy"
    np.save(path, VALUES[0])
    message = refused(lambda: load_directions(path), "load_directions(path, layer=...)")
    assert "vllm-steer convert --layer LAYER" in message
    assert load_directions(path, layer=3)[0].key == "kind@3"
    target = tmp_path / "d.safetensors"
    assert CliRunner().invoke(app, ["convert", str(path), str(target), "--layer", "3"]).exit_code == 0
    assert load_directions(target)[0].key == "kind@3"


def test_a_stack_is_read_with_the_way_in_which_it_counts_or_converted(tmp_path: Path) -> None:
    path = tmp_path / "kind.npy"
    np.save(path, VALUES)
    message = refused(lambda: load_directions(path), "load_directions(path, layer_index=...)")
    assert "layer=..." not in message
    assert "vllm-steer convert --layer-index: block_output" in message
    assert [one.key for one in load_directions(path, layer_index="block_output")] == ["kind@0", "kind@1"]
    target = tmp_path / "d.safetensors"
    arguments = ["convert", str(path), str(target), "--layer-index", "hidden_states"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert [one.key for one in load_directions(target)] == ["kind@0"]


def test_a_gguf_whose_stem_is_no_name_is_read_under_another(tmp_path: Path) -> None:
    save_directions(tmp_path / "d.gguf", [Direction("kind", 1, VALUES[0])])
    nameless = tmp_path / "my vector.gguf"
    nameless.write_bytes(
        (tmp_path / "d.gguf")
        .read_bytes()
        .replace(b"vllm_steer.name", b"another_key.one")
        .replace(b"unknown", b"mistral")
    )
    message = refused(lambda: load_directions(nameless), "load_directions(path, name=...)")
    assert "vllm-steer convert --name" in message
    assert load_directions(nameless, name="kind")[0].key == "kind@1"
    arguments = ["convert", str(nameless), str(tmp_path / "c.safetensors"), "--name", "kind"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert load_directions(tmp_path / "c.safetensors")[0].key == "kind@1"


@pytest.mark.parametrize("others", [[], [("calm", 1)], [("calm", 0)]], ids=str)
def test_layer_0_is_refused_by_gguf_once_and_held_by_safetensors(tmp_path: Path, others: list[tuple[str, int]]) -> None:
    directions = [Direction(name, layer, VALUES[0]) for name, layer in [("kind", 0), *others]]
    refused(lambda: save_directions(tmp_path / "d.gguf", directions), "Write a .safetensors file")
    save_directions(tmp_path / "d.safetensors", directions)
    assert len(load_directions(tmp_path / "d.safetensors")) == len(directions)


def test_several_names_go_into_a_gguf_each_or_into_safetensors(tmp_path: Path) -> None:
    directions = [Direction("kind", 1, VALUES[0]), Direction("calm", 2, VALUES[1])]
    refused(lambda: save_directions(tmp_path / "d.gguf", directions), "Write a file for each name, or a .safetensors")
    for one in directions:
        save_directions(tmp_path / f"{one.name}.gguf", [one])
        assert load_directions(tmp_path / f"{one.name}.gguf")[0].key == one.key
    save_directions(tmp_path / "d.safetensors", directions)


@pytest.mark.parametrize("ending", [".safetensors", ".gguf"])
def test_of_a_key_that_comes_twice_one_is_left_out(tmp_path: Path, ending: str) -> None:
    directions = [Direction("kind", 1, VALUES[0]), Direction("kind", 1, VALUES[1])]
    refused(lambda: save_directions(tmp_path / f"d{ending}", directions), "Leave one of them out")
    save_directions(tmp_path / f"d{ending}", directions[1:])


@pytest.mark.parametrize("largest", [1e300, 1e39, 1e-60], ids=str)
def test_what_float32_cannot_hold_is_taken_once_it_is_divided(largest: float) -> None:
    vector = np.linspace(-1, 1, 32) * largest
    with pytest.raises(BadVector, match="Divide it by its largest absolute value") as refusal:
        Direction("kind", 1, vector)
    assert f"{largest:.3g}" in str(refusal.value)
    assert Direction("kind", 1, vector / np.abs(vector).max()).normalised().is_unit


@pytest.mark.parametrize("shape", [(1, 32), (32, 1), (1, 1, 32)], ids=str)
def test_a_vector_in_a_matrix_is_taken_flat(shape: tuple[int, ...]) -> None:
    vector = VALUES[0].reshape(shape)
    refused(lambda: Direction("kind", 1, vector), "reshape(-1)")
    assert Direction("kind", 1, vector.reshape(-1))


def test_a_matrix_is_taken_row_by_row() -> None:
    refused(lambda: Direction("kind", 1, VALUES), "Make one direction of each row")
    assert [Direction("kind", layer, row).key for layer, row in enumerate(VALUES)] == ["kind@0", "kind@1"]


@pytest.mark.parametrize("key", ["kind@01", "kind@1000000", "kind"])
def test_a_key_as_the_message_allows_it_is_read(tmp_path: Path, key: str) -> None:
    from safetensors.numpy import save_file

    path = tmp_path / "d.safetensors"
    save_file({key: VALUES[0]}, str(path))
    refused(lambda: load_directions(path), "a whole number from 0 to 999999 without leading zeros")
    for layer in (0, 999_999):
        save_file({f"kind@{layer}": VALUES[0]}, str(path))
        assert load_directions(path)


@pytest.mark.parametrize("ending", [".safetensors", ".gguf"])
def test_every_layer_that_a_direction_can_have_comes_back_from_a_file(tmp_path: Path, ending: str) -> None:
    save_directions(tmp_path / f"d{ending}", [Direction("kind", 999_999, VALUES[0])])
    assert load_directions(tmp_path / f"d{ending}")[0].layer == 999_999


@pytest.mark.parametrize("change", ["values", "metadata"])
def test_a_changed_file_is_read_once_save_directions_has_written_it(tmp_path: Path, change: str) -> None:
    from safetensors.numpy import load_file, save_file

    path = tmp_path / "d.safetensors"
    save_directions(path, [Direction("kind", 1, VALUES[0])])
    written = path.read_bytes()
    if change == "values":
        path.write_bytes(written[:-4] + VALUES[1, :1].tobytes())
    else:
        save_file(load_file(str(path)), str(path), metadata={"vllm_steer": "[1]"})
    refused(lambda: load_directions(path), "with save_directions")
    save_directions(path, [Direction("kind", 1, load_file(str(path))["kind@1"])])
    assert load_directions(path)


def test_a_file_of_another_ending_is_taken_through_a_direction(tmp_path: Path) -> None:
    VALUES[0].tofile(tmp_path / "d.bin")
    refused(lambda: load_directions(tmp_path / "d.bin"), "make a Direction of each vector and write them with save_dir")
    save_directions(tmp_path / "d.safetensors", [Direction("kind", 1, np.fromfile(tmp_path / "d.bin", "float32"))])
    assert load_directions(tmp_path / "d.safetensors")
    for ending in (".bin", ".svec"):
        with pytest.raises(BadDirectionFile, match=r"allowed: \.safetensors, \.gguf"):
            save_directions(tmp_path / f"d{ending}", load_directions(tmp_path / "d.safetensors"))
