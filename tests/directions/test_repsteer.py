"""Artifacts of repsteer: what the real package writes is read here, and what is written here it reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from tests.support.peers import peer
from vllm_steer.directions import Direction, load_directions, save_directions
from vllm_steer.errors import BadDirectionFile, BadVector

D = 8
FILES = ("manifest.json", "tensors.safetensors")
VECTOR = np.random.default_rng(5).standard_normal(D).astype(np.float32)
SITE = {"stream": "language", "component": "resid_post", "layer": 7, "unit": None, "io": "output", "tensor_path": []}


def written(folder: Path, **site: Any) -> Path:
    """An artifact as repsteer lays it out."""
    folder.mkdir(exist_ok=True)
    save_file({"direction": VECTOR}, folder / "tensors.safetensors")
    manifest = {"site": SITE | site, "normalization": "l2", "method": "diff_mean"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    digests = {path.name: sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.name in FILES}
    (folder / "checksums.json").write_text(json.dumps({"algorithm": "sha256", "files": digests}))
    return folder


def moved_to_another_layer(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["site"]["layer"] = 8
    (folder / "manifest.json").write_text(json.dumps(manifest))


def other_values(folder: Path) -> None:
    save_file({"direction": VECTOR * 2}, folder / "tensors.safetensors")


def without_a_file(folder: Path) -> None:
    checksums = json.loads((folder / "checksums.json").read_text())
    del checksums["files"]["manifest.json"]
    (folder / "checksums.json").write_text(json.dumps(checksums))


def of_another_algorithm(folder: Path) -> None:
    checksums = json.loads((folder / "checksums.json").read_text())
    (folder / "checksums.json").write_text(json.dumps({**checksums, "algorithm": "md5"}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (moved_to_another_layer, r"manifest\.json is not the file that checksums\.json was written for"),
        (other_values, r"tensors\.safetensors is not the file that checksums\.json was written for"),
        (without_a_file, r"checksums\.json lacks 'files\.manifest\.json'"),
        (of_another_algorithm, "algorithm 'md5'; allowed: sha256"),
        (lambda folder: (folder / "checksums.json").write_text("{"), "not readable JSON"),
        (lambda folder: (folder / "checksums.json").unlink(), r"has no checksums\.json"),
    ],
    ids=["layer", "values", "no checksum of the manifest", "algorithm", "damaged", "missing"],
)
@pytest.mark.parametrize("writer", ["repsteer", "save_directions", "by hand"])
def test_an_artifact_that_its_checksums_do_not_fit_is_refused_here_and_by_repsteer(
    tmp_path: Path, writer: str, change: Callable[[Path], Any], message: str
) -> None:
    folder = tmp_path / "kind.repsteer"
    if writer == "repsteer":
        as_repsteer_saves_it(folder)
    elif writer == "save_directions":
        save_directions(folder, [Direction("kind", 7, VECTOR)])
    else:
        written(folder)
    assert load_directions(folder)[0].layer == 7
    change(folder)
    with pytest.raises(BadDirectionFile, match=message) as caught:
        load_directions(folder)
    assert "\n" not in str(caught.value)
    if writer == "repsteer":
        with pytest.raises(Exception, match=r"(?i)checksum|delimiter|property name"):
            peer("repsteer").load_artifact(folder)


def as_repsteer_saves_it(folder: Path) -> None:
    import torch

    repsteer = peer("repsteer")
    metadata = repsteer.ArtifactMetadata(
        model_id="demo", site=repsteer.sites.resid_post(7), method="diff_mean", normalization="l2"
    )
    repsteer.DirectionArtifact(metadata, torch.from_numpy(VECTOR)).save(str(folder))


def test_an_artifact_belongs_to_the_output_of_its_block(tmp_path: Path) -> None:
    (found,) = load_directions(written(tmp_path / "kind"))
    assert found.key == "kind@7"
    about = {"writer": "repsteer", "layer_index": "block_output", "method": "diff_mean", "normalization": "l2"}
    assert dict(found.metadata) == about
    assert load_directions(tmp_path / "kind", "warm")[0].key == "warm@7"


@pytest.mark.parametrize(
    "site",
    [{"io": "input"}, {"component": "mlp_out"}, {"component": "resid_pre"}, {"unit": [0, 1]}, {"stream": "vision"}],
    ids=str,
)
def test_an_artifact_of_another_site_is_refused(tmp_path: Path, site: dict[str, Any]) -> None:
    with pytest.raises(BadDirectionFile, match="another site"):
        load_directions(written(tmp_path / "kind", **site))


def test_what_the_package_writes_is_read(tmp_path: Path) -> None:
    import torch

    repsteer = peer("repsteer")
    metadata = repsteer.ArtifactMetadata(
        model_id="demo", site=repsteer.sites.resid_post(7), method="diff_mean", normalization="l2"
    )
    repsteer.DirectionArtifact(metadata, torch.from_numpy(VECTOR)).save(str(tmp_path / "kind"))
    (found,) = load_directions(tmp_path / "kind")
    assert found.key == "kind@7"
    np.testing.assert_array_equal(found.vector, VECTOR)
    repsteer.DirectionArtifact(metadata.with_updates(site=repsteer.sites.mlp_out(7)), torch.from_numpy(VECTOR)).save(
        str(tmp_path / "other")
    )
    with pytest.raises(BadDirectionFile, match="another site"):
        load_directions(tmp_path / "other")


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:/+-]{0,20}", fullmatch=True)
metadata = st.dictionaries(
    st.text(max_size=8),
    st.none() | st.booleans() | st.integers(-(1 << 53), 1 << 53) | st.floats(allow_nan=False) | st.text(max_size=8),
    max_size=3,
)
vectors = st.integers(0, 1 << 31).map(lambda seed: np.random.default_rng(seed).standard_normal(D))


@settings(max_examples=60, deadline=None)
@given(
    name=names, layer=st.integers(0, 999_999), vector=vectors, about=metadata, scale=st.sampled_from([1e-30, 1, 1e30])
)
def test_what_is_written_comes_back_with_everything_and_repsteer_reads_it(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    layer: int,
    vector: npt.NDArray[np.float64],
    about: dict[str, Any],
    scale: float,
) -> None:
    repsteer = peer("repsteer")
    folder = tmp_path_factory.getbasetemp() / "round-trip.repsteer"  # written over, example after example
    direction = Direction(name, layer, vector * scale, about)
    save_directions(folder, [direction])
    (back,) = load_directions(folder)
    assert (back.key, back.content_hash, dict(back.metadata)) == (direction.key, direction.content_hash, about)
    artifact = repsteer.load_artifact(folder)  # compares the checksums
    assert artifact.metadata.site == repsteer.sites.resid_post(layer)
    np.testing.assert_array_equal(artifact.direction.numpy(), direction.vector)
    assert artifact.metadata.normalization == ("l2" if direction.is_unit else None)
    assert [one.name for one in folder.parent.glob("*round-trip.repsteer*")] == ["round-trip.repsteer"]


def test_only_artifacts_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "work.repsteer").mkdir()
    (tmp_path / "work.repsteer" / "notes.txt").write_text("mine")
    (tmp_path / "file.repsteer").write_text("mine")
    (tmp_path / "link.repsteer").symlink_to(tmp_path / "nowhere")
    for name in ("work", "file", "link"):
        with pytest.raises(BadDirectionFile, match="something else than an artifact"):
            save_directions(tmp_path / f"{name}.repsteer", [Direction("kind", 1, VECTOR)])
    assert (tmp_path / "work.repsteer" / "notes.txt").read_text() == "mine"
    with pytest.raises(BadDirectionFile, match="holds one direction, got 2"):
        save_directions(tmp_path / "two.repsteer", [Direction("kind", layer, VECTOR) for layer in (1, 2)])
    assert not (tmp_path / "two.repsteer").exists()


@pytest.mark.parametrize("file", ["manifest.json", "tensors.safetensors"])
def test_an_artifact_cut_at_any_byte_is_refused_in_one_line(tmp_path: Path, file: str) -> None:
    save_directions(tmp_path / "kind.repsteer", [Direction("kind", 1, VECTOR, {"method": "caa"})])
    path = tmp_path / "kind.repsteer" / file
    whole = path.read_bytes()
    for length in range(len(whole) - 1):  # without its last byte, a line end, the manifest is whole
        path.write_bytes(whole[:length])
        with pytest.raises(BadDirectionFile) as caught:
            load_directions(path.parent)
        assert "\n" not in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_an_artifact_with_changed_bytes_is_read_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "changed.repsteer"
    shutil.rmtree(folder, ignore_errors=True)
    save_directions(folder, [Direction("kind", 1, VECTOR, {"method": "caa"})])
    path = folder / data.draw(st.sampled_from(["manifest.json", "tensors.safetensors"]))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    said = ""
    try:
        (found,) = load_directions(folder)
        np.testing.assert_array_equal(found.vector, VECTOR)  # the manifest has its hash
    except (BadDirectionFile, BadVector) as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 1000


def test_a_written_artifact_is_the_layout_of_the_package(tmp_path: Path) -> None:
    save_directions(tmp_path / "kind.repsteer", [Direction("kind", 1, VECTOR)])
    assert list(load_file(tmp_path / "kind.repsteer" / "tensors.safetensors")) == ["direction"]
    assert sorted(path.name for path in (tmp_path / "kind.repsteer").iterdir()) == [
        "checksums.json",
        "manifest.json",
        "tensors.safetensors",
    ]
