"""Reads and checks uploads of directions. It runs no code from them."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Literal

import numpy as np

from vllm_steer.directions import Direction, load_directions, save_directions
from vllm_steer.directions.said import LayerIndex
from vllm_steer.errors import BadDirectionFile, DirectionError, MalformedSpec, UploadTooLarge

FileForm = Literal["safetensors", "gguf", "npy", "pt", "svec", "brainpatch"]
_ITEM_BYTES = 4


async def read_upload(chunks: AsyncIterator[bytes], announced: str | None, max_mib: int) -> bytes:
    """Read the body of a request, up to the allowed size.

    Args:
        chunks: the body.
        announced: its ``Content-Length``, if it has one.
        max_mib: the allowed size in MiB.

    Raises:
        UploadTooLarge: more than ``max_mib`` MiB.
    """
    too_large = UploadTooLarge(
        f"the upload has more than {max_mib} MiB; allowed: {max_mib}. Send fewer directions at once, or start the "
        "server with max_upload_mib larger."
    )
    limit = max_mib << 20
    if announced is not None and announced.isdecimal() and int(announced) > limit:
        raise too_large
    body = bytearray()
    async for chunk in chunks:
        body += chunk
        if len(body) > limit:
            raise too_large
    return bytes(body)


def uploaded_directions(
    name: str, layer: int | None, body: bytes, form: FileForm | None = None, layer_index: LayerIndex | None = None
) -> list[Direction]:
    """The directions of an upload.

    Args:
        name: the name that all of them get; a file with one other name is taken under this one.
        layer: with a ``form``, the one layer to read, as in ``load_directions``. Without one, the body is one vector
            of float32 little-endian numbers for that layer.
        body: the bytes.
        form: the format of the file; ``safetensors`` without ``form`` and ``layer``.
        layer_index: see ``load_directions``.

    Raises:
        BadDirectionFile, BadVector, MalformedSpec: as ``load_directions`` and ``Direction``.
    """
    if layer is not None and form is None:
        if len(body) % _ITEM_BYTES:
            raise BadDirectionFile(
                f"the upload for {name}@{layer} has {len(body)} bytes; allowed: whole float32 numbers of 4 bytes. For "
                "a safetensors file leave ?layer= out."
            )
        return [Direction(name, layer, np.frombuffer(body, dtype="<f4"))]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"upload.{form or 'safetensors'}"
        file.write_bytes(body)
        try:
            return load_directions(file, name, layer, layer_index=layer_index)
        except (DirectionError, MalformedSpec) as error:
            # Clients must not learn where the server keeps its temporary files.
            raise type(error)(str(error).replace(str(file), "the upload")) from None


def packed_directions(directions: list[Direction]) -> bytes:
    """The bytes of a safetensors file with these directions."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "directions.safetensors"
        save_directions(file, directions)
        return file.read_bytes()
