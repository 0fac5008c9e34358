"""Direction files: values come back bit by bit, and what a file cannot hold is refused."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vllm_steer.directions import Direction, load_directions, save_directions
from vllm_steer.errors import BadDirectionFile, BadVector, MalformedSpec

SIZE = 16
VALUES = np.random.default_rng(0).standard_normal((3, SIZE)).astype(np.float32)
# Values that a careless conversion changes: the smallest subnormals, the largest, a negative zero.
AWKWARD = np.array([2.0**-149, 3.4028235e38, -0.0, 1 / 3, 2.0**-24, 65504.0], np.float32)


def write(path: Path) -> Path:
    """Write a file of the format that the ending names."""
    if path.suffix == ".npy":
        np.save(path, VALUES[0])
    else:
        save_directions(path, [Direction("kind", 1, VALUES[0]), Direction("kind", 2, VALUES[1])])
    return path


def load(path: Path) -> list[Direction]:
    return load_directions(path, "kind", 1) if path.suffix == ".npy" else load_directions(path)


ENDINGS = [".safetensors", ".gguf", ".npy"]


def bits(vector: Any) -> bytes:
    return np.asarray(vector, dtype="<f4").tobytes()


@pytest.mark.parametrize("ending", [".safetensors", ".gguf"])
def test_a_saved_file_comes_back_bit_by_bit(tmp_path: Path, ending: str) -> None:
    saved = [Direction("kind", 20, VALUES[0]), Direction("kind", 3, VALUES[1]), Direction("kind", 7, AWKWARD)]
    save_directions(tmp_path / f"d{ending}", saved)
    loaded = load_directions(tmp_path / f"d{ending}")
    assert [one.layer for one in loaded] == [3, 7, 20]
    assert {one.key: bits(one.vector) for one in loaded} == {one.key: bits(one.vector) for one in saved}
    assert {one.content_hash for one in loaded} == {one.content_hash for one in saved}


def test_safetensors_holds_any_names_and_layers(tmp_path: Path) -> None:
    saved = [Direction(name, layer, VALUES[layer]) for name in ("a/b:c", "x.Y_z+1-") for layer in (0, 1, 2)]
    save_directions(tmp_path / "d.safetensors", saved)
    assert {one.key for one in load_directions(tmp_path / "d.safetensors")} == {one.key for one in saved}


@pytest.mark.parametrize("ending", ENDINGS)
def test_float16_files_give_exactly_their_values(tmp_path: Path, ending: str) -> None:
    half = VALUES[0].astype(np.float16)
    path = tmp_path / f"d{ending}"
    if ending == ".safetensors":
        from safetensors.numpy import save_file

        save_file({"kind@1": half}, str(path))
    elif ending == ".gguf":
        write_gguf(path, {"direction.1": half})
    else:
        np.save(path, half)
    (loaded,) = load(path)
    assert loaded.vector.dtype == np.float32
    assert bits(loaded.vector) == bits(half.astype(np.float32))


def write_gguf(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a control vector as other tools do: without a name in it."""
    from gguf import GGUFWriter

    writer = GGUFWriter(str(path), "controlvector")
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_without_a_name_takes_the_file_s_or_the_given_one(tmp_path: Path) -> None:
    write_gguf(tmp_path / "happy.gguf", {"direction.4": VALUES[0], "direction.12": VALUES[1], "other": VALUES[2]})
    assert [one.key for one in load_directions(tmp_path / "happy.gguf")] == ["happy@4", "happy@12"]
    assert [one.key for one in load_directions(tmp_path / "happy.gguf", name="sad")] == ["sad@4", "sad@12"]


@pytest.mark.parametrize("dtype", ["<f2", ">f4", "<f8", "<i4", "u1"])
def test_npy_of_any_real_type_is_read(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "d.npy", np.arange(1, 5).astype(dtype))
    (loaded,) = load_directions(tmp_path / "d.npy", "kind", 3)
    assert (loaded.name, loaded.layer, loaded.vector.tolist()) == ("kind", 3, [1.0, 2.0, 3.0, 4.0])


def test_published_probes_round_trip_unchanged(paper_data: Path, tmp_path: Path) -> None:
    probes = sorted((paper_data / "probes").glob("*.npy"))
    if not probes:
        pytest.skip(f"no published probe in {paper_data / 'probes'}")
    for path in probes:
        layer = int(path.stem.rpartition("layer")[2])
        (probe,) = load_directions(path, "empathy", layer)
        for ending in (".safetensors", ".gguf"):
            save_directions(tmp_path / f"p{ending}", [probe])
            (back,) = load_directions(tmp_path / f"p{ending}")
            assert back.key == f"empathy@{layer}"
            assert np.array_equal(back.vector.astype(np.float16), np.load(path))  # published as float16
            assert back.content_hash == probe.content_hash


@pytest.mark.parametrize("array", [np.array(["a"]), np.array([1j]), np.array([True]), np.array([(1,)], dtype="i4,")])
def test_npy_of_no_real_numbers_is_refused(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "d.npy", array)
    with pytest.raises(BadDirectionFile, match="real numbers"):
        load_directions(tmp_path / "d.npy", "kind", 1)


@pytest.mark.parametrize(
    "key", ["kind", "@1", "kind@", "kind@-1", "kind@01", "kind@1.5", "a b@1", "kind@" + "9" * 5000]
)
def test_a_tensor_whose_key_is_no_name_at_layer_is_refused(tmp_path: Path, key: str) -> None:
    from safetensors.numpy import save_file

    save_file({key: VALUES[0]}, str(tmp_path / "d.safetensors"))
    with pytest.raises(BadDirectionFile, match=r"d\.safetensors"):
        load_directions(tmp_path / "d.safetensors")


