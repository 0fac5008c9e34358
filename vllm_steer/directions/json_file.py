"""Reads JSON documents that stand beside directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm_steer.directions.quoting import one_line
from vllm_steer.errors import BadDirectionFile

MOST_BYTES = 256 << 20


def read_json_object(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        BadDirectionFile: the file cannot be read, has more than ``MOST_BYTES`` or is no JSON object.
    """
    try:
        if file.stat().st_size > MOST_BYTES:
            raise ValueError(f"{file.stat().st_size} bytes")
        content = file.read_bytes()
    except (OSError, ValueError) as error:
        raise _unreadable(file, error) from None
    return json_object_in(content, file)


def json_object_in(content: bytes, file: Path) -> dict[str, Any]:
    """``read_json_object`` of the bytes of a document; ``file`` is for messages."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise _unreadable(file, error) from None
    if not isinstance(found, dict):
        raise BadDirectionFile(f"{file} is a JSON {type(found).__name__}; allowed: an object. Export it again.")
    return found


def _unreadable(file: Path, error: Exception) -> BadDirectionFile:
    return BadDirectionFile(
        f"{file} is not readable JSON ({one_line(error)}); allowed: a JSON object of at most {MOST_BYTES >> 20} MiB. "
        "Copy it again, or export it again."
    )
