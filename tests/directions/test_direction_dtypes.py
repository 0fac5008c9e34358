"""Vectors of every dtype that people's files and tensors have are read exactly, bfloat16 included."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vllm_steer.directions import Direction, load_directions, save_directions
from vllm_steer.errors import BadDirectionFile, BadVector

PROJECT = Path(__file__).resolve().parents[2]
# All finite bfloat16 numbers: subnormals, both zeros, the largest.
BITS = np.array([bits for bits in range(1 << 16) if bits & 0x7F80 != 0x7F80], np.uint16)
BFLOAT16 = torch.from_numpy(BITS.view(np.int16)).view(torch.bfloat16)
EXACT = BFLOAT16.float().numpy()


def same_bits(direction: Direction, expected: np.ndarray) -> bool:
    return direction.vector.dtype == np.float32 and direction.vector.tobytes() == expected.tobytes()


def test_the_reference_keeps_every_bit() -> None:
    assert np.array_equal(EXACT.view(np.uint32) >> 16, BITS)


def save_tensor(path: Path, tensor: torch.Tensor) -> None:
    from safetensors.torch import save_file

    save_file({"kind@1": tensor}, str(path))


def write_gguf(path: Path, packed: np.ndarray, kind: str, order: str = "LITTLE") -> None:
    """Write a control vector with one tensor of these bytes."""
    from gguf import GGMLQuantizationType, GGUFEndian, GGUFWriter

    writer = GGUFWriter(str(path), "controlvector", endianess=GGUFEndian[order])
    writer.add_tensor("direction.1", packed, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_bfloat16_in_safetensors_is_read_exactly(tmp_path: Path) -> None:
    save_tensor(tmp_path / "d.safetensors", BFLOAT16)
    (loaded,) = load_directions(tmp_path / "d.safetensors")
    assert loaded.key == "kind@1"
    assert same_bits(loaded, EXACT)


def test_bfloat16_beside_other_dtypes_is_read_exactly(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int16, torch.uint8)
    tensors = {f"kind@{layer}": torch.arange(1, 8 + layer).to(dtype) for layer, dtype in enumerate(dtypes)}
    save_file(tensors, str(tmp_path / "d.safetensors"))
    loaded = {one.key: one.vector.tolist() for one in load_directions(tmp_path / "d.safetensors")}
    assert loaded == {key: tensor.tolist() for key, tensor in tensors.items()}


@pytest.mark.parametrize("order", ["LITTLE", "BIG"])
def test_bfloat16_in_gguf_is_read_exactly(tmp_path: Path, order: str) -> None:
    write_gguf(tmp_path / "d.gguf", BITS.view(np.uint8) if order == "LITTLE" else BITS, "BF16", order)
    (loaded,) = load_directions(tmp_path / "d.gguf")
    assert same_bits(loaded, EXACT)


@pytest.mark.parametrize("ending", [".safetensors", ".gguf"])
def test_float64_is_read_as_the_nearest_float32(tmp_path: Path, ending: str) -> None:
    values = np.random.default_rng(0).standard_normal(64)
    if ending == ".gguf":
        write_gguf(tmp_path / "d.gguf", values, "F64")
    else:
        save_tensor(tmp_path / "d.safetensors", torch.from_numpy(values))
    (loaded,) = load_directions(tmp_path / f"d{ending}")
    assert same_bits(loaded, values.astype(np.float32))


def test_bfloat16_files_need_no_torch(tmp_path: Path) -> None:
    save_tensor(tmp_path / "d.safetensors", BFLOAT16)
    write_gguf(tmp_path / "d.gguf", BITS.view(np.uint8), "BF16")
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from vllm_steer import load_directions\n"
        "print(*(one.content_hash for file in sys.argv[1:] for one in load_directions(file)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "d.safetensors"), str(tmp_path / "d.gguf")],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.split() == [Direction("kind", 1, EXACT).content_hash] * 2


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "bool", "complex64"])
def test_safetensors_of_another_dtype_is_refused_by_what_it_is(tmp_path: Path, dtype: str) -> None:
    save_tensor(tmp_path / "d.safetensors", torch.ones(4).to(getattr(torch, dtype)))
    with pytest.raises(BadDirectionFile, match=r"as (F8_|BOOL|C64).*; allowed: F64, F32, F16, BF16"):
        load_directions(tmp_path / "d.safetensors")


def with_gradient(values: torch.Tensor) -> torch.Tensor:
    return values.clone().requires_grad_()


class OnAccelerator:
    """Stands in for a tensor on another device: NumPy and Python cannot convert it before it is moved."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values = values
        self.is_floating_point = values.is_floating_point

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def detach(self) -> OnAccelerator:
        return OnAccelerator(self._values.detach())

    def cpu(self) -> torch.Tensor:
        return self._values


VALUES = torch.from_numpy(np.random.default_rng(1).standard_normal(64))
TENSORS: dict[str, Callable[[], Any]] = {
    "bfloat16": lambda: VALUES.bfloat16(),
    "bfloat16 with a gradient": lambda: with_gradient(VALUES.bfloat16()),
    "float32 with a gradient": lambda: with_gradient(VALUES.float()),
    "a parameter": lambda: torch.nn.Parameter(VALUES.float()),
    "a result of parameters": lambda: with_gradient(VALUES.float()) * 2,
    "float16": lambda: VALUES.half(),
    "float64": lambda: VALUES,
    "float8": lambda: VALUES.to(torch.float8_e4m3fn),
    "whole numbers": lambda: torch.arange(1, 65),
    "a column": lambda: VALUES.float().reshape(8, 8)[:, 3],
    "a negated view": lambda: torch.complex(VALUES.float(), VALUES.float()).conj().imag,
    "on an accelerator": lambda: OnAccelerator(with_gradient(VALUES.bfloat16())),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_torch_tensor_is_taken_exactly(name: str) -> None:
    tensor = TENSORS[name]()
    direction = Direction("kind", 1, tensor)
    plain = tensor.cpu() if isinstance(tensor, OnAccelerator) else tensor
    assert same_bits(direction, np.array(plain.tolist(), np.float32))  # tolist() goes through Python's floats


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(4, dtype=torch.complex64),
        torch.ones(4, dtype=torch.complex64).conj(),
        torch.ones(4, dtype=torch.bool),
        torch.ones(4).to_sparse(),
        torch.ones(4, device="meta"),
        torch.ones(2, 2, dtype=torch.bfloat16),
        torch.full((4,), float("nan"), dtype=torch.bfloat16),
        torch.full((4,), float("inf"), dtype=torch.bfloat16),
        torch.zeros(4, dtype=torch.bfloat16),
        [torch.ones(1, requires_grad=True)[0]],
    ],
    ids=str,
)
def test_a_tensor_without_a_direction_is_refused(tensor: Any) -> None:
    with pytest.raises(BadVector, match="'kind'"):
        Direction("kind", 1, tensor)


def test_a_direction_keeps_nothing_of_a_tensor() -> None:
    tensor = torch.ones(4)
    direction = Direction("kind", 1, tensor)
    tensor[:] = 7
    assert direction.vector.tolist() == [1.0] * 4


def test_what_came_as_bfloat16_is_saved_and_loaded_unchanged(tmp_path: Path) -> None:
    direction = Direction("kind", 1, BFLOAT16)
    for ending in (".safetensors", ".gguf"):
        save_directions(tmp_path / f"d{ending}", [direction])
        (back,) = load_directions(tmp_path / f"d{ending}")
        assert same_bits(back, EXACT)
