"""lm-eval's CSV files: rows whose autoencoder lies in a local folder are read, all others refused in one line."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from vllm_steer.directions import load_directions
from vllm_steer.errors import BadDirectionFile, BadVector

D, FEATURES = 8, 6
HEADER = "loader,action,sparse_model,hookpoint,feature_index,steering_coefficient,head_index,sae_id,description,"


def autoencoder(folder: Path, layer: int, seed: int) -> np.ndarray:
    """A folder as sae-lens saves it; returns its decoder."""
    decoder = np.random.default_rng(seed).standard_normal((FEATURES, D)).astype(np.float32)
    folder.mkdir(parents=True)
    save_file({"W_dec": decoder, "b_dec": np.ones(D, np.float32)}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"metadata": {"hook_name": f"blocks.{layer}.hook_resid_post"}}))
    return decoder


def steered(folder: Path, *rows: str, header: str = HEADER) -> Path:
    path = folder / "steer.csv"
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def test_every_row_of_a_local_autoencoder_is_read(tmp_path: Path) -> None:
    early, late = autoencoder(tmp_path / "saes" / "early", 3, 1), autoencoder(tmp_path / "late", 5, 2)
    path = steered(
        tmp_path,
        "sae_lens,add,saes,layers.3,4,240.0,,early,dogs,",
        "sae_lens,add,late,,1.0,-10,,,,",
        "sae_lens,,saes,model.layers.3,0,2.5,,early,,",
        f"sae_lens,add,{tmp_path / 'late'},layers.5,2,1,,,,",
    )
    found = load_directions(path)
    assert [one.key for one in found] == ["feature-0@3", "feature-4@3", "feature-1@5", "feature-2@5"]
    for one, row in zip(found, (early[0], early[4], late[1], late[2]), strict=True):
        np.testing.assert_array_equal(one.vector, row)
    about = {"writer": "lm-eval", "layer_index": "block_output", "feature": 4, "coefficient": 240.0}
    assert dict(found[1].metadata) == about | {"description": "dogs"}
    assert [one.key for one in load_directions(path, "dogs")] == ["dogs.0@3", "dogs.4@3", "dogs.1@5", "dogs.2@5"]
    assert [one.key for one in load_directions(path, "dogs", feature=4)] == ["dogs@3"]
    assert [one.key for one in load_directions(path, layer=5)] == ["feature-1@5", "feature-2@5"]
    with pytest.raises(BadDirectionFile, match="holds no direction"):
        load_directions(path, feature=5)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("sae_lens,add,gemma-scope-2b-pt-res-canonical,layers.20,12082,240.0,,layer_20/width_16k,,", "save_model"),
        ("sparsify,add,EleutherAI/sae-pythia-70m-32k,layers.3,30,10.0,,,,", "allowed: sae_lens"),
        ("sae_lens,clamp,local,layers.3,1,10.0,,,,", "op='set'"),
        ("sae_lens,add,local,layers.3,1,10.0,2,,,", "has the head '2'"),
        ("sae_lens,add,local,layers.4,1,10.0,,,,", "output of block 3"),
        ("sae_lens,add,local,layers.3.mlp,1,10.0,,,,", "output of block 3"),
        ("sae_lens,add,local,layers.3,6,10.0,,,,", "got feature 6"),
        ("sae_lens,add,local,layers.3,-1,10.0,,,,", "feature_index '-1'"),
        ("sae_lens,add,local,layers.3,1.5,10.0,,,,", "feature_index '1.5'"),
        ("sae_lens,add,local,layers.3,1,much,,,,", "steering_coefficient 'much'"),
        ("sae_lens,add,local,layers.3,1,inf,,,,", "steering_coefficient 'inf'"),
        ("sae_lens,add,,layers.3,1,1,,,,", "no folder beside"),
        (f"sae_lens,add,{'n' * 5000},layers.3,1,1,,,,", "no folder beside"),
        ("sae_lens,add,mlp,,1,1,,,,", "another site"),
        ("sae_lens,add,local,,1,1,,,,\nsae_lens,add,local,,1,2,,,,", "row 2, has feature 1 at layer 3 once more"),
        ("sae_lens,add", "feature_index ''"),
        ('sae_lens,"add', "not a readable CSV"),
    ],
)
def test_what_cannot_be_read_here_is_refused_in_one_line(tmp_path: Path, row: str, message: str) -> None:
    autoencoder(tmp_path / "local", 3, 1)
    autoencoder(tmp_path / "mlp", 3, 1)
    (tmp_path / "mlp" / "cfg.json").write_text('{"hook_name": "blocks.3.hook_mlp_out"}')
    path = steered(tmp_path, row)
    with pytest.raises(BadDirectionFile, match=message) as caught:
        load_directions(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert "allowed" in str(caught.value)


def test_a_file_of_other_columns_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadDirectionFile, match=r"lacks the columns \['loader', 'sparse_model'\]"):
        load_directions(steered(tmp_path, header="feature_index,steering_coefficient"))
    for content in (b"", b"\n\n", b"\xff\xfe", b"a\x00b"):
        (tmp_path / "steer.csv").write_bytes(content)
        with pytest.raises(BadDirectionFile, match=r"lacks the columns|not a readable CSV"):
            load_directions(tmp_path / "steer.csv")
    with pytest.raises(BadDirectionFile, match="no direction"):
        load_directions(steered(tmp_path))


@pytest.mark.parametrize(
    "content",
    [
        HEADER.encode() + b"\n" + b"sae_lens,add,local,,1,1\n" * 40_000,
        HEADER.encode() + b"," * 500_000 + b"\n" + b"sae_lens,add,local,,1,1\n" * 1000,
        HEADER.encode() + b"\n" + b"," * 1_000_000,
        HEADER.encode() + b"\n" + b'"' + b"x" * 1_000_000,
        b"x" * (2 << 20),
    ],
    ids=["many rows", "many columns", "a long row", "a long cell", "a large file"],
)
def test_no_file_takes_much_more_memory_than_its_size(tmp_path: Path, content: bytes) -> None:
    autoencoder(tmp_path / "local", 3, 1)
    (tmp_path / "steer.csv").write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(BadDirectionFile) as caught:
            load_directions(tmp_path / "steer.csv")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # A cell of two characters is a Python string of 51 bytes and a pointer, 20 times what it takes in the file.
    assert peak < (4 << 20) + 30 * len(content)
    assert "\n" not in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_file_with_changed_bytes_is_read_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "changed-csv"
    if not folder.is_dir():
        autoencoder(folder / "local", 3, 1)
    content = bytearray(steered(folder, "sae_lens,add,local,layers.3,4,240.0,,,dogs,").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / "steer.csv").write_bytes(content)
    said = ""
    try:
        load_directions(folder / "steer.csv")
    except (BadDirectionFile, BadVector) as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 1000
