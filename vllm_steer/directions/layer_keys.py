"""Keys under which files of other packages hold one vector a layer: ``12``, ``layer_12``, ``model.layers.12``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from vllm_steer.directions.quoting import MOST_QUOTED
from vllm_steer.directions.unchecked import LAYER
from vllm_steer.errors import BadDirectionFile

_NAMES_A_LAYER = re.compile(rf"(?:(?:\w+\.)*(?:layers?|blocks?|h)[._])?{LAYER}")
"""A number, a module of whole blocks, or the word with a number; never a part of a block, such as ``layers.12.mlp``."""
_SPEAKS_OF_A_LAYER = re.compile(
    r"[-+]?\d+(\.\d+)?|(.*[^A-Za-z0-9])?((layers?|blocks?)[^A-Za-z0-9]?|h\.)[-+]?\d.*", re.IGNORECASE | re.DOTALL
)
"""Also what cannot be read as one layer: ``-1``, ``layers.12.mlp``, ``layer_12_mean``, ``layer 012``."""


def layers_of_keys(file: Path, keys: Iterable[object]) -> list[int] | None:
    """The layer of each key; None if the keys are names, and speak of no layers.

    Raises:
        BadDirectionFile: some keys name layers and others do not, one speaks of a layer and cannot be read as one, or
            two name the same layer.
    """
    texts = [str(key) for key in keys]
    matches = [_NAMES_A_LAYER.fullmatch(text) for text in texts]
    others = [text for text, match in zip(texts, matches, strict=True) if match is None]
    unclear = [text for text in others if _SPEAKS_OF_A_LAYER.fullmatch(text)]
    if others and len(others) == len(texts) and not unclear:
        return None
    if others:
        raise BadDirectionFile(
            f"{file} has the keys {quoted(texts)}, of which {quoted(unclear or others)} cannot be read as a layer; "
            "allowed: a layer in every key, such as 12, layer_12 or model.layers.12, counted from 0; or names alone. "
            "Save the vectors of layers as a dict from layer to tensor."
        )
    layers = [int(match[1]) for match in matches if match is not None]
    if len(set(layers)) < len(layers):
        raise BadDirectionFile(
            f"{file} has the keys {quoted(texts)}, of which two name the same layer; allowed: each layer once. Leave "
            "one out."
        )
    return layers


def quoted(keys: Sequence[str]) -> str:
    """Keys for a message."""
    return ", ".join(map(repr, keys))[:MOST_QUOTED]
