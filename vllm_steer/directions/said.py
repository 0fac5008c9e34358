"""What the caller says of a file that does not say it itself: name, layer, how layers are counted, feature."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from vllm_steer.directions.direction import MOST_LAYERS
from vllm_steer.directions.quoting import MOST_QUOTED
from vllm_steer.directions.unchecked import Stored
from vllm_steer.errors import BadDirectionFile

LayerIndex = Literal["block_output", "hidden_states"]
"""How a file counts layers. ``block_output``: index L is the output of block L. ``hidden_states``: index 0 is the
embeddings and index L the output of block L − 1, as in Hugging Face's ``output_hidden_states``; a block's input, and
blocks that are counted from 1, are the same."""
LAYER_INDICES: tuple[str, ...] = get_args(LayerIndex)


class Said(NamedTuple):
    """What the caller of ``load_directions`` says.

    Attributes:
        name: name of the directions.
        layer: index of the one layer to read.
        layer_index: how the file counts layers.
        feature: number of the feature of a sparse autoencoder.
    """

    name: str | None = None
    layer: int | None = None
    layer_index: LayerIndex | None = None
    feature: int | None = None


NOTHING_SAID = Said()


def stored(
    file: Path, name: str, index: int, vector: npt.NDArray[Any], counts: LayerIndex, writer: str, **more: Any
) -> Stored:
    """One direction whose file counts it as layer ``index``.

    Its metadata has the writer, the convention and ``more``.

    Raises:
        BadDirectionFile: the index stands for the embeddings, or for no layer.
    """
    layer = index - (counts == "hidden_states")
    if layer < 0:
        raise BadDirectionFile(
            f"{file} has a vector of layer {index}, which is no block's output ({counts} counts the embeddings as "
            f"{0 if counts == 'hidden_states' else -1}); allowed: those of blocks. Leave it out."
        )
    if layer >= MOST_LAYERS:
        raise BadDirectionFile(f"{file} has a vector of layer {index}; allowed: below {MOST_LAYERS}. Correct the file.")
    told = {name: value for name, value in more.items() if value is not None}
    about = {"writer": writer, "layer_index": counts, **told}
    return Stored(name, layer, vector, metadata=about, file_layer=index, counts=counts)


def one_vector(file: Path, array: npt.NDArray[Any], where: str) -> npt.NDArray[Any]:
    """An array of (D,), (1, D) or (1, 1, D) as (D,).

    Args:
        file: for messages.
        array: the values.
        where: its place in the file, for messages.

    Raises:
        BadDirectionFile: it has another shape.
    """
    if not is_one_vector(array):
        raise BadDirectionFile(
            f"{file} holds an array of shape {str(array.shape)[:MOST_QUOTED]} {where:.{MOST_QUOTED}}; allowed there: "
            "one vector, (D,), (1, D) or (1, 1, D). Save one of these."
        )
    return array.reshape(-1)


def is_one_vector(array: npt.NDArray[Any]) -> bool:
    """Whether an array is (D,), (1, D) or (1, 1, D)."""
    return 1 <= array.ndim <= 3 and array.size == array.shape[-1]


def of_array(
    file: Path,
    array: npt.NDArray[Any],
    said: Said,
    writer: str,
    known: LayerIndex | None = None,
    name: str | None = None,
    **more: Any,
) -> list[Stored]:
    """The directions of an array: one of a vector, (D,), (1, D) or (1, 1, D); one a layer of (layers, D).

    Args:
        file: for messages and as the name of last resort.
        array: the values.
        said: what the caller says.
        writer: for the metadata.
        known: how the writer counts layers, if the format says so.
        name: the name that the format has.
        more: further metadata.

    Raises:
        BadDirectionFile: it has another shape, or the caller must say the layer or how layers are counted.
    """
    called = said.name or name or file.stem
    if is_one_vector(array):
        if said.layer is None:
            raise BadDirectionFile(
                f"{file} holds one vector and no layer; allowed: files that name it. Give it: load_directions(path, "
                "layer=...), or vllm-steer convert --layer LAYER."
            )
        counts = known or said.layer_index or "block_output"
        return [stored(file, called, said.layer, array.reshape(-1), counts, writer, **more)]
    if array.ndim != 2:
        raise BadDirectionFile(
            f"{file} holds an array of shape {str(array.shape)[:MOST_QUOTED]}; allowed: (D,), (1, D), (1, 1, D), or "
            "(layers, D) with one vector a layer. Save one of these."
        )
    counts = how_counted(file, said, known, f"{array.shape[0]} vectors, one a layer,")
    rows = range(array.shape[0]) if said.layer is None else [said.layer]
    if rows[-1] >= array.shape[0]:
        raise BadDirectionFile(f"{file} has {array.shape[0]} rows, got layer {said.layer}; allowed: one of them.")
    # Row 0 of hidden states is the embeddings, at which nothing can be steered; rows of zeros are layers left out.
    blocks = [row for row in rows if said.layer is not None or (array[row].any() and (row or counts == "block_output"))]
    return [stored(file, called, row, array[row], counts, writer, **more) for row in blocks]


def how_counted(file: Path, said: Said, known: LayerIndex | None, what: str) -> LayerIndex:
    """How a file with several layers counts them: as its format says, else as the caller says.

    Raises:
        BadDirectionFile: neither says it.
    """
    counts = known or said.layer_index
    if counts is None:
        raise BadDirectionFile(
            f"{file} holds {what} and does not say how it counts layers; allowed: {' or '.join(LAYER_INDICES)}. Give "
            "it: load_directions(path, layer_index=...), or vllm-steer convert --layer-index: block_output if index 0 "
            "is the output of block 0, hidden_states if it is the embeddings."
        )
    return counts


def number_of(file: Path, value: object, what: str) -> int:
    """A layer number that stands in a file.

    Raises:
        BadDirectionFile: it is none.
    """
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 7:
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadDirectionFile(f"{file} has {what} {value!r:.{MOST_QUOTED}}; allowed: a whole number. Correct it.")
    return value


def member(file: Path, document: Mapping[str, Any], *path: str) -> Any:
    """A value in nested JSON objects.

    Raises:
        BadDirectionFile: there is none.
    """
    found: Any = document
    for key in path:
        if not isinstance(found, Mapping) or key not in found:
            raise BadDirectionFile(
                f"{file} lacks {'.'.join(path)!r}; allowed: what its writer writes. Export it again."
            )
        found = found[key]
    return found


def vector_of(file: Path, value: object) -> npt.NDArray[np.float64]:
    """A vector that stands as a list of numbers in JSON.

    Raises:
        BadDirectionFile: it is none.
    """
    if not isinstance(value, list) or not all(type(one) in (int, float) for one in value):
        raise BadDirectionFile(f"{file} has a vector that is no list of numbers; allowed: lists of D numbers.")
    try:
        return np.asarray(value, dtype=np.float64)
    except OverflowError:  # an integer beyond the range of floats
        raise BadDirectionFile(f"{file} has a number beyond the range of floats; allowed: finite numbers.") from None
