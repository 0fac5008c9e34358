"""Folders of other packages: rotalabs-steer, repsteer, sae-lens, persona-vectors and concept-probes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from vllm_steer.directions.json_file import read_json_object
from vllm_steer.directions.npy_file import read_npy
from vllm_steer.directions.quoting import MOST_QUOTED
from vllm_steer.directions.safetensors_file import read_safetensors, read_tensors
from vllm_steer.directions.said import Said, member, number_of, of_array, stored
from vllm_steer.directions.torch_file import read_rotalabs
from vllm_steer.directions.unchecked import LAYER, Stored
from vllm_steer.errors import BadDirectionFile

_SAE_SITE = re.compile(rf"blocks\.{LAYER}\.hook_resid_post")
_MOST_LAYER_FILES = 1000


def read_folder(folder: Path, said: Said) -> list[Stored]:
    """Read the directions of a folder; the files in it tell its writer.

    Raises:
        BadDirectionFile: no package of these writes such a folder, it is damaged, it means something else than an
            addition to the residual stream, or the caller must say what it does not.
    """
    for files, read in _LAYOUTS.items():
        if all((folder / name).is_file() for name in files):
            return read(folder, said)
    if any(folder.glob("layer_*.pt")) and (folder / "metadata.json").is_file():
        return _rotalabs(folder, said)
    raise BadDirectionFile(
        f"{folder} is a folder of no known layout; allowed: those of rotalabs-steer, repsteer, sae-lens, "
        "persona-vectors and concept-probes. Give the path of one file in it."
    )


def _rotalabs(folder: Path, said: Said) -> list[Stored]:
    layers = member(folder / "metadata.json", read_json_object(folder / "metadata.json"), "layers")
    if not isinstance(layers, list) or len(layers) > _MOST_LAYER_FILES:
        raise BadDirectionFile(f"{folder / 'metadata.json'} has layers that are no list of numbers; export it again.")
    numbers = [number_of(folder / "metadata.json", layer, "a layer") for layer in layers]
    return [read_rotalabs(folder / f"layer_{layer}.pt", said) for layer in numbers]


def _repsteer(folder: Path, said: Said) -> list[Stored]:
    file = folder / "manifest.json"
    manifest = read_json_object(file)
    site = member(file, manifest, "site")
    where = {key: member(file, manifest, "site", key) for key in ("component", "io", "layer")}
    if where["io"] != "output" or site.get("unit") is not None or "block" not in str(where["component"]):
        raise BadDirectionFile(
            f"{file} belongs to the site {str(site)[:MOST_QUOTED]}; allowed: the output of a whole block. A vector of "
            "another site is no direction of the residual stream."
        )
    tensors = read_tensors(folder / "tensors.safetensors")
    if "direction" not in tensors:
        raise BadDirectionFile(f"{folder} has no tensor 'direction'; allowed: artifacts that hold one. Export another.")
    layer = number_of(file, where["layer"], "a layer")
    method, scale = manifest.get("method"), manifest.get("normalization")
    name = said.name or folder.name
    vector = tensors["direction"].reshape(-1)
    return [stored(folder, name, layer, vector, "block_output", "repsteer", method=method, normalization=scale)]


def _sae_lens(folder: Path, said: Said) -> list[Stored]:
    file = folder / "cfg.json"
    config = read_json_object(file)
    nested = config.get("metadata")
    hook = config.get("hook_name") or (nested.get("hook_name") if isinstance(nested, dict) else None)
    match = _SAE_SITE.fullmatch(str(hook))
    if match is None:
        raise BadDirectionFile(
            f"{file} belongs to the hook {str(hook)[:MOST_QUOTED]!r}; allowed: blocks.L.hook_resid_post, the output of "
            "a whole block. A feature of another site is no direction of the residual stream."
        )
    if said.feature is None:
        raise BadDirectionFile(
            f"{folder} is a sparse autoencoder, with one direction a feature; allowed: one of them. Give it: "
            "load_directions(path, feature=...), or vllm-steer convert --feature NUMBER."
        )
    rows = read_tensors(folder / "sae_weights.safetensors", only="W_dec").get("W_dec", np.zeros((0, 0)))
    if rows.ndim != 2 or not 0 <= said.feature < len(rows):
        raise BadDirectionFile(
            f"{folder} has W_dec of shape {rows.shape}, got feature {said.feature}; allowed: one of its rows."
        )
    name = said.name or f"feature-{said.feature}"
    vector = np.array(rows[said.feature])
    return [stored(folder, name, int(match[1]), vector, "block_output", "sae-lens", feature=said.feature)]


def _persona_vectors(folder: Path, said: Said) -> list[Stored]:
    return read_safetensors(folder / "steering_vector.safetensors", said)


def _concept_probes(folder: Path, said: Said) -> list[Stored]:
    match = re.fullmatch(rf"layer_{LAYER}", folder.name)
    if match is None:
        raise BadDirectionFile(f"{folder} is a probe in no folder layer_L; allowed: the folder as it was written.")
    about = read_json_object(folder / "meta.json") if (folder / "meta.json").is_file() else {}
    concept: Any = about.get("concept")
    name = said.name or (concept if isinstance(concept, str) else folder.parent.parent.name)
    said = said._replace(name=name, layer=int(match[1]))
    return of_array(folder, read_npy(folder / "weights.npy"), said, "concept-probes", "hidden_states")


_LAYOUTS = {
    ("manifest.json", "tensors.safetensors"): _repsteer,
    ("cfg.json", "sae_weights.safetensors"): _sae_lens,
    ("metadata.json", "steering_vector.safetensors"): _persona_vectors,
    ("weights.npy", "bias.json"): _concept_probes,
}
