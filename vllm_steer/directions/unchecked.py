"""A direction as a file reader returns it, before any check."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_steer.directions.direction import MOST_LAYERS

LAYER = r"(0|[1-9][0-9]{0,5})"
"""Pattern of a layer number in a file: below `MOST_LAYERS`, with one spelling, so that no two keys mean the same."""
LAYERS_ALLOWED = f"a whole number from 0 to {MOST_LAYERS - 1} without leading zeros"
METADATA_KEY = "vllm_steer"
"""Key, or prefix of the key, of this package's metadata in a file."""


class Stored(NamedTuple):
    """One direction of a file.

    Attributes:
        vector: of any shape and any real dtype.
        sha256: the ``content_hash`` that `save_directions` wrote for it, or None.
        metadata: that of the direction.
        file_layer: the number that the file has for the layer; None if it is ``layer``.
        counts: how the file counts layers, by its format or as the caller said; a ``LayerIndex``.
    """

    name: str
    layer: int
    vector: npt.NDArray[np.generic]
    sha256: str | None = None
    metadata: Mapping[str, Any] = MappingProxyType({})
    file_layer: int | None = None
    counts: str = "block_output"
