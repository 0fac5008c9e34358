from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from batch_jobs.directions.readout_file import (
    ReadoutFileError,
    ReadoutKey,
    ReadText,
    StudyReadouts,
    read_readouts,
    write_readouts,
)


def readouts(*, ablated: bool = True) -> StudyReadouts:
    sizes = {"train_positive": 3, "train_negative": 3, "test_positive": 2, "test_negative": 2}
    if ablated:
        sizes["test_positive_ablated"] = 2
    draw = np.random.default_rng(0)
    return StudyReadouts(
        texts={
            name: tuple(ReadText(f"pair-{row}", f"{row:064x}", 40 + row, int("ablated" in name)) for row in range(size))
            for name, size in sizes.items()
        },
        arrays={
            ReadoutKey(name, skip_first, block): draw.normal(size=(size, 4)).astype(np.float32)
            for name, size in sizes.items()
            for skip_first in (0, 1)
            for block in (7, 12)
        },
    )


def test_what_was_written_is_read_to_the_last_bit(tmp_path: Path) -> None:
    written = readouts()
    path = tmp_path / "new" / "readouts.safetensors"
    write_readouts(path, written)
    back = read_readouts(path)
    assert back.texts == written.texts
    assert set(back.arrays) == set(written.arrays)
    for key, array in written.arrays.items():
        assert back.arrays[key].dtype == np.float32
        np.testing.assert_array_equal(back.arrays[key], array)
    assert (back.blocks, back.poolings) == ((7, 12), (0, 1))
    assert [file.name for file in path.parent.iterdir()] == ["readouts.safetensors"]


def test_the_ablated_pairs_keep_the_untouched_side(tmp_path: Path) -> None:
    kept = readouts()
    ablated = kept.ablated_test(1, 7)
    np.testing.assert_array_equal(ablated.positive_ND, kept.arrays[ReadoutKey("test_positive_ablated", 1, 7)])
    np.testing.assert_array_equal(ablated.negative_ND, kept.test(1, 7).negative_ND)


def test_what_was_not_read_is_refused_with_what_was() -> None:
    with pytest.raises(ReadoutFileError, match=r"block 8 with skip_first 0.*blocks \[7, 12\]"):
        readouts().train(0, 8)
    with pytest.raises(ReadoutFileError, match="no readouts of test_positive_ablated"):
        readouts(ablated=False).ablated_test(0, 7)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "readouts.safetensors"
    write_readouts(path, readouts())
    before = path.read_bytes()
    broken = readouts()
    broken.arrays[ReadoutKey("train_positive", 0, 7)] = np.array(["no", "numbers"])  # type: ignore[assignment]
    with pytest.raises(ValueError, match="could not convert"):
        write_readouts(path, broken)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["readouts.safetensors"]


def test_a_file_with_a_hole_is_named_with_the_place(tmp_path: Path) -> None:
    path = tmp_path / "readouts.safetensors"
    short = readouts()
    del short.arrays[ReadoutKey("test_positive", 1, 12)]
    write_readouts(path, short)
    with pytest.raises(ReadoutFileError, match="got nothing for test_positive/skip_first_1/block_12") as caught:
        read_readouts(path)
    assert str(path) in str(caught.value)

    rows_lost = readouts()
    key = ReadoutKey("train_positive", 0, 7)
    rows_lost.arrays[key] = rows_lost.arrays[key][:2]
    write_readouts(path, rows_lost)
    with pytest.raises(ReadoutFileError, match=r"shape \(2, 4\) for train_positive/skip_first_0/block_7"):
        read_readouts(path)


def test_files_of_another_form_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "readouts.safetensors"
    with pytest.raises(ReadoutFileError, match="no readout file"):
        read_readouts(path)
    path.write_bytes(b"not tensors")
    with pytest.raises(ReadoutFileError, match="not a readout file"):
        read_readouts(path)
    write_readouts(path, readouts())
    save_file(load_file(path), path)  # the same tensors, the metadata gone
    with pytest.raises(ReadoutFileError, match="not a readout file"):
        read_readouts(path)
    write_readouts(path, StudyReadouts({}, {}))
    with pytest.raises(ReadoutFileError, match="holds no readouts"):
        read_readouts(path)


def test_a_file_of_the_first_format_is_read_under_the_current_names(tmp_path: Path) -> None:
    kept = readouts()
    path = tmp_path / "readouts.safetensors"
    write_readouts(path, kept)

    def first(name: str) -> str:
        return name.replace("negative", "non_empathic").replace("positive", "empathic")

    with safe_open(str(path), framework="numpy") as tensors:
        about = json.loads(tensors.metadata()["vllm_steer_readouts"])
        arrays = {first(name): tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118  (no mapping)
    about = {"format": 1, "texts": {first(name): texts for name, texts in about["texts"].items()}}
    save_file(arrays, path, metadata={"vllm_steer_readouts": json.dumps(about)})
    again = read_readouts(path)
    assert again.texts == kept.texts
    assert set(again.arrays) == set(kept.arrays)
    for key, array in kept.arrays.items():
        np.testing.assert_array_equal(again.arrays[key], array)
