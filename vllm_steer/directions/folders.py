"""Folders of direction files; those of rotalabs-steer, repsteer, sae-lens, persona-vectors and concept-probes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from vllm_steer.directions.json_file import read_json_object
from vllm_steer.directions.npy_file import read_npy
from vllm_steer.directions.repsteer_folder import FILES as REPSTEER_FILES
from vllm_steer.directions.repsteer_folder import read_repsteer
from vllm_steer.directions.sae_lens_folder import FILES as SAE_FILES
from vllm_steer.directions.sae_lens_folder import read_sae_lens
from vllm_steer.directions.safetensors_file import own_keys, read_safetensors
from vllm_steer.directions.said import Said, member, number_of, of_array
from vllm_steer.directions.torch_file import read_rotalabs
from vllm_steer.directions.unchecked import LAYER, Stored
from vllm_steer.errors import BadDirectionFile

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
    own = own_files(folder)
    if own and all(own_keys(file) for file in own):
        return [one for file in own for one in read_safetensors(file, said)]
    raise BadDirectionFile(
        f"{folder} is a folder of no known layout; allowed: .safetensors files that save_directions wrote, and the "
        "folders of rotalabs-steer, repsteer, sae-lens, persona-vectors and concept-probes. Give the path of one file "
        "in it."
    )


def own_files(folder: Path) -> list[Path]:
    """The ``.safetensors`` files in a folder, sorted by name; none in a folder of another package's layout."""
    if any(all((folder / name).is_file() for name in files) for files in _LAYOUTS):
        return []
    return sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("."))


def _rotalabs(folder: Path, said: Said) -> list[Stored]:
    layers = member(folder / "metadata.json", read_json_object(folder / "metadata.json"), "layers")
    if not isinstance(layers, list) or len(layers) > _MOST_LAYER_FILES:
        raise BadDirectionFile(f"{folder / 'metadata.json'} has layers that are no list of numbers; export it again.")
    numbers = [number_of(folder / "metadata.json", layer, "a layer") for layer in layers]
    return [read_rotalabs(folder / f"layer_{layer}.pt", said) for layer in numbers]


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
    REPSTEER_FILES: read_repsteer,
    SAE_FILES: read_sae_lens,
    ("metadata.json", "steering_vector.safetensors"): _persona_vectors,
    ("weights.npy", "bias.json"): _concept_probes,
}
