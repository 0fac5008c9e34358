"""Write a text file so that a reader sees either the old content or the whole new one, never a part."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by UTF-8 `text`; the folder is made if absent.

    The text goes to a temporary file in the same folder (a rename is only atomic within one file system), is
    synced, and then takes the name. Raises OSError when the folder cannot be written; `path` is then
    unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    part = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; a report is meant to be read by whoever may read the folder
        part.chmod(0o644)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)  # gone already, unless something failed on the way
