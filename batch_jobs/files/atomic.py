"""Writes files so that a reader sees either the old content or the whole new content, never a part."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from batch_jobs.files.object_store import StorePath


def write_atomically(path: Path | StorePath, text: str) -> None:
    """Replace the content of `path` with `text` in UTF-8; makes the folder if it is absent.

    On a disk, the text goes to a temporary file in the same folder (a rename is only atomic within one file system),
    which is synced and then renamed to `path`.

    Raises:
        OSError: the folder cannot be written; `path` is then unchanged.
        StoreError: the object store refuses; `path` is then unchanged.
    """
    if not isinstance(path, Path):
        path.write_bytes(text.encode("utf-8"))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    part = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; everyone who may read the folder should be able to read the result
        part.chmod(0o644)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)  # already renamed, unless a step failed


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give the block a file to write in the folder of `path`; it becomes `path` when the block ends without an error.

    Makes the folder if it is absent. For writers that take a path and not a text.

    Raises:
        OSError: the folder cannot be written; `path` is then unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)  # still there only after a failure