def test_files_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadDirectionFile, match="no direction file at"):
        load_directions(tmp_path / "absent.safetensors")
    with pytest.raises(BadDirectionFile, match="no known layout"):
        load_directions(tmp_path)
    (tmp_path / "d.bin").write_bytes(b"x")
    with pytest.raises(BadDirectionFile, match=r"'\.bin'; allowed: \.safetensors"):
        load_directions(tmp_path / "d.bin")
    np.save(tmp_path / "d.npy", VALUES[0])
    with pytest.raises(BadDirectionFile, match="one vector and no layer"):
        load_directions(tmp_path / "d.npy")
    write_gguf(tmp_path / "d.gguf", {"other": VALUES[0]})
    with pytest.raises(BadDirectionFile, match="holds no direction"):
        load_directions(tmp_path / "d.gguf")


KIND = Direction("kind", 1, VALUES[0])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.safetensors", [], "no directions"),
        ("d.safetensors", [KIND, KIND], "'kind@1' comes twice"),
        ("d.bin", [KIND], r"'\.bin'; allowed: \.safetensors, \.gguf"),
        ("d.npy", [KIND, Direction("cold", 2, VALUES[1])], "one vector"),
        ("d.pt", [KIND, Direction("cold", 1, VALUES[1])], "one direction a layer"),
        ("d.gguf", [KIND, Direction("cold", 2, VALUES[1])], "one name"),
        ("d.gguf", [KIND, Direction("cold", 0, VALUES[1])], "layer 0"),
        ("d.gguf", [Direction("kind", 0, VALUES[0])], "layer 0"),
    ],
)
def test_what_a_file_cannot_hold_is_refused_and_nothing_is_left_behind(
    tmp_path: Path, name: str, content: list[Direction], message: str
) -> None:
    with pytest.raises(BadDirectionFile, match=message):
        save_directions(tmp_path / name, content)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", [".safetensors", ".gguf"])
def test_saving_is_atomic(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / f"d{ending}")
    before = path.read_bytes()

    def replace_fails(source: str, target: str) -> None:
        assert Path(source).parent == path.parent  # a rename across file systems is not atomic
        assert len(Path(source).read_bytes()) > 0, "replaced before it was written"
        assert path.read_bytes() == before, "written in place"
        raise OSError("power cut")

    monkeypatch.setattr(os, "replace", replace_fails)
    with pytest.raises(OSError, match="power cut"):
        save_directions(path, [Direction("kind", 9, VALUES[2])])
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_saved_files_can_be_read_by_a_server_of_another_user(tmp_path: Path) -> None:
    save_directions(tmp_path / "new" / "d.safetensors", [KIND])
    mode = (tmp_path / "new" / "d.safetensors").stat().st_mode
    assert stat.S_IMODE(mode) & 0o444 == 0o444


@given(hnp.arrays(np.float32, st.integers(1, 64), elements=st.floats(-100, 100, width=32)).filter(np.any))
def test_a_direction_keeps_a_read_only_copy_of_its_values(vector: np.ndarray) -> None:
    given_values = vector.copy()
    one = Direction("kind", 1, vector)
    vector[:] = 7
    assert bits(one.vector) == bits(given_values)
    with pytest.raises(ValueError, match="read-only"):
        one.vector[0] = 1


@pytest.mark.parametrize(
    "vector",
    [
        np.zeros(4),
        [],
        [[1.0, 2.0]],
        3.0,
        [1.0, np.nan],
        [np.inf, 1.0],
        [1e300, 1.0],
        ["a"],
        [1j],
        [[1], [1, 2]],
        None,
        {"a": 1},
    ],
    ids=str,
)
def test_a_vector_without_a_direction_is_refused(vector: Any) -> None:
    with pytest.raises(BadVector, match="'kind'"):
        Direction("kind", 1, vector)


@pytest.mark.parametrize("name", ["", "-a", "a b", "a@b", "é", "a\n", "a" * 129, None, 3])
def test_a_name_that_no_key_can_hold_is_refused(name: Any) -> None:
    with pytest.raises(MalformedSpec, match="direction name is"):
        Direction(name, 1, VALUES[0])


@pytest.mark.parametrize("layer", [-1, 1.0, True, "1", None, 1_000_000])
def test_a_layer_that_is_no_block_is_refused(layer: Any) -> None:
    with pytest.raises(MalformedSpec, match="has layer"):
        Direction("kind", layer, VALUES[0])


def test_the_content_hash_is_of_the_values_alone() -> None:
    assert Direction("a", 1, VALUES[0]).content_hash == Direction("b", 2, VALUES[0].astype(np.float64)).content_hash
    assert Direction("a", 1, VALUES[0]).content_hash != Direction("a", 1, VALUES[1]).content_hash
    assert Direction("a", 1, VALUES[0]).content_hash != Direction("a", 1, VALUES[0][::-1]).content_hash


def test_is_unit_allows_for_float16_and_no_more() -> None:
    one = Direction("kind", 1, VALUES[0]).normalised()
    assert one.norm == pytest.approx(1.0, abs=1e-6)  # float32 rounding of 16 elements
    assert one.is_unit
    assert Direction("kind", 1, one.vector.astype(np.float16)).is_unit
    assert not Direction("kind", 1, one.vector * np.float32(1.02)).is_unit
    assert not Direction("kind", 1, VALUES[0]).is_unit
    # normalising does not rotate: the cosine is 1 to float32 rounding
    assert float(one.vector @ VALUES[0]) == pytest.approx(float(np.linalg.norm(VALUES[0])), rel=1e-6)


def test_a_flipped_bit_in_the_values_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "dirs.safetensors"
    save_directions(path, [Direction("kind", 3, np.ones(8))])
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(BadDirectionFile, match="kind@3"):
        load_directions(path)
