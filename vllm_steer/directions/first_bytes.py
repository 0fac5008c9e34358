"""What a file is by its first bytes, for files whose ending says something else."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import NamedTuple

_MOST_READ = 64  # bytes
_SAFETENSORS_START = 8  # bytes of the header's length, before its first brace


class Look(NamedTuple):
    """What a file looks like.

    Attributes:
        what: in words, with an article.
        ending: of the files that begin so; None if no direction file does.
        do: what to do about it.
    """

    what: str
    ending: str | None
    do: str


def _format(what: str, ending: str) -> Look:
    return Look(what, ending, f"Give it the ending {ending} (an upload: ?format={ending[1:]})")


_GGUF = _format("a GGUF file", ".gguf")
_NPY = _format("a .npy array", ".npy")
_SAFETENSORS = _format("a safetensors file", ".safetensors")
_TORCH = _format("a PyTorch file", ".pt")
_BRAINPATCH = _format("a .brainpatch archive", ".brainpatch")
_NPZ = Look("an archive of NumPy arrays (.npz)", None, "Save one of its arrays with numpy.save")
_POINTER = Look("a pointer of Git LFS, without the file's content", None, "Fetch the content: git lfs pull")
_PAGE = Look("a web page", None, "Download the file itself, or give hf://owner/repository/path")


def looks_like(file: Path) -> Look | None:
    """What the first bytes of a file say; None if nothing is known of them, or the file cannot be read.

    No valid file of one of the formats that are read here begins like one of another.
    """
    try:
        with file.open("rb") as opened:
            start, size = opened.read(_MOST_READ), file.stat().st_size
        if start.startswith(b"PK\x03\x04"):
            return _archive(file)
    except (OSError, zipfile.BadZipFile, ValueError, RuntimeError):
        return None
    if start.startswith(b"GGUF"):
        return _GGUF
    if start.startswith(b"\x93NUMPY"):
        return _NPY
    if start[_SAFETENSORS_START : _SAFETENSORS_START + 1] == b"{":
        header = int.from_bytes(start[:_SAFETENSORS_START], "little")
        return _SAFETENSORS if 0 < header <= size - _SAFETENSORS_START else None
    if start.startswith(b"version https://git-lfs"):
        return _POINTER
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return _PAGE
    return None


def _archive(file: Path) -> Look | None:
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
    if any(name == "data.pkl" or name.endswith("/data.pkl") for name in names):
        return _TORCH
    if "vectors.safetensors" in names:
        return _BRAINPATCH
    return _NPZ if names and all(name.endswith(".npy") for name in names) else None
