"""Many directions: a folder of files, a few of the vectors of a file, and no work that grows with their square."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from vllm_steer.directions import Direction, load_directions, save_directions
from vllm_steer.directions.files import direction_keys, load_some
from vllm_steer.errors import BadDirectionFile

SIZE = 8


def direction(name: str, layer: int = 0, value: float = 1.0) -> Direction:
    return Direction(name, layer, np.full(SIZE, value), {"from": name})


def test_a_folder_of_files_is_read_whole_and_ordered_as_one_file_is(tmp_path: Path) -> None:
    these = [direction("b", 0, 2.0), direction("a", 0, 1.0), direction("c", 1, 3.0), direction("a", 1, 4.0)]
    save_directions(tmp_path / "folder" / "2.safetensors", these[:1])
    save_directions(tmp_path / "folder" / "1.safetensors", these[1:])
    save_directions(tmp_path / "one.safetensors", these)
    (tmp_path / "folder" / "README.md").write_text("what they are")
    found, expected = load_directions(tmp_path / "folder"), load_directions(tmp_path / "one.safetensors")
    assert [(one.key, one.content_hash, one.metadata) for one in found] == [
        (one.key, one.content_hash, one.metadata) for one in expected
    ]
    assert sorted(direction_keys(tmp_path / "folder")) == sorted(one.key for one in these)
    assert [one.key for one in load_directions(tmp_path / "folder", layer=1)] == ["a@1", "c@1"]


def test_a_folder_with_one_direction_twice_or_with_other_tensors_is_refused(tmp_path: Path) -> None:
    save_directions(tmp_path / "1.safetensors", [direction("a")])
    save_directions(tmp_path / "2.safetensors", [direction("a", value=2.0)])
    with pytest.raises(BadDirectionFile, match="several vectors for 'a' at layer 0"):
        load_directions(tmp_path)
    from safetensors.numpy import save_file

    save_file({"lm_head.weight": np.ones((2, SIZE), np.float32)}, str(tmp_path / "2.safetensors"))
    with pytest.raises(BadDirectionFile, match=r"no known layout; allowed: \.safetensors files that save_directions"):
        load_directions(tmp_path)


def test_some_directions_of_a_file_are_read_with_their_metadata(tmp_path: Path) -> None:
    file = tmp_path / "many.safetensors"
    save_directions(file, [direction(f"d{n}", n % 3, n + 1.0) for n in range(9)])
    read = load_some(file, ["d7@1", "d2@2"])
    assert [(one.key, one.vector[0], one.metadata) for one in read] == [
        ("d7@1", 8.0, {"from": "d7"}),
        ("d2@2", 3.0, {"from": "d2"}),
    ]
    with pytest.raises(BadDirectionFile, match="not a readable safetensors file"):
        load_some(file, ["d7@2"])


def test_the_keys_of_other_packages_files_are_those_of_what_they_hold(tmp_path: Path) -> None:
    save_directions(tmp_path / "v.gguf", [direction("v", 2), direction("v", 3)])
    assert sorted(direction_keys(tmp_path / "v.gguf")) == ["v@2", "v@3"]
    with pytest.raises(BadDirectionFile, match="no direction file at"):
        direction_keys(tmp_path / "none.safetensors")


def test_twenty_thousand_directions_are_written_and_read_in_seconds(tmp_path: Path) -> None:
    many = [Direction(f"d{n}", n % 4, np.full(SIZE, n + 1.0, np.float32)) for n in range(20_000)]
    start = time.process_time()
    save_directions(tmp_path / "many.safetensors", many)
    read = load_directions(tmp_path / "many.safetensors")
    # About 1 s; comparing each name with every other one would take 10 s more.
    assert time.process_time() - start < 6
    assert {one.key: one.vector[0] for one in read} == {f"d{n}@{n % 4}": n + 1.0 for n in range(20_000)}
