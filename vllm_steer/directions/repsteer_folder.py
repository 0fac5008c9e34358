"""Artifacts of repsteer: a folder with ``manifest.json``, ``tensors.safetensors`` and ``checksums.json``.

An artifact holds one vector, of one site. The site ``resid_post`` of layer L is the output of block L.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from vllm_steer.directions.direction import Direction
from vllm_steer.directions.json_file import read_json_object
from vllm_steer.directions.quoting import MOST_QUOTED, one_line
from vllm_steer.directions.safetensors_file import read_tensors
from vllm_steer.directions.said import Said, member, number_of, one_vector, stored
from vllm_steer.directions.unchecked import METADATA_KEY, Stored
from vllm_steer.errors import BadDirectionFile

SUFFIX = ".repsteer"
"""Ending of the folders that are written; repsteer itself asks for none."""
_MANIFEST, _TENSORS, _CHECKSUMS = "manifest.json", "tensors.safetensors", "checksums.json"
FILES = (_MANIFEST, _TENSORS)
"""The files by which such a folder is known."""
_KEY = "direction"
_SITE: dict[str, Any] = {
    "stream": "language",
    "component": "resid_post",
    "unit": None,
    "io": "output",
    "tensor_path": [],
}
"""The output of a whole decoder block, but for its layer."""


def read_repsteer(folder: Path, said: Said) -> list[Stored]:
    """Read the direction of an artifact. One that `save_directions` wrote comes back with its name and metadata.

    Raises:
        BadDirectionFile: a file is damaged or is not the one of which ``checksums.json`` has the SHA-256, or the vector
            belongs to another site than the output of a block.
    """
    file = folder / _MANIFEST
    _check_sums(folder)
    manifest = read_json_object(file)
    site = member(file, manifest, "site")
    if not isinstance(site, Mapping) or any(site.get(key, default) != default for key, default in _SITE.items()):
        raise BadDirectionFile(
            f"{file} belongs to the site {str(site)[:MOST_QUOTED]}; allowed: resid_post, the output of a whole block. "
            "A vector of another site is no direction of the residual stream."
        )
    layer = number_of(file, member(file, manifest, "site", "layer"), "a layer")
    tensors = read_tensors(folder / _TENSORS)
    if _KEY not in tensors:
        raise BadDirectionFile(
            f"{folder} has no tensor {_KEY!r}; allowed: artifacts that hold one. Export a DirectionArtifact."
        )
    vector = one_vector(folder, tensors[_KEY], f"under {_KEY!r}")
    method, scale = manifest.get("method"), manifest.get("normalization")
    name = said.name or folder.name.removesuffix(SUFFIX)
    found = stored(folder, name, layer, vector, "block_output", "repsteer", method=method, normalization=scale)
    provenance = manifest.get("provenance")
    own = provenance.get(METADATA_KEY) if isinstance(provenance, Mapping) else None
    if not isinstance(own, Mapping):
        return [found]
    name, digest, about = (member(file, own, key) for key in ("name", "sha256", "metadata"))
    return [found._replace(name=said.name or str(name), sha256=str(digest), metadata=about)]


def _check_sums(folder: Path) -> None:
    """Compare both files with ``checksums.json``, as repsteer does before it loads an artifact.

    Raises:
        BadDirectionFile: one differs, or there is no such document.
    """
    file = folder / _CHECKSUMS
    if not file.is_file():
        raise BadDirectionFile(
            f"{folder} has no {_CHECKSUMS}, so nothing says that its files belong together; allowed: whole artifacts. "
            "Copy it again; or load it with repsteer, load_artifact(path, verify_checksums=False), and save it again."
        )
    document = read_json_object(file)
    if (algorithm := document.get("algorithm")) != "sha256":
        raise BadDirectionFile(
            f"{file} has the algorithm {algorithm!r:.{MOST_QUOTED}}; allowed: sha256. Save the artifact again."
        )
    for name in FILES:
        told = member(file, document, "files", name)
        try:
            found = sha256((folder / name).read_bytes()).hexdigest()
        except OSError as error:
            raise BadDirectionFile(f"{folder / name} cannot be read ({one_line(error)}); copy it again.") from None
        if str(told).removeprefix("sha256:") != found:
            raise BadDirectionFile(
                f"{folder / name} is not the file that {_CHECKSUMS} was written for (its SHA-256 differs); allowed: "
                "unchanged artifacts. Copy it again; what was changed on purpose is saved with repsteer or "
                "save_directions."
            )


def write_repsteer(folder: Path, directions: Sequence[Direction]) -> None:
    """Write one direction as an artifact that repsteer reads; its checksums are those of the files.

    The manifest names no model, so repsteer binds the artifact with ``compatibility="dimension_only"``. An artifact
    that is there already is replaced.

    Raises:
        BadDirectionFile: there are several directions, or ``folder`` is there and no such artifact.
    """
    if len(directions) > 1:
        raise BadDirectionFile(
            f"an artifact of repsteer holds one direction, got {len(directions)}; allowed: one. Write a folder for "
            "each, or a .safetensors file, which holds any number."
        )
    (direction,) = directions
    is_artifact = folder.is_dir() and {one.name for one in folder.iterdir()} <= {*FILES, _CHECKSUMS}
    if os.path.lexists(folder) and (folder.is_symlink() or not is_artifact):
        raise BadDirectionFile(
            f"{folder} is there and holds something else than an artifact of repsteer; allowed: a new folder, or an "
            "artifact to replace. Choose another name."
        )
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        _write_files(temporary / "new", direction)
        if folder.is_dir():
            os.replace(folder, temporary / "old")
        os.replace(temporary / "new", folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_files(folder: Path, direction: Direction) -> None:
    from safetensors.numpy import save_file

    from vllm_steer import __version__

    folder.mkdir()
    save_file({_KEY: np.ascontiguousarray(direction.vector)}, str(folder / _TENSORS))
    own = {"name": direction.name, "sha256": direction.content_hash, "metadata": dict(direction.metadata)}
    manifest: dict[str, Any] = {
        "schema_version": "1.0",
        "artifact_type": "direction",
        "method": str(direction.metadata.get("method") or ""),
        "model": {"id": "", "revision": None, "architecture": None, "hidden_size": direction.vector.size},
        "tokenizer": {},
        "processor": {},
        "modality": {},
        "site": {**_SITE, "layer": direction.layer},
        "normalization": "l2" if direction.is_unit else None,
        "dtype": "float32",
        "dataset_fingerprint": None,
        "seed": None,
        "config": {},
        "library": {"name": "vllm-steer", "version": __version__},
        "provenance": {METADATA_KEY: own},
        "tensor_keys": [_KEY],
    }
    (folder / _MANIFEST).write_text(_as_json(manifest), encoding="utf-8")
    digests = {name: sha256((folder / name).read_bytes()).hexdigest() for name in FILES}
    checksums = {"algorithm": "sha256", "files": digests}
    (folder / _CHECKSUMS).write_text(_as_json(checksums), encoding="utf-8")
    for file in folder.iterdir():
        file.chmod(0o644)


def _as_json(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=2, sort_keys=True) + "\n"
