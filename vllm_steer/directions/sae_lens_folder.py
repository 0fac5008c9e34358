"""Sparse autoencoders of sae-lens: ``cfg.json`` and ``sae_weights.safetensors`` in a folder, a direction a feature."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_steer.directions.json_file import read_json_object
from vllm_steer.directions.quoting import MOST_QUOTED
from vllm_steer.directions.safetensors_file import read_tensors
from vllm_steer.directions.said import Said, stored
from vllm_steer.directions.unchecked import LAYER, Stored
from vllm_steer.errors import BadDirectionFile

_CONFIG, _WEIGHTS = "cfg.json", "sae_weights.safetensors"
FILES = (_CONFIG, _WEIGHTS)
"""The files by which such a folder is known."""
_SITE = re.compile(rf"blocks\.{LAYER}\.hook_resid_post")


def read_sae_lens(folder: Path, said: Said) -> list[Stored]:
    """Read the direction of the feature that the caller names, a row of ``W_dec``.

    Raises:
        BadDirectionFile: as `decoder_rows`, or no feature was named.
    """
    layer = sae_layer(folder)
    if said.feature is None:
        raise BadDirectionFile(
            f"{folder} is a sparse autoencoder, with one direction a feature; allowed: one of them. Give it: "
            "load_directions(path, feature=...), or vllm-steer convert --feature NUMBER."
        )
    (vector,) = decoder_rows(folder, [said.feature])
    name = said.name or f"feature-{said.feature}"
    return [stored(folder, name, layer, vector, "block_output", "sae-lens", feature=said.feature)]


def sae_layer(folder: Path) -> int:
    """The block at whose output an autoencoder was trained.

    Raises:
        BadDirectionFile: its config is damaged, or names another site.
    """
    file = folder / _CONFIG
    config = read_json_object(file)
    nested = config.get("metadata")
    hook = config.get("hook_name") or (nested.get("hook_name") if isinstance(nested, dict) else None)
    match = _SITE.fullmatch(str(hook))
    if match is None:
        raise BadDirectionFile(
            f"{file} belongs to the hook {str(hook)[:MOST_QUOTED]!r}; allowed: blocks.L.hook_resid_post, the output of "
            "a whole block. A feature of another site is no direction of the residual stream."
        )
    return int(match[1])


def decoder_rows(folder: Path, features: Sequence[int]) -> list[npt.NDArray[Any]]:
    """The directions of some features, (D,) each, copied, so that the whole decoder need not stay in memory.

    Raises:
        BadDirectionFile: the weights are damaged, or a feature is none of its rows.
    """
    rows = read_tensors(folder / _WEIGHTS, only="W_dec").get("W_dec", np.zeros((0, 0)))
    for feature in features:
        if rows.ndim != 2 or not 0 <= feature < len(rows):
            raise BadDirectionFile(
                f"{folder} has W_dec of shape {rows.shape}, got feature {feature}; allowed: one of its rows. Give one."
            )
    return [np.array(rows[feature]) for feature in features]
