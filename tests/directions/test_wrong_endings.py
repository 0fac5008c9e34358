"""Files whose ending says one format and whose first bytes another, and addresses that are no paths."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from vllm_steer.directions import Direction, load_directions, save_directions
from vllm_steer.errors import BadDirectionFile
from vllm_steer.server.registry.upload import uploaded_directions
from vllm_steer.settings import steer_config

VECTOR = np.random.default_rng(11).standard_normal(8).astype(np.float32)
READ = [".safetensors", ".gguf", ".npy", ".pt", ".brainpatch"]


def right_file(folder: Path, ending: str) -> Path:
    path = folder / f"right{ending}"
    if ending == ".brainpatch":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("manifest.json", json.dumps({"interventions": [{"layer": 3, "vector": "kind"}]}))
            archive.writestr("vectors.safetensors", save({"kind": VECTOR}))
    else:
        save_directions(path, [Direction("kind", 3, VECTOR)])
    return path


@pytest.mark.parametrize("given", [*READ, ".pth", ".svec", ".csv", ".bin", ".PT", ""])
@pytest.mark.parametrize("ending", READ)
def test_a_file_under_another_ending_is_named_and_read_under_its_own(tmp_path: Path, ending: str, given: str) -> None:
    path = tmp_path / f"wrong{given}"
    shutil.copy(right_file(tmp_path, ending), path)
    layer = 3 if ending == ".npy" else None
    if given == ending or (ending, given) == (".pt", ".pth"):
        assert load_directions(path, layer=layer)[0].layer == 3
        return
    with pytest.raises(BadDirectionFile, match=rf"looks like a.*Give it the ending \{ending} ") as caught:
        load_directions(path, layer=layer)
    assert "\n" not in str(caught.value)
    renamed = path.rename(tmp_path / f"renamed{ending}")
    np.testing.assert_array_equal(load_directions(renamed, layer=layer)[0].vector, VECTOR)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n", "pointer of Git LFS.*git lfs pull"),
        (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "a web page.*Download the file itself"),
    ],
    ids=["pointer", "page"],
)
@pytest.mark.parametrize("ending", [*READ, ".svec"])
def test_what_came_instead_of_the_file_is_named(tmp_path: Path, ending: str, content: bytes, message: str) -> None:
    (tmp_path / f"kind{ending}").write_bytes(content)
    with pytest.raises(BadDirectionFile, match=message):
        load_directions(tmp_path / f"kind{ending}", layer=1)


def test_an_upload_of_another_format_is_told_its_own(tmp_path: Path) -> None:
    content = right_file(tmp_path, ".gguf").read_bytes()
    with pytest.raises(
        BadDirectionFile, match=r"^the upload ends in '.safetensors' .*an upload: \?format=gguf"
    ) as told:
        uploaded_directions("kind", None, content)
    assert str(tmp_path) not in str(told.value)
    assert uploaded_directions("kind", None, content, "gguf")[0].key == "kind@3"


@pytest.mark.parametrize(
    ("page", "address"),
    [
        ("https://huggingface.co/a/b/blob/main/x/d.pt", "hf://a/b/x/d.pt"),
        ("https://huggingface.co/a/b/resolve/0123abc/d.gguf?download=true", "hf://a/b@0123abc/d.gguf"),
        ("https://www.huggingface.co/a/b", "hf://owner/repository/path"),
        ("http://example.org/d.pt", "hf://owner/repository/path"),
    ],
)
def test_a_web_address_names_the_form_for_the_hub(page: str, address: str) -> None:
    for given in (page, Path(page)):
        with pytest.raises(BadDirectionFile, match="is a web address; allowed: a path, or ") as caught:
            load_directions(given)
        assert f" {address} for" in str(caught.value)
    assert steer_config([1], page)["vllm_steer"]["directions"] == [page], "an address is no path of this machine"
